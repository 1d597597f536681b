// Runs of a vCPU as a program sees them: guests that go wrong, and what an exit costs.
import t from 'tap';
import { type Exit, MiB, type Vcpu } from '../lib/index.ts';
import { backends, codeBackends, errorOf, everywhere, type World } from './backends.ts';
import { child } from './lifecycle/child_process.ts';
import { onSoftware } from './pace.ts';

const ENTRY = 0x1000;
const withCode = codeBackends.filter(({ isArm }) => !isArm);

/** A guest in real mode. */
function guest({ vm, kvm }: World, code: readonly number[], registers: Readonly<Record<string, bigint>> = {}): Vcpu {
  vm.createMemslot({ address: 0, size: MiB, hostMemory: kvm.createHostMemory({ size: MiB }) });
  vm.memory.write(ENTRY, Uint8Array.from(code));
  const vcpu = vm.createVcpu();
  vcpu.setRegisters({ rip: BigInt(ENTRY), rflags: 2n, 'cs.base': 0n, 'cs.selector': 0n, ...registers });
  return vcpu;
}

interface BadGuest {
  readonly code: readonly number[];
  readonly registers?: Readonly<Record<string, bigint>>;
  /** Which of them it is depends on who carries the code out: a CPU, KVM's emulator, or libunicorn. */
  readonly ends: readonly Exit['reason'][];
}

const bad: Readonly<Record<string, BadGuest>> = {
  // int3 without an interrupt table
  'a triple fault': { code: [0xcc], registers: { 'idt.limit': 0n }, ends: ['shutdown', 'timeout'] },
  // jmp ffff:fff0
  'a jump to where no memory is': {
    code: [0xea, 0xf0, 0xff, 0xff, 0xff],
    ends: ['internal-error', 'mmio', 'shutdown'],
  },
  'an invalid instruction': { code: [0x0f, 0x0b], ends: ['shutdown', 'timeout', 'internal-error'] },
  garbage: {
    code: Array.from({ length: 64 }, (_, index) => (index * 167 + 13) & 0xff),
    ends: ['io', 'mmio', 'hlt', 'shutdown', 'timeout', 'internal-error'],
  },
  'an endless loop': { code: [0xeb, 0xfe], ends: ['timeout'] },
  // cli; hlt
  'a guest that sleeps for ever': { code: [0xfa, 0xf4], ends: ['hlt'] },
};

t.test('a bad guest ends as an exit', async (t) => {
  for (const [what, { code, registers, ends }] of Object.entries(bad)) {
    await everywhere(
      t,
      what,
      (t, world) => {
        const vcpu = guest(world, code, registers);
        const { reason } = vcpu.run({ timeout: 300 });
        t.ok(ends.includes(reason), `${reason} is one of ${ends.join(', ')}`);
        t.ok(vcpu.run({ timeout: 0 }).reason, 'and the vCPU can be asked again');
      },
      withCode,
    );
  }
  await everywhere(
    t,
    'a storm of port I/O',
    (t, world) => {
      // out 0x80, al; jmp back
      const vcpu = guest(world, [0xe6, 0x80, 0xeb, 0xfc]);
      const end = performance.now() + 200;
      let exits = 0;
      for (let exit = vcpu.run(); performance.now() < end; exit = vcpu.run(), exits++)
        if (exit.reason !== 'io') t.fail(exit.reason);
      vcpu.kick();
      t.same(vcpu.run(), { reason: 'interrupted' }, `a kick gets through after ${exits} exits`);
    },
    withCode,
  );
});

t.test('a loop of port I/O allocates nothing', async (t) => {
  // A process of its own, as a VMM is: what ran here before decides what the compiler makes of a loop.
  if (!backends.some(({ name, isArm }) => name === 'kvm' && !isArm) || !onSoftware) return;
  const { code, output, errors } = await child('io_loop');
  t.equal(code, 0, errors);
  t.ok(Number(output) < 8, `${output.trim()} bytes an exit: the smallest object has 16`);
});

t.test('memory is mapped ahead, also when a memslot has gone', async (t) => {
  await everywhere(
    t,
    'pre-fault',
    (t, world) => {
      // hlt, hlt
      const vcpu = guest(world, [0xf4, 0xf4]);
      const { vm, kvm, P } = world;
      const range = { address: 0, size: 4 * P };
      if (!vm.capabilities.preFaultMemory) {
        t.ok(['EOPNOTSUPP', 'EINVAL'].includes(errorOf(() => vcpu.preFaultMemory(range)).code));
        return;
      }
      const done = { remaining: { address: 4 * P, size: 0 } };
      const other = vm.createMemslot({ address: 4 * MiB, size: P, hostMemory: kvm.createHostMemory({ size: P }) });
      t.same(vcpu.preFaultMemory(range), done);
      other.remove();
      try {
        t.same(vcpu.preFaultMemory(range), done);
      } catch (error) {
        t.match(error, { code: 'EAGAIN' }, 'a kernel before 6.18 has to run the guest first');
        t.match(kvm.backend, 'kvm');
      }
      t.equal(vcpu.run({ timeout: 1000 }).reason, 'hlt');
      t.same(vcpu.preFaultMemory(range), done);
    },
    withCode,
  );
});
