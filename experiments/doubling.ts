import { ConversionPolicy, type Exit, GuestAgent, MiB, type Visibility, type Vm } from 'guest-memfd';
import { stackedChart } from './chart.ts';
import { generator, openWithPrivate } from './common.ts';
import type { Experiment } from './experiment.ts';

const SIZE = 64 * MiB;
const BLOCK = 2 * MiB;
/** The agent lives in the first block. */
const FIRST = 1;
const STEPS = 200;

interface Run {
  readonly name: string;
  /** Bytes, after each step. */
  readonly shared: number[];
  readonly private: number[];
}

/**
 * A guest converts blocks of its memory back and forth at random, and uses each as its new owner. How much does the host hold for it, with the other
 * side discarded, and without?
 */
export const doubling: Experiment = {
  title: 'Bytes held for a guest that converts its memory back and forth',
  run({ backend, seed }) {
    const runs = [true, false].map((discards) => converse(backend, seed, discards));
    const [kvm] = runs.map(({ host }) => host);
    const peak = (run: Run): number => Math.max(...run.shared.map((bytes, step) => bytes + (run.private[step] ?? 0)));
    return {
      data: { size: SIZE, block: BLOCK, steps: STEPS, seed, host: kvm, runs: runs.map(({ run }) => run) },
      lines: [
        `${kvm}; a guest of ${SIZE / MiB} MiB, ${STEPS} random conversions of 2 to 8 MiB, each block used by its new owner`,
        '',
        `${''.padEnd(36)}${'highest'.padStart(10)}${'at the end'.padStart(12)}${'of its size'.padStart(13)}`,
        ...runs.map(({ run }) => {
          const end = (run.shared.at(-1) ?? 0) + (run.private.at(-1) ?? 0);
          return `${run.name.padEnd(36)}${`${peak(run) / MiB} MiB`.padStart(10)}${`${end / MiB} MiB`.padStart(12)}${`${Math.round((100 * end) / SIZE)} %`.padStart(13)}`;
        }),
      ],
      svg: stackedChart({
        title: 'Bytes held for a guest that converts its memory back and forth',
        subtitle: `${kvm}; ${SIZE / MiB} MiB, random conversions of 2 to 8 MiB, each used by its new owner`,
        unit: 'MiB',
        xLabel: 'conversions',
        layers: [
          { name: 'shared side (host memory)', color: '#4c9be8' },
          { name: 'private side (guest_memfd)', color: '#f0a04b' },
        ],
        limit: { value: SIZE / MiB, label: 'size of the guest' },
        panels: runs.map(({ run }) => ({
          title: run.name,
          values: [run.shared, run.private].map((side) => side.map((bytes) => bytes / MiB)),
        })),
      }),
    };
  },
};

function converse(backend: 'auto' | 'kvm' | 'software', seed: number, discards: boolean): { run: Run; host: string } {
  using kvm = openWithPrivate(backend);
  using vm = kvm.createVm({ type: 'sw-protected' });
  using hostMemory = kvm.createHostMemory({ size: SIZE });
  const guestMemfd = vm.createGuestMemfd({ size: SIZE });
  vm.createMemslot({ address: 0, size: SIZE, hostMemory, guestMemfd });
  const onExit = discards ? new ConversionPolicy(vm).handle : attributeOnly(vm);
  using agent = GuestAgent.boot(vm, { address: 0, onExit });
  const run: Run = {
    name: discards ? 'convert(): the rest is discarded' : 'the attribute alone',
    shared: [],
    private: [],
  };
  const note = (): void => {
    run.shared.push(hostMemory.residentBytes());
    run.private.push(guestMemfd.residentBytes());
  };
  agent.touch({ address: FIRST * BLOCK, size: SIZE - FIRST * BLOCK }, { write: true });
  note();
  const random = generator(seed);
  for (let step = 0; step < STEPS; step++) {
    const block = FIRST + random(SIZE / BLOCK - FIRST);
    const range = { address: block * BLOCK, size: Math.min((1 + random(4)) * BLOCK, SIZE - block * BLOCK) };
    const to: Visibility = random(2) ? 'private' : 'shared';
    const answer = agent.requestConversion(range, to);
    if (answer !== 0n) throw new Error(`the guest's request was answered with ${answer}`);
    agent.touch(range, { write: true });
    note();
  }
  return { run, host: `${kvm.backend}, Linux ${kvm.kernelRelease}` };
}

/** What a VMM does that sets the attribute and leaves it at that. */
function attributeOnly(vm: Vm): (exit: Exit) => 'resume' | 'stop' {
  return (exit) => {
    if (exit.reason !== 'map-gpa-range') return 'stop';
    vm.setMemoryAttributes(exit, { private: exit.to === 'private' });
    exit.reply(0n);
    return 'resume';
  };
}
