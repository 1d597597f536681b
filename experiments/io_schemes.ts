import { KiB, MiB } from 'guest-memfd';
import { generator } from './common.ts';
import type { Experiment } from './experiment.ts';
import { type LinePanel, lineChart, type Tick } from './line_chart.ts';
import { type Cost, Meter } from './meter.ts';
import { grantRing, mapEach, pread, specialMapping } from './schemes/proposed.ts';
import { bounce, twoMemories } from './schemes/released.ts';
import { AREA, AREAS, type Backend, type Scheme, type Session } from './schemes/scheme.ts';

const SIZES = Array.from({ length: 12 }, (_, step) => 512 * 2 ** step);
/** What a table for people has room for. */
const SHOWN: readonly number[] = [512, 64 * KiB, MiB];
/** Requests that are counted, after one that is not; of them the time is the median. */
const REQUESTS = 3;

const SCHEMES: readonly { readonly scheme: Scheme; readonly color: string }[] = [
  { scheme: bounce, color: '#d1495b' },
  { scheme: twoMemories, color: '#f0a04b' },
  { scheme: mapEach, color: '#8d6cab' },
  { scheme: specialMapping, color: '#2e86ab' },
  { scheme: grantRing, color: '#3a9d5d' },
  { scheme: pread, color: '#5f6b7a' },
];

interface Measured extends Cost {
  readonly size: number;
  /** Of one request, where a real CPU ran it. */
  readonly milliseconds: number | null;
}

interface Run {
  readonly key: string;
  readonly name: string;
  readonly needs: string;
  readonly host: string;
  readonly real: boolean;
  readonly sizes: readonly Measured[];
}

export interface IoFindings {
  readonly seed: number;
  readonly sizes: readonly number[];
  readonly runs: readonly Run[];
}

/** A guest has bytes in memory of its own for a device of the host. What does it take until the device has them, by each scheme there is? */
export const ioSchemes: Experiment = {
  title: 'What a request to a device costs a guest with private memory, by scheme',
  run({ backend, seed }) {
    const random = generator(seed);
    const data = Uint8Array.from({ length: AREAS * AREA }, () => random(256));
    const runs = SCHEMES.map(({ scheme }) => runScheme(scheme, backend, data));
    const findings: IoFindings = { seed, sizes: SIZES, runs };
    return { data: findings, lines: table(runs), svg: plot(runs) };
  },
};

function runScheme(scheme: Scheme, backend: Backend, data: Uint8Array): Run {
  const meter = new Meter();
  using session = scheme.open(meter, backend, data);
  const { key, name, needs } = scheme;
  const { host, real } = session;
  return { key, name, needs, host, real, sizes: SIZES.map((size) => measure(meter, session, size, data)) };
}

function measure(meter: Meter, session: Session, size: number, data: Uint8Array): Measured {
  const costs: Cost[] = [];
  const times: number[] = [];
  for (let count = 0; count <= REQUESTS; count++) {
    const area = count % AREAS;
    let taken = 0;
    const device = (bytes: Uint8Array, offset: number): void => {
      const start = area * AREA + offset;
      if (Buffer.compare(bytes, data.subarray(start, start + bytes.length)))
        throw new Error('the device got other bytes than the guest has');
      taken += bytes.length;
    };
    const begin = performance.now();
    const cost = meter.measure(() => session.request({ area, size }, device));
    const time = performance.now() - begin;
    if (taken !== size) throw new Error(`the device got ${taken} bytes of ${size}`);
    if (count === 0) continue;
    costs.push(cost);
    times.push(time);
  }
  const [cost, ...others] = costs as [Cost, ...Cost[]];
  if (others.some((other) => JSON.stringify(other) !== JSON.stringify(cost)))
    throw new Error(`requests of ${size} bytes do not all cost the same`);
  const median = times.sort((a, b) => a - b)[REQUESTS >> 1] as number;
  return { size, ...cost, milliseconds: session.real ? median : null };
}

// ── for people

const NAME_WIDTH = 33;

function table(runs: readonly Run[]): string[] {
  const titles = ['exits', 'hypercalls', 'system calls', 'TLB flushes', 'copied', 'time'];
  const widths = [7, 12, 14, 13, 10, 11];
  const row = (name: string, cells: readonly string[]): string =>
    name.padEnd(NAME_WIDTH) + cells.map((cell, index) => cell.padStart(widths[index] ?? 0)).join('');
  const blocks = SHOWN.flatMap((size) => [
    row(`a request of ${bytes(size)}`, titles),
    ...runs.map(({ name, sizes }) => {
      const one = sizes.find((measured) => measured.size === size) as Measured;
      const { exits, hypercalls, systemCalls, flushes, copiedBytes, milliseconds } = one;
      const time = milliseconds === null ? '–' : `${milliseconds.toFixed(2)} ms`;
      return row(name, [...[exits, hypercalls, systemCalls, flushes].map(String), bytes(copiedBytes), time]);
    }),
    '',
  ]);
  return [
    ...blocks,
    `${'where'.padEnd(NAME_WIDTH)}  and the system calls of a request of ${bytes(MiB)}`,
    ...runs.flatMap(({ name, host, real, needs, sizes }) => [
      `${name.padEnd(NAME_WIDTH)}  ${real ? 'timed on' : 'counted in'} ${host}${needs && ` with ${needs}`}`,
      `${''.padEnd(NAME_WIDTH)}  ${Object.entries(sizes.at(-1)?.calls ?? {})
        .map(([call, count]) => `${count} ${call}`)
        .join(', ')}`,
    ]),
  ];
}

function bytes(count: number): string {
  if (count >= MiB) return `${count / MiB} MiB`;
  return count >= KiB ? `${count / KiB} KiB` : count === 0 ? '0' : `${count} B`;
}

function plot(runs: readonly Run[]): string {
  const counted = (title: string, of: (measured: Measured) => number): LinePanel => {
    const values = runs.map(({ sizes }) => sizes.map(of));
    const top = Math.max(2, ...values.flat());
    const ticks = [0, ...Array.from({ length: Math.ceil(Math.log2(top)) + 1 }, (_, step) => 2 ** step)];
    return { title, ticks: ticks.map((value): Tick => ({ value, label: String(value) })), values };
  };
  const copied: LinePanel = {
    title: 'copied bytes',
    ticks: [0, 512, 4 * KiB, 32 * KiB, 256 * KiB, 2 * MiB].map((value): Tick => ({ value, label: bytes(value) })),
    values: runs.map(({ sizes }) => sizes.map(({ copiedBytes }) => copiedBytes)),
  };
  const real = [...new Set(runs.filter((run) => run.real).map(({ host }) => host))];
  const model = [...new Set(runs.filter((run) => !run.real).map(({ host }) => host))];
  const where = [...real.map((host) => `timed on ${host}`), ...model.map((host) => `counted in ${host}`)];
  return lineChart({
    title: ioSchemes.title,
    subtitle: `per request, by its size; lines of one value lie side by side; ${where.join(', ')}`,
    series: runs.map(({ name }, index) => ({ name, color: SCHEMES[index]?.color ?? '' })),
    steps: SIZES.map((size) => ([512, 8 * KiB, 128 * KiB, MiB].includes(size) ? bytes(size) : '')),
    panels: [
      counted('exits', ({ exits }) => exits),
      counted('hypercalls', ({ hypercalls }) => hypercalls),
      counted('system calls', ({ systemCalls }) => systemCalls),
      counted('TLB flushes', ({ flushes }) => flushes),
      copied,
      ...times(runs),
    ],
  });
}

/** Of what was timed, if anything was. */
function times(runs: readonly Run[]): LinePanel[] {
  const values = runs.map(({ sizes }) => sizes.flatMap(({ milliseconds }) => milliseconds ?? []));
  const all = values.flat();
  if (all.length === 0) return [];
  const [from, to] = [Math.floor(Math.log10(Math.min(...all))), Math.ceil(Math.log10(Math.max(...all)))];
  const ticks = Array.from({ length: to - from + 1 }, (_, step) => 10 ** (from + step));
  const label = (value: number): string => (value < 1 ? `${Math.round(value * 1000)} µs` : `${value} ms`);
  return [{ title: 'time, on real KVM', ticks: ticks.map((value) => ({ value, label: label(value) })), values }];
}
