import { KVM_MEM_READONLY } from '../../../lib/uapi.ts';
import { arm64, before, mappable, noTdp, swProtected, tdp, x86 } from '../needs.ts';
import { MMAP, type Scenario, scenario, section } from '../scenario.ts';

/** Exit reasons; the guest's doorbell is IO. */
const [UNKNOWN, IO, MEMORY_FAULT] = [0, 2, 39];

/** A vCPU that never ran, in a VM with host memory in slot 0: this many pages from `at` on. */
const hostMemory =
  ({ at = 0, pages = 4, flags = 0, type = 0 } = {}) =>
  (s: Scenario) => {
    const vm = s.vm(type);
    const memory = s.anonymous(pages);
    s.slot(vm, { at, pages, hva: s.kernel.addressOf(memory), flags });
    return { vm, memory, vcpu: s.vcpu(vm) };
  };

/** The same with a guest_memfd. */
const boundFile =
  (flags: number, type = 0) =>
  (s: Scenario) => {
    const vm = s.vm(type);
    const file = s.gmem(vm, 4, flags);
    s.bind(vm, { pages: 4, file, hva: s.kernel.addressOf(s.anonymous(4)) });
    return { vm, file, vcpu: s.vcpu(vm) };
  };

/** What the arguments alone are refused for. */
const refusals = (s: Scenario, vcpu: number) => {
  const call = (gpa: bigint, size: bigint, flags = 0) => s.kernel.preFaultMemory(vcpu, { gpa, size, flags });
  const P = BigInt(s.P);
  return [
    call(0n, P, 1),
    call(1n, P),
    call(0n, 1n),
    call(0n, 0n),
    call(2n ** 64n - P, P),
    call(2n ** 64n - P, 2n * P),
    call(1n, P, 1),
  ];
};
const refused = Array(7).fill('EINVAL');

export const preFault = section('KVM_PRE_FAULT_MEMORY', [
  scenario('14 arguments', 'flags, an unaligned, empty or wrapping range: EINVAL, with TDP and without', {
    needs: [x86],
    given: hostMemory(),
    when: (s, { vcpu }) => refusals(s, vcpu),
    expect: refused,
  }),
  scenario('14 before', 'a kernel before 6.11 does not know the call', {
    needs: [x86, before('6.11')],
    given: hostMemory(),
    when: (s, { vcpu }) => s.preFault(vcpu, 0, 1),
    expect: ['EINVAL', 0, 1, UNKNOWN],
  }),
  scenario(211, 'without TDP it is EOPNOTSUPP', {
    needs: [x86, noTdp],
    given: hostMemory(),
    when: (s, { vcpu }) => [s.preFault(vcpu, 0, 1), s.preFault(vcpu, 64, 1)],
    expect: [
      ['EOPNOTSUPP', 0, 1, UNKNOWN],
      ['EOPNOTSUPP', 64, 1, UNKNOWN],
    ],
  }),
  scenario(212, 'arm64 does not know the call', {
    needs: [arm64],
    given: hostMemory(),
    when: (s, { vcpu }) => s.preFault(vcpu, 0, 1),
    expect: ['EINVAL', 0, 1, UNKNOWN],
  }),
  scenario('14 whole', 'all pages of a slot, once and again', {
    needs: [tdp],
    given: hostMemory(),
    when: (s, { vcpu }) => [s.preFault(vcpu, 0, 4), s.preFault(vcpu, 0, 4)],
    expect: [
      [0, 4, 0, UNKNOWN],
      [0, 4, 0, UNKNOWN],
    ],
  }),
  scenario(214, 'a slot that ends within the range: the rest is left, and is ENOENT by itself', {
    needs: [tdp],
    given: hostMemory({ pages: 2 }),
    when: (s, { vcpu }) => [s.preFault(vcpu, 0, 4), s.preFault(vcpu, 2, 2)],
    expect: [
      [0, 2, 2, UNKNOWN],
      ['ENOENT', 2, 2, UNKNOWN],
    ],
  }),
  scenario(215, 'a range that starts in a hole is ENOENT and advances nothing', {
    needs: [tdp],
    given: hostMemory({ at: 2, pages: 2 }),
    when: (s, { vcpu }) => s.preFault(vcpu, 0, 4),
    expect: ['ENOENT', 0, 4, UNKNOWN],
  }),
  scenario(217, 'a read-only slot is mapped too', {
    needs: [tdp],
    given: hostMemory({ flags: KVM_MEM_READONLY }),
    when: (s, { vcpu }) => s.preFault(vcpu, 0, 1),
    expect: [0, 1, 0, UNKNOWN],
  }),
  scenario('14 hva', 'host memory that is not mapped: EFAULT, and kvm_run stays as it is', {
    needs: [tdp],
    given: hostMemory(),
    when: (s, { vcpu, memory }) => [s.munmap(memory), s.preFault(vcpu, 0, 1)],
    expect: [0, ['EFAULT', 0, 1, UNKNOWN]],
  }),
  scenario('14 gmem', 'pages of a file with MMAP are allocated', {
    needs: [tdp, mappable],
    given: boundFile(MMAP),
    when: (s, { vcpu, file }) => [s.preFault(vcpu, 1, 2), s.cached(file)],
    expect: [[0, 3, 0, UNKNOWN], 2],
  }),
  scenario(218, 'the file with MMAP is closed: EFAULT, and kvm_run says memory fault', {
    needs: [tdp, mappable],
    given: boundFile(MMAP),
    when: (s, { vcpu, file }) => [s.closeFd(file), s.preFault(vcpu, 1, 1), [...s.kernel.runPage(vcpu).slice(32, 40)]],
    expect: [0, ['EFAULT', 1, 1, MEMORY_FAULT], Array(8).fill(0)],
  }),
  scenario(
    '14 private',
    'a private page without a slot, without a file, or whose file is closed: EFAULT, memory fault',
    {
      needs: [tdp, swProtected],
      given: boundFile(0, 1),
      when: (s, { vm, vcpu, file }) => [
        s.setAttributes(vm, 0, 8 * s.P),
        s.slot(vm, { slot: 1, at: 4, hva: s.kernel.addressOf(s.anonymous(1)) }),
        s.preFault(vcpu, 5, 1),
        s.preFault(vcpu, 4, 1),
        s.closeFd(file),
        s.preFault(vcpu, 3, 1),
        [...s.kernel.runPage(vcpu).slice(32, 40)],
      ],
      expect: [
        0,
        0,
        ['EFAULT', 5, 1, MEMORY_FAULT],
        ['EFAULT', 4, 1, MEMORY_FAULT],
        0,
        ['EFAULT', 3, 1, MEMORY_FAULT],
        [8, 0, 0, 0, 0, 0, 0, 0],
      ],
    },
  ),
  scenario(220, 'a shared page, then a private one without a file: a success with a memory fault in kvm_run', {
    needs: [tdp, swProtected],
    given: hostMemory({ type: 1 }),
    when: (s, { vm, vcpu }) => [s.setAttributes(vm, s.P, s.P), s.preFault(vcpu, 0, 2)],
    expect: [0, [0, 1, 1, MEMORY_FAULT]],
  }),
  scenario(221, 'shared and private pages of a slot with a file', {
    needs: [tdp, swProtected],
    given: boundFile(0, 1),
    when: (s, { vm, vcpu, file }) => [s.setAttributes(vm, s.P, 2 * s.P), s.preFault(vcpu, 0, 4), s.cached(file)],
    expect: [0, [0, 4, 0, UNKNOWN], 2],
  }),
  scenario('14 content', 'what was mapped ahead is the memory the guest then reads', {
    needs: [tdp],
    given: (s) => {
      const [vm, memory] = [s.vm(), s.anonymous(4)];
      s.slot(vm, { pages: 4, hva: s.kernel.addressOf(memory) });
      return { memory, guest: s.guest(vm) };
    },
    when: (s, { memory, guest }) => [
      s.preFault(guest.vcpu, 1, 1),
      s.put(memory, 1, 7),
      guest.get(1),
      guest.put(1, 8),
      s.get(memory, 1),
    ],
    expect: [[0, 2, 0, IO], 1, 7, 0, 8],
  }),
]);
