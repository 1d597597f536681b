import { KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY } from '../../../lib/uapi.ts';
import {
  arm64,
  before,
  gmemOnDefaultVm,
  gmemSlots,
  mappable,
  noTdp,
  ordinaryHost,
  shareable,
  since,
  smm,
  swProtected,
  x86,
} from '../needs.ts';
import { type Expected, INIT_SHARED, MMAP, type Scenario, scenario, section, U64_END } from '../scenario.ts';

const LOG = KVM_MEM_LOG_DIRTY_PAGES;
const READONLY = KVM_MEM_READONLY;
const GUEST_MEMFD = KVM_MEM_GUEST_MEMFD;
/** Past the guest's physical limit everywhere, and what that is. */
const BEYOND = 1n << 52n;
const beyondLimit: Expected = { x86_64: 'EINVAL', aarch64: 'EFAULT' };
const bindingOverlap: Expected = { since: { '7.2': 'EEXIST' }, before: 'EINVAL' };
const CLOSED = 99999;

const emptyVm = (s: Scenario) => s.vm();
const top = (s: Scenario, pages: number) => U64_END - BigInt(pages * s.P);
const done = (result: number) => {
  if (result !== 0) throw new Error(`setup: a slot was refused with ${result}`);
};
/** Slot 0 without guest_memfd at pages [0, 4). */
const plainSlot = (s: Scenario) => {
  const vm = s.vm();
  done(s.slot(vm, { pages: 4 }));
  return vm;
};
const vmAndFile = (s: Scenario) => {
  const vm = s.gmemVm();
  return { vm, file: s.bindable(vm, 16) };
};
/** Slot 0 at pages [0, 4), bound to pages [0, 4) of a file of 16. */
const boundSlot = (s: Scenario) => {
  const world = vmAndFile(s);
  done(s.bind(world.vm, { pages: 4, file: world.file }));
  return world;
};
/** A slot of memory at pages [0, 4), and a file that is not bound. */
const slotAndFile = (s: Scenario) => {
  const world = vmAndFile(s);
  done(s.slot(world.vm, { pages: 4 }));
  return world;
};

export const slotArguments = section('Slots: argument validation', [
  scenario(106, 'V1 knows only LOG_DIRTY and READONLY', {
    given: emptyVm,
    when: (s, vm) => [4, 8, 1 << 16, 5, 1 << 31].map((flags) => s.slotV1(vm, { flags: flags >>> 0 })),
    expect: ['EINVAL', 'EINVAL', 'EINVAL', 'EINVAL', 'EINVAL'],
  }),
  scenario('106 legal', 'V1 takes LOG_DIRTY, READONLY and both', {
    given: emptyVm,
    when: (s, vm) => [0, LOG, READONLY, LOG | READONLY].map((flags, i) => s.slotV1(vm, { slot: i, at: i, flags })),
    expect: [0, 0, 0, 0],
  }),
  scenario(107, 'V2 rejects flags it does not know and those of the kernel itself', {
    given: emptyVm,
    when: (s, vm) => [8, 1 << 16, 1 << 17, 0x80000000].map((flags) => s.slot(vm, { flags })),
    expect: ['EINVAL', 'EINVAL', 'EINVAL', 'EINVAL'],
  }),
  scenario(108, 'x86: slot 32763 is the last one', {
    needs: [x86],
    given: emptyVm,
    when: (s, vm) => [s.slot(vm, { slot: 32763 }), s.slot(vm, { slot: 32764, at: 8 }), s.slot(vm, { slot: 65535 })],
    expect: [0, 'EINVAL', 'EINVAL'],
  }),
  scenario(109, 'arm64: slot 32766 is the last one', {
    needs: [arm64],
    given: emptyVm,
    when: (s, vm) => [s.slot(vm, { slot: 32766 }), s.slot(vm, { slot: 32767, at: 8 }), s.slot(vm, { slot: 65535 })],
    expect: [0, 'EINVAL', 'EINVAL'],
  }),
  scenario(110, 'a default VM with SMM has two address spaces', {
    needs: [smm],
    given: emptyVm,
    when: (s, vm) => [
      s.slot(vm, { slot: 0x10000 }),
      s.slot(vm, { slot: 0x20000 }),
      s.slot(vm, { slot: 0x10000 + 32764 }),
    ],
    expect: [0, 'EINVAL', 'EINVAL'],
  }),
  scenario('110 type 1', 'a SW_PROTECTED VM has one address space', {
    needs: [swProtected],
    given: (s) => s.vm(1),
    when: (s, vm) => [s.slot(vm, { slot: 0x10000 }), s.slot(vm)],
    expect: ['EINVAL', 0],
  }),
  scenario('110 arm64', 'arm64 has one address space', {
    needs: [arm64],
    given: emptyVm,
    when: (s, vm) => [s.slot(vm, { slot: 0x10000 }), s.slot(vm)],
    expect: ['EINVAL', 0],
  }),
  scenario(112, 'an unaligned size, guest address or host address is EINVAL', {
    given: emptyVm,
    when: (s, vm) => [
      s.slot(vm, { size: s.P + 1 }),
      s.slot(vm, { size: 1 }),
      s.slot(vm, { gpa: 1 }),
      s.slot(vm, { hva: 1 }),
      s.slotV1(vm, { gpa: s.P / 2 }),
    ],
    expect: ['EINVAL', 'EINVAL', 'EINVAL', 'EINVAL', 'EINVAL'],
  }),
  scenario(113, 'the host address need not be mapped, and may be 0', {
    given: emptyVm,
    when: (s, vm) => [s.slot(vm), s.slot(vm, { slot: 1, at: 1, hva: 0x123450000 }), s.slotV1(vm, { slot: 2, at: 2 })],
    expect: [0, 0, 0],
  }),
  scenario(114, 'a host address that is not the user’s is EINVAL', {
    given: emptyVm,
    when: (s, vm) => [
      s.slot(vm, { hva: 1n << 63n }),
      s.slot(vm, { hva: top(s, 1) }),
      s.slot(vm, { hva: top(s, 16), pages: 32 }),
      s.slot(vm, { hva: 1n << 56n }),
      s.slot(vm, { hva: (1n << 56n) - BigInt(s.P), pages: 4 }),
    ],
    expect: ['EINVAL', 'EINVAL', 'EINVAL', 'EINVAL', 'EINVAL'],
  }),
  scenario('10.1 row 7', 'x86: the last page below the 47-bit limit is the user’s', {
    needs: [x86],
    given: emptyVm,
    when: (s, vm) => s.slot(vm, { hva: 0x7fffffffe000 }),
    expect: 0,
  }),
  scenario('10.1 row 7 tag', 'a host address with a pointer tag is EINVAL', {
    given: emptyVm,
    when: (s, vm) => [s.slot(vm, { hva: (0x2an << 56n) | 0x10000n }), s.slot(vm, { hva: (1n << 62n) | 0x10000n })],
    expect: ['EINVAL', 'EINVAL'],
  }),
  scenario(115, 'the top page of the guest’s address space cannot be used', {
    given: emptyVm,
    when: (s, vm) => [s.slot(vm, { gpa: top(s, 1) }), s.slot(vm, { gpa: top(s, 1), pages: 2 })],
    expect: ['EINVAL', 'EINVAL'],
  }),
  scenario(116, '2^31 pages are too many', {
    given: emptyVm,
    when: (s, vm) => [s.slot(vm, { pages: 2 ** 31 }), s.slot(vm, { pages: 2 ** 32 })],
    expect: ['EINVAL', 'EINVAL'],
  }),
  scenario(117, 'a guest address past the physical limit is EINVAL on x86, EFAULT on arm64', {
    given: emptyVm,
    when: (s, vm) => [s.slot(vm, { gpa: BEYOND }), s.slot(vm), s.slot(vm, { gpa: BEYOND })],
    expect: [beyondLimit, 0, beyondLimit],
  }),
  scenario(118, 'x86 without TDP: 52 bits of guest address', {
    needs: [x86, noTdp],
    given: emptyVm,
    when: (s, vm) => [
      s.slot(vm, { gpa: (1n << 52n) - BigInt(s.P) }),
      s.slot(vm, { slot: 1, gpa: 1n << 52n }),
      s.slot(vm, { slot: 2, gpa: (1n << 52n) - BigInt(2 * s.P), pages: 2 }),
    ],
    expect: [0, 'EINVAL', 'EEXIST'],
  }),
  scenario(119, 'arm64: a slot ends within the VM’s IPA size', {
    needs: [arm64, ordinaryHost],
    given: (s) => s.vm(40),
    when: (s, vm) => [
      s.slot(vm, { gpa: 1n << 48n }),
      s.slot(vm, { gpa: 1n << 40n }),
      s.slot(vm, { gpa: (1n << 40n) - BigInt(s.P), pages: 2 }),
      s.slot(vm, { gpa: (1n << 40n) - BigInt(s.P) }),
    ],
    expect: ['EFAULT', 'EFAULT', 'EFAULT', 0],
  }),
  scenario('119 sizes', 'arm64: each VM has the limit it was created with, 40 bits by default', {
    needs: [arm64, ordinaryHost],
    when: (s) =>
      [32, 36, 0].map((type) => {
        const end = 1n << BigInt(type || 40);
        const vm = s.vm(type);
        return [s.slot(vm, { gpa: end }), s.slot(vm, { gpa: end - BigInt(s.P) })];
      }),
    expect: [
      ['EFAULT', 0],
      ['EFAULT', 0],
      ['EFAULT', 0],
    ],
  }),
  scenario(120, 'V1 and V2 see the same slots', {
    given: emptyVm,
    when: (s, vm) => [
      s.slotV1(vm, { pages: 4 }),
      s.slot(vm, { pages: 4 }),
      s.slot(vm, { slot: 1, at: 3 }),
      s.slotV1(vm, { slot: 1, at: 3 }),
      s.slotV1(vm, { size: 0 }),
      s.slot(vm, { slot: 1, at: 3 }),
    ],
    expect: [0, 0, 'EEXIST', 'EEXIST', 0, 0],
  }),
  scenario(121, 'without the GUEST_MEMFD flag, fd and offset are ignored', {
    given: emptyVm,
    when: (s, vm) => [s.slot(vm, { file: -1, offset: 1 }), s.slot(vm, { slot: 1, at: 1, file: CLOSED, offset: -1 })],
    expect: [0, 0],
  }),
]);

export const slotChanges = section('Slots: change kinds', [
  scenario(122, 'deleting a slot that is not there is EINVAL', {
    given: plainSlot,
    when: (s, vm) => [s.remove(vm, 5), s.slotV1(vm, { slot: 5, size: 0 }), s.remove(vm, 0), s.remove(vm, 0)],
    expect: ['EINVAL', 'EINVAL', 0, 'EINVAL'],
  }),
  scenario(123, 'the same request again is 0', {
    given: plainSlot,
    when: (s, vm) => [s.slot(vm, { pages: 4 }), s.slotV1(vm, { pages: 4 })],
    expect: [0, 0],
  }),
  scenario(124, 'size, host address and READONLY of a slot cannot change', {
    given: plainSlot,
    when: (s, vm) => [
      s.slot(vm, { pages: 5 }),
      s.slot(vm, { pages: 3 }),
      s.slot(vm, { pages: 4, hva: s.P }),
      s.slot(vm, { pages: 4, flags: READONLY }),
      s.slotV1(vm, { pages: 4, at: 100, flags: READONLY }),
      s.slot(vm, { pages: 4 }),
    ],
    expect: ['EINVAL', 'EINVAL', 'EINVAL', 'EINVAL', 'EINVAL', 0],
  }),
  scenario('124 read-only', 'a read-only slot cannot become writable', {
    given: emptyVm,
    when: (s, vm) => [s.slot(vm, { flags: READONLY }), s.slot(vm), s.slot(vm, { flags: READONLY })],
    expect: [0, 'EINVAL', 0],
  }),
  scenario(125, 'LOG_DIRTY can be added, repeated and dropped', {
    given: plainSlot,
    when: (s, vm) => [LOG, LOG, 0].map((flags) => s.slot(vm, { pages: 4, flags })),
    expect: [0, 0, 0],
  }),
  scenario(126, 'a slot can move, also onto its own old range, and leaves that free', {
    given: plainSlot,
    when: (s, vm) => [
      s.slot(vm, { pages: 4, at: 2 }),
      s.slot(vm, { slot: 1, pages: 2, at: 0 }),
      s.slot(vm, { slot: 2, at: 2 }),
      s.slot(vm, { pages: 4, at: 100 }),
      s.slot(vm, { slot: 2, at: 2 }),
    ],
    expect: [0, 0, 'EEXIST', 0, 0],
  }),
  scenario(127, 'neither a move nor a new slot may overlap another', {
    given: plainSlot,
    when: (s, vm) => [
      s.slot(vm, { slot: 1, at: 4, pages: 4 }),
      s.slot(vm, { pages: 4, at: 4 }),
      s.slot(vm, { pages: 4, at: 1 }),
      s.slot(vm, { slot: 2, at: 3, pages: 1 }),
      s.slot(vm, { slot: 2, at: 0, pages: 100 }),
      s.slot(vm, { slot: 2, at: 7, pages: 2 }),
    ],
    expect: [0, 'EEXIST', 'EEXIST', 'EEXIST', 'EEXIST', 'EEXIST'],
  }),
  scenario(128, 'slots may be adjacent', {
    given: plainSlot,
    when: (s, vm) => [s.slot(vm, { slot: 1, at: 4 }), s.slot(vm, { slot: 2, at: 5, pages: 7 })],
    expect: [0, 0],
  }),
  scenario(129, 'a refused move leaves the slot where it was', {
    given: plainSlot,
    when: (s, vm) => [
      s.slot(vm, { pages: 4, gpa: BEYOND }),
      s.slot(vm, { slot: 1, at: 3 }),
      s.slot(vm, { pages: 4 }),
      s.remove(vm, 0),
      s.slot(vm, { slot: 1, at: 3 }),
    ],
    expect: [beyondLimit, 'EEXIST', 0, 0, 0],
  }),
  scenario(130, 'a delete is validated like any request', {
    given: plainSlot,
    when: (s, vm) => [
      s.remove(vm, 0, { gpa: 1 }),
      s.remove(vm, 0, { hva: 1 }),
      s.remove(vm, 0, { hva: 1n << 63n }),
      s.remove(vm, 0, { flags: 8 }),
      s.remove(vm, 0, { flags: GUEST_MEMFD | LOG }),
      s.slotV1(vm, { size: 0, flags: GUEST_MEMFD }),
      s.slot(vm, { slot: 1, at: 3 }),
    ],
    expect: ['EINVAL', 'EINVAL', 'EINVAL', 'EINVAL', 'EINVAL', 'EINVAL', 'EEXIST'],
  }),
  scenario(131, 'the flags of a delete need not match', {
    given: (s) => {
      const vm = plainSlot(s);
      done(s.slot(vm, { slot: 1, at: 8 }));
      return vm;
    },
    when: (s, vm) => [s.remove(vm, 0, { flags: READONLY }), s.remove(vm, 1, { flags: LOG })],
    expect: [0, 0],
  }),
  scenario(132, 'a delete ignores guest and host address', {
    given: plainSlot,
    when: (s, vm) => [
      s.remove(vm, 0, { gpa: BEYOND, hva: 16 * s.P }),
      s.slot(vm, { slot: 1 }),
      s.remove(vm, 1, { gpa: top(s, 1) }),
    ],
    expect: [0, 0, 0],
  }),
  scenario(133, 'each address space has a map of its own', {
    needs: [smm],
    given: plainSlot,
    when: (s, vm) => [
      s.slot(vm, { slot: 0x10000, pages: 4 }),
      s.slot(vm, { slot: 0x10001, at: 3 }),
      s.remove(vm, 0),
      s.slot(vm, { slot: 0x10001, at: 3 }),
      s.slot(vm, { slot: 1, at: 3 }),
      s.remove(vm, 0x10000),
    ],
    expect: [0, 'EEXIST', 0, 'EEXIST', 0, 0],
  }),
  scenario('10.2 shared memory', 'two slots may share their host address', {
    given: emptyVm,
    when: (s, vm) => {
      const hva = s.kernel.addressOf(s.anonymous(4));
      return [s.slot(vm, { pages: 4, hva }), s.slot(vm, { slot: 1, at: 4, pages: 4, hva })];
    },
    expect: [0, 0],
  }),
  scenario('10.1 row 9 delete', 'a delete looks in the address space it names', {
    needs: [smm],
    given: plainSlot,
    when: (s, vm) => [s.remove(vm, 0x10000), s.remove(vm, 0x20000), s.remove(vm, 0)],
    expect: ['EINVAL', 'EINVAL', 0],
  }),
  scenario('10.1 row 14 first', 'a change that cannot be is EINVAL before the overlap is seen', {
    given: (s) => {
      const vm = plainSlot(s);
      done(s.slot(vm, { slot: 1, at: 8, pages: 4 }));
      return vm;
    },
    when: (s, vm) => [
      s.slot(vm, { pages: 9 }),
      s.slot(vm, { pages: 4, at: 8, hva: s.P }),
      s.slot(vm, { pages: 4, at: 8, flags: READONLY }),
      s.slot(vm, { pages: 4, at: 8 }),
    ],
    expect: ['EINVAL', 'EINVAL', 'EINVAL', 'EEXIST'],
  }),
  scenario('10.1 rows before 16', 'a bad argument is EINVAL before the overlap is seen', {
    given: plainSlot,
    when: (s, vm) => [
      s.slot(vm, { slot: 1, flags: 8 }),
      s.slot(vm, { slot: 40000 }),
      s.slot(vm, { slot: 1, size: 1 }),
      s.slot(vm, { slot: 1, hva: 1 }),
      s.slot(vm, { slot: 1, hva: 1n << 63n }),
      s.slot(vm, { slot: 0x20001 }),
      s.slot(vm, { slot: 1, pages: 2 ** 31 }),
      s.slot(vm, { slot: 1 }),
    ],
    expect: [...Array(7).fill('EINVAL'), 'EEXIST'],
  }),
  scenario('10.1 row 16 first', 'the overlap is seen before the physical limit', {
    given: (s) => {
      const vm = s.vm();
      done(s.slot(vm, { at: 0x1000, pages: 4 }));
      return vm;
    },
    when: (s, vm) => s.slot(vm, { slot: 1, at: 0x1000, pages: 2 ** 31 - 1 }),
    expect: 'EEXIST',
  }),
]);

export const gmemSlotCases = section('Slots: guest_memfd', [
  scenario('10.3 bind', 'a file can be bound: whole, in parts, adjacent, at any offset', {
    needs: [gmemSlots],
    given: vmAndFile,
    when: (s, { vm, file }) => [
      s.bind(vm, { pages: 4, file }),
      s.bind(vm, { slot: 1, at: 101, pages: 4, file, from: 4 }),
      s.bind(vm, { slot: 2, at: 50, pages: 7, file, from: 9 }),
      s.bind(vm, { slot: 3, at: 7, pages: 1, file, from: 8 }),
    ],
    expect: [0, 0, 0, 0],
  }),
  scenario(134, 'GUEST_MEMFD goes neither with LOG_DIRTY nor with READONLY', {
    needs: [gmemSlots],
    given: vmAndFile,
    when: (s, { vm, file }) => [LOG, READONLY, LOG | READONLY].map((flags) => s.bind(vm, { file, flags })),
    expect: ['EINVAL', 'EINVAL', 'EINVAL'],
  }),
  scenario(135, 'an fd that is not open is EBADF', {
    needs: [gmemSlots],
    given: vmAndFile,
    when: (s, { vm, file }) => [
      s.bind(vm, { file: -1 }),
      s.bind(vm, { file: CLOSED }),
      s.closeFd(file),
      s.bind(vm, { file }),
    ],
    expect: ['EBADF', 'EBADF', 0, 'EBADF'],
  }),
  scenario(136, 'an fd that is no guest_memfd is EINVAL', {
    needs: [gmemSlots],
    given: (s) => ({ vm: s.gmemVm(), memfd: s.memfd(16) }),
    when: (s, { vm, memfd }) => [s.kvm, vm, memfd].map((file) => s.bind(vm, { file })),
    expect: ['EINVAL', 'EINVAL', 'EINVAL'],
  }),
  scenario(137, 'a guest_memfd of another VM is EINVAL', {
    needs: [gmemSlots],
    given: (s) => ({ a: vmAndFile(s), b: vmAndFile(s) }),
    when: (s, { a, b }) => [s.bind(a.vm, { file: b.file }), s.bind(b.vm, { file: b.file })],
    expect: ['EINVAL', 0],
  }),
  scenario(138, 'an unaligned offset is EINVAL, before the fd is looked at', {
    needs: [gmemSlots],
    given: vmAndFile,
    when: (s, { vm, file }) => [
      s.bind(vm, { file, offset: 1 }),
      s.bind(vm, { file: -1, offset: 1 }),
      s.bind(vm, { file: s.kvm, offset: s.P / 2 }),
    ],
    expect: ['EINVAL', 'EINVAL', 'EINVAL'],
  }),
  scenario(139, 'an offset that wraps is EINVAL, before the fd is looked at', {
    needs: [gmemSlots],
    given: vmAndFile,
    when: (s, { vm, file }) => [
      s.bind(vm, { file: -1, offset: top(s, 1), pages: 2 }),
      s.bind(vm, { file, offset: top(s, 1), pages: 2 }),
    ],
    expect: ['EINVAL', 'EINVAL'],
  }),
  scenario(140, 'a range past the end of the file is EINVAL', {
    needs: [gmemSlots],
    given: vmAndFile,
    when: (s, { vm, file }) => [
      s.bind(vm, { file, offset: 1n << 63n }),
      s.bind(vm, { file, from: 16 }),
      s.bind(vm, { file, pages: 17 }),
      s.bind(vm, { file, from: 1, pages: 16 }),
      s.bind(vm, { file, from: 15, pages: 2 }),
      s.bind(vm, { file, pages: 16 }),
    ],
    expect: ['EINVAL', 'EINVAL', 'EINVAL', 'EINVAL', 'EINVAL', 0],
  }),
  scenario(141, 'an offset of 2^63 less a page is EINVAL, though kernels before 7.2 accept it', {
    needs: [gmemSlots],
    given: vmAndFile,
    when: (s, { vm, file }) => [
      s.bind(vm, { file, offset: (1n << 63n) - BigInt(s.P), pages: 4 }),
      s.bind(vm, { file, offset: (1n << 63n) - BigInt(s.P), pages: 1 }),
      s.bind(vm, { file, offset: (1n << 63n) - BigInt(16 * s.P), pages: 1 }),
    ],
    expect: ['EINVAL', 'EINVAL', 'EINVAL'],
  }),
  scenario(142, 'the same on the file of 4 pages: the boundary refuses what 7.1 takes by mistake', {
    needs: [gmemSlots],
    given: (s) => {
      const vm = s.gmemVm();
      return { vm, file: s.bindable(vm, 4) };
    },
    when: (s, { vm, file }) => s.bind(vm, { file, offset: (1n << 63n) - BigInt(s.P), pages: 4 }),
    expect: 'EINVAL',
  }),
  scenario('142 order', 'such an offset is refused in its place: after an overlapping slot and a bad fd', {
    needs: [gmemSlots],
    given: slotAndFile,
    when: (s, { vm, file }) => {
      const far = { slot: 1, offset: (1n << 63n) - BigInt(s.P), pages: 2 };
      return [
        s.bind(vm, { ...far, at: 3, file }),
        s.bind(vm, { ...far, at: 8, file: -1 }),
        s.bind(vm, { ...far, at: 8, file: s.kvm }),
        s.bind(vm, { ...far, gpa: BEYOND, file }),
        s.bind(vm, { ...far, at: 8, file, flags: LOG }),
        s.bind(vm, { ...far, at: 8, file, size: 1 }),
      ];
    },
    expect: ['EEXIST', 'EBADF', 'EINVAL', 'EINVAL', 'EINVAL', 'EINVAL'],
  }),
  scenario(143, 'the same request again is EINVAL', {
    needs: [gmemSlots],
    given: boundSlot,
    when: (s, { vm, file }) => s.bind(vm, { pages: 4, file }),
    expect: 'EINVAL',
  }),
  scenario(144, 'GUEST_MEMFD cannot be dropped: the boundary refuses what kernels before 6.19 take by mistake', {
    needs: [gmemSlots],
    given: boundSlot,
    when: (s, { vm }) => [s.slot(vm, { pages: 4 }), s.slotV1(vm, { pages: 4 }), s.slot(vm, { pages: 4, flags: LOG })],
    expect: ['EINVAL', 'EINVAL', 'EINVAL'],
  }),
  scenario('144 added', 'GUEST_MEMFD cannot be added to a slot, with a good fd or a bad one', {
    needs: [gmemSlots],
    given: slotAndFile,
    when: (s, { vm, file }) => [
      s.bind(vm, { pages: 4, file }),
      s.bind(vm, { pages: 4, file: -1 }),
      s.bind(vm, { pages: 4, at: 100, file }),
      s.slot(vm, { pages: 4 }),
    ],
    expect: ['EINVAL', 'EINVAL', 'EINVAL', 0],
  }),
  scenario(145, 'a slot with a guest_memfd cannot move, with the flag or without', {
    needs: [gmemSlots],
    given: boundSlot,
    when: (s, { vm, file }) => [s.bind(vm, { pages: 4, at: 100, file }), s.slot(vm, { pages: 4, at: 100 })],
    expect: ['EINVAL', 'EINVAL'],
  }),
  scenario(146, 'V1 deletes a slot with a guest_memfd, and its range is free again', {
    needs: [gmemSlots],
    given: boundSlot,
    when: (s, { vm, file }) => [s.slotV1(vm, { size: 0 }), s.bind(vm, { slot: 1, pages: 4, file })],
    expect: [0, 0],
  }),
  scenario(147, 'a delete does not look at the fd', {
    needs: [gmemSlots],
    given: boundSlot,
    when: (s, { vm, file }) => [
      s.remove(vm, 0, { flags: GUEST_MEMFD, file: -1 }),
      s.bind(vm, { pages: 4, file }),
      s.remove(vm, 0, { flags: GUEST_MEMFD, file: CLOSED, from: 1000 }),
      s.bind(vm, { pages: 4, file }),
      s.remove(vm, 0, { file: s.kvm }),
    ],
    expect: [0, 0, 0, 0, 0],
  }),
  scenario('147 absent', 'deleting a slot that is not there is EINVAL, with the flag and any fd', {
    needs: [gmemSlots],
    given: vmAndFile,
    when: (s, { vm, file }) => [
      s.remove(vm, 0, { flags: GUEST_MEMFD, file }),
      s.remove(vm, 0, { flags: GUEST_MEMFD, file: -1 }),
    ],
    expect: ['EINVAL', 'EINVAL'],
  }),
  scenario('147 offset', 'a delete with the flag still needs an aligned offset', {
    needs: [gmemSlots],
    given: boundSlot,
    when: (s, { vm }) => [
      s.remove(vm, 0, { flags: GUEST_MEMFD, offset: 1 }),
      s.remove(vm, 0, { offset: 1 }),
      s.remove(vm, 0),
    ],
    expect: ['EINVAL', 0, 'EINVAL'],
  }),
  scenario(148, 'two slots may not bind the same bytes of a file', {
    needs: [gmemSlots, since('7.2')],
    given: boundSlot,
    when: (s, { vm, file }) => s.bind(vm, { slot: 1, at: 100, pages: 4, file, from: 3 }),
    expect: 'EEXIST',
  }),
  scenario(149, 'before 7.2 the refusal to bind the same bytes twice is EINVAL', {
    needs: [gmemSlots, before('7.2')],
    given: boundSlot,
    when: (s, { vm, file }) => s.bind(vm, { slot: 1, at: 100, pages: 4, file, from: 3 }),
    expect: 'EINVAL',
  }),
  scenario(150, 'bytes beside a binding can be bound, those of a binding cannot, however they overlap', {
    needs: [gmemSlots],
    given: (s) => {
      const world = vmAndFile(s);
      done(s.bind(world.vm, { pages: 4, file: world.file, from: 4 }));
      return world;
    },
    when: (s, { vm, file }) => [
      s.bind(vm, { slot: 1, at: 100, file, pages: 16 }),
      s.bind(vm, { slot: 1, at: 100, file, from: 5 }),
      s.bind(vm, { slot: 1, at: 100, file, from: 4, pages: 4 }),
      s.bind(vm, { slot: 1, at: 100, file, from: 7, pages: 2 }),
      s.bind(vm, { slot: 1, at: 100, file, from: 7, pages: 10 }),
      s.bind(vm, { slot: 1, at: 100, file, from: 0, pages: 4 }),
      s.bind(vm, { slot: 2, at: 200, file, from: 8, pages: 8 }),
    ],
    expect: [bindingOverlap, bindingOverlap, bindingOverlap, bindingOverlap, 'EINVAL', 0, 0],
  }),
  scenario(151, 'a dup is the same file: what one binds the other cannot', {
    needs: [gmemSlots],
    given: boundSlot,
    when: (s, { vm, file }) => {
      const copy = s.dup(file);
      return [
        s.bind(vm, { slot: 1, at: 100, pages: 4, file: copy }),
        s.bind(vm, { slot: 1, at: 100, pages: 4, file: copy, from: 4 }),
        s.bind(vm, { slot: 2, at: 200, pages: 4, file, from: 7 }),
      ];
    },
    expect: [bindingOverlap, 0, bindingOverlap],
  }),
  scenario(152, 'an overlapping slot is EEXIST, before a bad fd', {
    needs: [gmemSlots],
    given: slotAndFile,
    when: (s, { vm }) => s.bind(vm, { slot: 1, at: 3, pages: 4, file: -1 }),
    expect: 'EEXIST',
  }),
  scenario(153, 'an overlapping slot is EEXIST, before a file that is not one or a range past its end', {
    needs: [gmemSlots],
    given: slotAndFile,
    when: (s, { vm, file }) => [
      s.bind(vm, { slot: 1, at: 3, pages: 4, file: s.kvm }),
      s.bind(vm, { slot: 1, at: 3, pages: 4, file: vm }),
      s.bind(vm, { slot: 1, at: 3, pages: 4, file, from: 100 }),
      s.bind(vm, { slot: 1, at: 3, pages: 4, file, offset: 1n << 40n }),
    ],
    expect: ['EEXIST', 'EEXIST', 'EEXIST', 'EEXIST'],
  }),
  scenario('153 binding', 'an overlapping slot is EEXIST, before overlapping bytes of the file', {
    needs: [gmemSlots],
    given: boundSlot,
    when: (s, { vm, file }) => s.bind(vm, { slot: 1, at: 3, pages: 4, file, from: 3 }),
    expect: 'EEXIST',
  }),
  scenario(154, 'an unaligned offset is EINVAL, before the overlapping slot', {
    needs: [gmemSlots],
    given: slotAndFile,
    when: (s, { vm, file }) => s.bind(vm, { slot: 1, at: 3, pages: 4, file, offset: 1 }),
    expect: 'EINVAL',
  }),
  scenario(155, 'the physical limit comes before overlapping bytes of the file', {
    needs: [gmemSlots, since('7.2')],
    given: boundSlot,
    when: (s, { vm, file }) => s.bind(vm, { slot: 1, gpa: BEYOND, pages: 4, file, from: 3 }),
    expect: beyondLimit,
  }),
  scenario('155 before 7.2', 'before 7.2 overlapping bytes of the file come before the physical limit', {
    needs: [gmemSlots, before('7.2')],
    given: boundSlot,
    when: (s, { vm, file }) => s.bind(vm, { slot: 1, gpa: BEYOND, pages: 4, file, from: 3 }),
    expect: 'EINVAL',
  }),
  scenario('10.1 rows 17 18 20', 'the fd and its range come before the physical limit', {
    needs: [gmemSlots],
    given: vmAndFile,
    when: (s, { vm, file }) => [
      s.bind(vm, { gpa: BEYOND, file: -1 }),
      s.bind(vm, { gpa: BEYOND, file: s.kvm }),
      s.bind(vm, { gpa: BEYOND, file, from: 16 }),
      s.bind(vm, { gpa: BEYOND, file }),
      s.bind(vm, { file }),
    ],
    expect: ['EBADF', 'EINVAL', 'EINVAL', beyondLimit, 0],
  }),
  scenario(156, 'a slot that exists is EINVAL, before a bad fd', {
    needs: [gmemSlots],
    given: boundSlot,
    when: (s, { vm }) => [s.bind(vm, { pages: 4, file: -1 }), s.bind(vm, { pages: 5, at: 9, file: s.kvm })],
    expect: ['EINVAL', 'EINVAL'],
  }),
  scenario(157, 'a range can be bound again at another address, and keeps its content', {
    needs: [shareable],
    given: (s) => {
      const vm = s.vm();
      const file = s.gmem(vm, 16, MMAP | INIT_SHARED);
      const mapping = s.map(file);
      s.put(mapping, 3, 7);
      done(s.bind(vm, { pages: 4, file }));
      return { vm, file, mapping };
    },
    when: (s, { vm, file, mapping }) => [
      s.remove(vm, 0),
      s.bind(vm, { slot: 9, at: 1000, pages: 4, file }),
      s.get(mapping, 3),
    ],
    expect: [0, 0, 7],
  }),
  scenario('157 allocated', 'deleting a slot frees nothing of the file', {
    needs: [gmemSlots],
    given: boundSlot,
    when: (s, { vm, file }) => [
      s.fallocate(file, 1, 0, 4),
      s.remove(vm, 0),
      s.cached(file),
      s.bind(vm, { slot: 1, at: 100, pages: 4, file }),
      s.cached(file),
    ],
    expect: [0, 0, 4, 0, 4],
  }),
  scenario('157 punched', 'punching changes neither slot nor binding', {
    needs: [gmemSlots],
    given: boundSlot,
    when: (s, { vm, file }) => [
      s.fallocate(file, 3, 0, 16),
      s.bind(vm, { slot: 1, at: 100, pages: 4, file, from: 3 }),
      s.slot(vm, { slot: 1, at: 3 }),
    ],
    expect: [0, bindingOverlap, 'EEXIST'],
  }),
  scenario('157 rollback', 'a refused binding leaves its range free', {
    needs: [gmemSlots],
    given: vmAndFile,
    when: (s, { vm, file }) => [
      s.bind(vm, { gpa: BEYOND, pages: 4, file }),
      s.bind(vm, { slot: 1, pages: 4, file }),
      s.remove(vm, 0),
    ],
    expect: [beyondLimit, 0, 'EINVAL'],
  }),
  scenario(158, 'arm64: only a file with MMAP can be bound', {
    needs: [arm64, mappable],
    given: emptyVm,
    when: (s, vm) => [
      s.bind(vm, { file: s.gmem(vm, 4, 0) }),
      s.bind(vm, { file: s.gmem(vm, 4, INIT_SHARED) }),
      s.bind(vm, { file: s.gmem(vm, 4, MMAP) }),
      s.bind(vm, { slot: 1, at: 8, file: s.gmem(vm, 4, MMAP | INIT_SHARED) }),
    ],
    expect: ['EINVAL', 'EINVAL', 0, 0],
  }),
  scenario('10.6 order', 'arm64: the IPA size comes before the missing MMAP', {
    needs: [arm64, mappable],
    given: emptyVm,
    when: (s, vm) => s.bind(vm, { gpa: BEYOND, file: s.gmem(vm, 4, 0) }),
    expect: 'EFAULT',
  }),
  scenario(159, 'x86: a default VM binds a file with any flags', {
    needs: [x86, gmemOnDefaultVm],
    given: emptyVm,
    when: (s, vm) => [0, 1, 2, 3].map((flags) => s.bind(vm, { slot: flags, at: flags, file: s.gmem(vm, 4, flags) })),
    expect: [0, 0, 0, 0],
  }),
  scenario('159 type 1', 'a SW_PROTECTED VM binds a file with MMAP or without', {
    needs: [swProtected, mappable],
    given: (s) => s.vm(1),
    when: (s, vm) => [0, 1].map((flags) => s.bind(vm, { slot: flags, at: flags, file: s.gmem(vm, 4, flags) })),
    expect: [0, 0],
  }),
  scenario(160, 'before 6.18 a default VM has no slots with a guest_memfd', {
    needs: [x86, before('6.18')],
    given: (s) => {
      const vm = s.vm();
      return { vm, file: s.gmem(vm, 4) };
    },
    when: (s, { vm, file }) => [s.bind(vm, { file }), s.bind(vm, { file: -1 }), s.slot(vm)],
    expect: ['EINVAL', 'EINVAL', 0],
  }),
  scenario('10.4', 'address spaces have maps of their own, the bytes of a file are bound once', {
    needs: [smm, gmemOnDefaultVm],
    given: (s) => {
      const vm = s.vm();
      const file = s.gmem(vm, 16);
      done(s.bind(vm, { pages: 4, file }));
      return { vm, file };
    },
    when: (s, { vm, file }) => [
      s.bind(vm, { slot: 0x10000, pages: 4, file }),
      s.bind(vm, { slot: 0x10000, pages: 4, file, from: 4 }),
      s.remove(vm, 0),
      s.bind(vm, { slot: 0x10001, at: 100, pages: 4, file }),
    ],
    expect: [bindingOverlap, 0, 0, 0],
  }),
  scenario('10.3 many slots', 'a file may have many slots', {
    needs: [gmemSlots],
    given: (s) => {
      const vm = s.gmemVm();
      return { vm, file: s.bindable(vm, 64) };
    },
    when: (s, { vm, file }) => [
      ...new Set(Array.from({ length: 64 }, (_, i) => s.bind(vm, { slot: i, at: 2 * i, file, from: 63 - i }))),
      s.bind(vm, { slot: 64, at: 200, file, from: 31 }),
      s.remove(vm, 32),
      s.bind(vm, { slot: 64, at: 200, file, from: 31 }),
    ],
    expect: [0, bindingOverlap, 0, 0],
  }),
]);
