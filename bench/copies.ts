// What a copy into and out of memory that may fault costs, against memcpy: one ordinary buffer into another.
import { Kvm } from '../lib/index.ts';
import { linuxKernel, uapi } from '../lib/kernel/index.ts';
import { type Result, type Round, type Row, sideBySide, timed } from './measure.ts';

const SIZES = [
  { size: 1 << 12, label: '4 KiB', calls: 4000 },
  { size: 1 << 16, label: '64 KiB', calls: 500 },
  { size: 1 << 20, label: '1 MiB', calls: 25 },
];
const MAX = 1 << 20;
const ROUNDS = 81;
/** Of memcpy's throughput, at 1 MiB: the cost of asking for smaller ones is that of a call. */
const GUARDED = 0.7;
const VIEW = 0.95;

interface Copy {
  readonly name: string;
  readonly bar: number;
  readonly loop: (size: number) => (calls: number) => void;
}

export async function benchCopies(): Promise<Result[]> {
  const results: Result[] = [];
  for (const [backend, copies] of [
    ['KVM', kvmCopies],
    ['software', softwareCopies],
  ] as const) {
    try {
      const contestants = copies();
      for (const one of SIZES) results.push(...(await measure(backend, contestants, one)));
    } catch (error) {
      results.push({ name: `copies, ${backend}`, skipped: (error as Error).message.split('\n')[0] ?? '' });
    }
  }
  return results;
}

async function measure(
  backend: string,
  copies: readonly Copy[],
  { size, label, calls }: (typeof SIZES)[number],
): Promise<Row[]> {
  const rounds: Round[] = [memcpy(size), ...copies.map(({ loop }) => loop(size))].map(
    (loop) => () => timed(loop, calls),
  );
  const [reference, ...measured] = await sideBySide(rounds, ROUNDS);
  const speed = (time: number): string => `${(size / 1.073741824 / time).toFixed(1)} GiB/s`;
  return copies.map(({ name, bar }, index) => {
    const { time, ratio } = measured[index] as { time: number; ratio: number };
    const hasBar = backend === 'KVM' && size === MAX;
    return {
      name: `${backend} ${label}, ${name}`,
      value: 1 / ratio,
      unit: '× memcpy',
      ...(hasBar ? { bar, atLeast: true } : {}),
      detail: `${speed(time)}, memcpy ${speed(reference?.time ?? 0)}`,
    };
  });
}

function memcpy(size: number): (calls: number) => void {
  const source = filled(size);
  const target = filled(size);
  return (calls) => {
    for (let i = 0; i < calls; i++) target.set(source);
  };
}

/** Part of a large buffer, which begins at the same place of a page every time: the speed of memcpy depends on it. */
function filled(size: number): Uint8Array {
  return new Uint8Array(MAX).fill(1).subarray(0, size);
}

function kvmCopies(): Copy[] {
  const kernel = linuxKernel();
  const mapping = kernel.mmap({
    length: MAX,
    prot: uapi.PROT_READ | uapi.PROT_WRITE,
    flags: uapi.MAP_PRIVATE | uapi.MAP_ANONYMOUS,
    fd: -1,
    offset: 0,
  });
  const guarded: Copy[] = [
    {
      name: 'kernel.peek',
      bar: GUARDED,
      loop: (size) => {
        const buffer = filled(size);
        return (calls) => {
          for (let i = 0; i < calls; i++) all(kernel.peek(mapping, 0, buffer), size);
        };
      },
    },
    {
      name: 'kernel.poke',
      bar: GUARDED,
      loop: (size) => {
        const buffer = filled(size);
        return (calls) => {
          for (let i = 0; i < calls; i++) all(kernel.poke(mapping, 0, buffer), size);
        };
      },
    },
    ...views((size) => kernel.window(mapping, 0, size)),
  ];
  return [...guarded, ...objectCopies('kvm')];
}

function softwareCopies(): Copy[] {
  return objectCopies('software');
}

function objectCopies(backend: 'kvm' | 'software'): Copy[] {
  const kvm = Kvm.open({ backend });
  const vm = kvm.createVm();
  const hostMemory = kvm.createHostMemory({ size: MAX });
  vm.createMemslot({ address: 0, size: MAX, hostMemory });
  vm.memory.write(0, filled(MAX));
  return [
    {
      name: 'vm.memory.readInto',
      bar: GUARDED,
      loop: (size) => {
        const buffer = filled(size);
        return (calls) => {
          for (let i = 0; i < calls; i++) vm.memory.readInto(0, buffer);
        };
      },
    },
    {
      name: 'vm.memory.write',
      bar: GUARDED,
      loop: (size) => {
        const buffer = filled(size);
        return (calls) => {
          for (let i = 0; i < calls; i++) vm.memory.write(0, buffer);
        };
      },
    },
  ];
}

function views(view: (size: number) => Uint8Array): Copy[] {
  return [
    {
      name: 'a view, out',
      bar: VIEW,
      loop: (size) => {
        const buffer = filled(size);
        const bytes = view(size);
        return (calls) => {
          for (let i = 0; i < calls; i++) buffer.set(bytes);
        };
      },
    },
    {
      name: 'a view, in',
      bar: VIEW,
      loop: (size) => {
        const buffer = filled(size);
        const bytes = view(size);
        return (calls) => {
          for (let i = 0; i < calls; i++) bytes.set(buffer);
        };
      },
    },
  ];
}

function all(copied: number, size: number): void {
  if (copied !== size) throw new Error(`a measured copy ended at ${copied}`);
}
