import { KVM_CAP } from '../../../lib/uapi.ts';
import { codePage, hypercallCode } from '../guest.ts';
import { arm64, machineCode, ordinaryHost, since, swProtected, tdp } from '../needs.ts';
import { type Expected, type Scenario, scenario, section } from '../scenario.ts';

const MAP_GPA_RANGE = 12n;
const ENCRYPTED = 0x10n;
const [EINVAL, ENOSYS] = [-22n, -1000n];
const MEM_SHARE = 0xc600_0003n;

/** A guest whose MAP_GPA_RANGE leaves it. Without TDP a hypercall may never come back, so every case here needs it. */
const enabled =
  (type = 0) =>
  (s: Scenario) => {
    const vm = s.vm(type);
    if (s.enable(vm, KVM_CAP.EXIT_HYPERCALL, 0x1000) !== 0) throw new Error('setup: no EXIT_HYPERCALL');
    return s.guest(vm);
  };
const exit = (...args: readonly bigint[]): Expected => ['hypercall', MAP_GPA_RANGE, ...args];

/** Words of kvm_run's union: nr, args[0..5], ret, flags. */
const [ARGS, RET, FLAGS] = [1, 7, 8];

export const hypercalls = section('MAP_GPA_RANGE', [
  scenario('15 disabled', 'not enabled: the guest gets ENOSYS', {
    needs: [tdp],
    given: (s) => s.guest(s.vm()),
    when: (_, guest) => guest.hypercall(MAP_GPA_RANGE, 0x100000n, 4n, ENCRYPTED),
    expect: ENOSYS,
  }),
  scenario(226, 'enabled: an exit with the arguments as given, and nothing written behind the third', {
    needs: [tdp],
    given: enabled(),
    when: (_, guest) => {
      for (const index of [3, 4, 5]) guest.setWord(ARGS + index, 0x55n);
      const asked = guest.hypercall(MAP_GPA_RANGE, 0x100000n, 4n, ENCRYPTED);
      return [asked, guest.word(ARGS + 3), guest.word(ARGS + 4), guest.word(ARGS + 5)];
    },
    expect: [exit(0x100000n, 4n, ENCRYPTED), 0x55, 0x55, 0x55],
  }),
  scenario('226 ret', 'the answer is preset to 0', {
    needs: [tdp, since('6.18')],
    given: enabled(),
    when: (_, guest) => {
      guest.setWord(RET, 5n);
      const asked = guest.hypercall(MAP_GPA_RANGE, 0x100000n, 4n, ENCRYPTED);
      return [asked, guest.word(RET), guest.again()];
    },
    expect: [exit(0x100000n, 4n, ENCRYPTED), 0, 0],
  }),
  scenario(227, 'the guest gets what the host answers, and goes on', {
    needs: [tdp],
    given: enabled(),
    when: (_, guest) => {
      const asked = guest.hypercall(MAP_GPA_RANGE, 0x100000n, 4n, 0n);
      guest.reply(5n);
      return [asked, guest.again(), guest.hypercall(MAP_GPA_RANGE, 0x1000n, 1n, 0n)];
    },
    expect: [exit(0x100000n, 4n, 0n), 5, exit(0x1000n, 1n, 0n)],
  }),
  scenario('15 refused', 'a negative errno is passed on as it is', {
    needs: [tdp],
    given: enabled(),
    when: (_, guest) => {
      guest.hypercall(MAP_GPA_RANGE, 0x100000n, 4n, 0n);
      guest.reply(EINVAL);
      return guest.again();
    },
    expect: EINVAL,
  }),
  scenario('15 immediate_exit', 'immediate_exit completes the hypercall and ends the run', {
    needs: [tdp],
    given: enabled(),
    when: (_, guest) => {
      guest.hypercall(MAP_GPA_RANGE, 0x100000n, 4n, 0n);
      guest.reply(5n);
      guest.immediateExit = true;
      const stopped = guest.again();
      guest.immediateExit = false;
      guest.reply(6n);
      return [stopped, guest.again()];
    },
    expect: [['EINTR', 3], 5],
  }),
  scenario('15 arguments', 'an unaligned address, no pages: the guest gets EINVAL', {
    needs: [tdp],
    given: enabled(),
    when: (_, guest) => [
      guest.hypercall(MAP_GPA_RANGE, 0x100001n, 4n, 0n),
      guest.hypercall(MAP_GPA_RANGE, 0x100800n, 4n, 0n),
      guest.hypercall(MAP_GPA_RANGE, 0x100000n, 0n, 0n),
    ],
    expect: [EINVAL, EINVAL, EINVAL],
  }),
  scenario(229, 'a range that wraps is EINVAL; one that is merely absurd is passed on', {
    needs: [tdp],
    given: enabled(),
    when: (_, guest) => [
      guest.hypercall(MAP_GPA_RANGE, 0x1000n, 2n ** 64n - 1n, 0n),
      guest.hypercall(MAP_GPA_RANGE, 0x1000n, 1n << 62n, 0n),
      guest.hypercall(MAP_GPA_RANGE, 0x1000n, 0xffff_ffffn, 0xffn),
    ],
    expect: [EINVAL, exit(0x1000n, 1n << 62n, 0n), exit(0x1000n, 0xffff_ffffn, 0xffn)],
  }),
  scenario('15 number', 'the number has 64 bits, and others are ENOSYS', {
    needs: [tdp],
    given: enabled(),
    when: (_, guest) => [
      guest.hypercall(0x1_0000_000cn, 0x1000n, 1n, 0n),
      guest.hypercall(999n, 0x1000n, 1n, 0n),
      guest.hypercall(MAP_GPA_RANGE, 0x1000n, 1n, 0n),
    ],
    expect: [ENOSYS, ENOSYS, exit(0x1000n, 1n, 0n)],
  }),
  scenario('15 type 1', 'a VM with private memory exits alike, and KVM converts nothing by itself', {
    needs: [tdp, swProtected],
    given: enabled(1),
    when: (s, guest) => [guest.hypercall(MAP_GPA_RANGE, 0n, 4n, ENCRYPTED), guest.again(), s.privateRanges(guest.vm)],
    expect: [exit(0n, 4n, ENCRYPTED), 0, []],
  }),
  scenario('230 64 bits', 'a guest in 64-bit mode: flags 1, and the answer has 64 bits', {
    needs: [tdp],
    given: enabled(),
    when: (_, guest) => {
      guest.hypercall(MAP_GPA_RANGE, 0x1000n, 1n, 0n);
      guest.reply(0x1_0000_0005n);
      return [guest.word(FLAGS), guest.again()];
    },
    expect: [1, 0x1_0000_0005n],
  }),
  scenario(230, 'a guest in 32-bit mode: flags 0, and the answer is cut to 32 bits', {
    needs: [machineCode, tdp],
    given: (s) => {
      const vm = s.vm();
      s.enable(vm, KVM_CAP.EXIT_HYPERCALL, 0x1000);
      // …; hlt
      return s.guest(vm, [...hypercallCode(s), 0xf4]);
    },
    when: (s, guest) => {
      const mode = { 'cs.l': 0n, 'cs.db': 1n, cr0: 0x11n, cr4: 0n, efer: 0n, rip: BigInt(codePage(s) * s.P) };
      const asked = guest.execute({ ...mode, rax: MAP_GPA_RANGE, rbx: 0x1000n, rcx: 1n, rdx: 0n });
      guest.reply(0x1_0000_0005n);
      return [asked, guest.word(FLAGS), guest.again(), guest.register('rax')];
    },
    expect: [exit(0x1000n, 1n, 0n), 0, ['exit', 5], 5],
  }),
  scenario('17.1 ordinary VM', 'arm64: an ordinary VM has no hypercall that shares memory', {
    needs: [arm64, ordinaryHost],
    given: (s) => s.guest(s.vm()),
    when: (_, guest) => guest.hypercall(MEM_SHARE, 0x1000n),
    expect: -1,
  }),
]);
