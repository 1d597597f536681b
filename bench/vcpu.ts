// What an exit of a vCPU costs, against the same guest run by a C loop, and how fast the agent is.
import { type Exit, GuestAgent, KiB, Kvm, MiB, type Vcpu, VcpuWorker, type Vm } from '../lib/index.ts';
import { nanoseconds, type Result, type Round, sideBySide, timed } from './measure.ts';
import { NO_COMPILER, Reference } from './reference.ts';

const ENTRY = 0x1000;
const AGENT_DATA = 1 * MiB;
/** Of the exits per second that the C loop gets. */
const BAR = 0.9;
const ROUNDS = 101;
/** In one round, about 5 ms. */
const EXITS = 400;
const TRIPS = 10;
/** A KVM without hardware paging emulates the guest: 64 KiB take it a twentieth of a second. */
const READS = [
  { size: 8, label: '8 bytes', calls: 32 },
  { size: 64 * KiB, label: '64 KiB', calls: 2 },
];
const READ_ROUNDS = 15;

export async function benchVcpu(): Promise<Result[]> {
  const results: Result[] = [];
  for (const [title, part] of [
    ['port I/O and runAsync(), KVM', benchExits],
    ['agent, KVM', () => benchAgent('kvm')],
    ['agent, software', () => benchAgent('software')],
  ] as const) {
    try {
      results.push(...(await part()));
    } catch (error) {
      results.push({ name: title, skipped: (error as Error).message.split('\n')[0] ?? '' });
    }
  }
  return results;
}

async function benchExits(): Promise<Result[]> {
  using kvm = Kvm.open({ backend: 'kvm' });
  if (kvm.arch !== 'x86_64') return [{ name: 'port I/O', skipped: `${kvm.arch} has none` }];
  const [below, vcpu, alone] = [1, 2, 3].map(() => portLoop(kvm.createVm())) as [Vcpu, Vcpu, Vcpu];
  const far = await VcpuWorker.start(guestVm(kvm.createVm()), { registers });
  const { kernel, fd } = below.handle;
  const reference = Reference.start('vcpu');
  if (!reference) return [{ name: 'port I/O', skipped: NO_COMPILER }];
  const boundary = (calls: number): void => {
    for (let i = 0; i < calls; i++) if (kernel.run(fd, 10_000) !== 0) throw new Error('the guest did not come back');
  };
  const objects = (calls: number): void => {
    for (let i = 0; i < calls; i++) assertPort(vcpu.run().reason);
  };
  const contestants: Round[] = [
    () => reference.time('port-io', EXITS),
    () => timed(boundary, EXITS),
    () => timed(objects, EXITS),
    () => roundTrips(() => alone.runAsync(), TRIPS),
    () => roundTrips(() => far.next(), TRIPS),
  ];
  const [c, low, high, trip, hand] = await sideBySide(contestants, ROUNDS).finally(() => reference.close());
  if (!c || !low || !high || !trip || !hand) return [];
  const against = ({ time, ratio }: { time: number; ratio: number }) => ({
    value: 1 / ratio,
    unit: '× C',
    bar: BAR,
    atLeast: true,
    detail: `${perSecond(time)} exits/s, C ${perSecond(c.time)} (${nanoseconds(time)}, C ${nanoseconds(c.time)})`,
  });
  return [
    { name: 'exits of port I/O, boundary', ...against(low) },
    { name: 'exits of port I/O, vcpu.run()', ...against(high) },
    ...Object.entries({ 'vcpu.runAsync(), there and back': trip, 'VcpuWorker.next(), there and back': hand }).map(
      ([name, { time }]) => ({
        name,
        value: time / 1000,
        unit: 'µs',
        detail: `${perSecond(time)}/s, ${(time / high.time).toFixed(1)} × run()`,
      }),
    ),
  ];
}

async function benchAgent(backend: 'kvm' | 'software'): Promise<Result[]> {
  using kvm = Kvm.open({ backend });
  using vm = kvm.createVm();
  vm.createMemslot({ address: 0, size: 4 * MiB, hostMemory: kvm.createHostMemory({ size: 4 * MiB }) });
  using agent = GuestAgent.boot(vm);
  const name = backend === 'kvm' ? 'KVM' : 'software';
  const rounds: Round[] = READS.map(({ size, calls }) => {
    const loop = (calls: number): void => {
      for (let i = 0; i < calls; i++) agent.read(AGENT_DATA, size);
    };
    return () => timed(loop, calls);
  });
  const times = await sideBySide(rounds, READ_ROUNDS);
  return READS.map(({ size, label }, index) => {
    const { time } = times[index] as { time: number };
    return {
      name: `agent.read() of ${label}, ${name}`,
      value: Math.round(1e9 / time),
      unit: '/s',
      detail: `${nanoseconds(time)}${size < KiB ? '' : `, ${((size * 1e9) / MiB / time).toFixed(1)} MiB/s`}`,
    };
  });
}

const registers = { rip: BigInt(ENTRY), rflags: 2n, 'cs.base': 0n, 'cs.selector': 0n };

/** In real mode, for ever: out 0x80, al. */
function guestVm(vm: Vm): Vm {
  vm.createMemslot({ address: 0, size: MiB, hostMemory: vm.kvm.createHostMemory({ size: MiB }) });
  vm.memory.write(ENTRY, Uint8Array.of(0xe6, 0x80, 0xeb, 0xfc));
  return vm;
}

function portLoop(vm: Vm): Vcpu {
  const vcpu = guestVm(vm).createVcpu();
  vcpu.setRegisters(registers);
  return vcpu;
}

/** Nanoseconds of one. */
async function roundTrips(exit: () => Promise<Exit>, count: number): Promise<number> {
  const start = process.hrtime.bigint();
  for (let i = 0; i < count; i++) assertPort((await exit()).reason);
  return Number(process.hrtime.bigint() - start) / count;
}

function assertPort(reason: string): void {
  if (reason !== 'io') throw new Error(`the guest stopped with ${reason}`);
}

function perSecond(time: number): string {
  return String(Math.round(1e9 / time));
}
