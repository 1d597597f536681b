// What RangeMap promises at the scale of a large guest: 16 TiB in pages of 4 KiB, or a million separate ranges.
import { RangeMap } from '../lib/ranges.ts';
import type { Row } from './measure.ts';

const PAGES = 2 ** 32;
const MILLION = 1_000_000;

const randomBelow = (limit: number): number => Math.floor(Math.random() * limit);

function milliseconds(work: () => void): number {
  const start = performance.now();
  work();
  return performance.now() - start;
}

/** Microseconds per call, over enough calls to see past the clock. */
function microseconds(work: () => void, calls: number): number {
  return (
    (milliseconds(() => {
      for (let i = 0; i < calls; i++) work();
    }) /
      calls) *
    1000
  );
}

/** MiB that V8 and its array buffers hold; exact only with --expose-gc. */
function memory(): number {
  globalThis.gc?.();
  const { heapUsed, external } = process.memoryUsage();
  return (heapUsed + external) / 2 ** 20;
}

export function benchRanges(): Row[] {
  const rows: Row[] = [];
  const row = (name: string, value: number, unit: string, bar: number) => rows.push({ name, value, unit, bar });

  const conversions = milliseconds(() => {
    const map = new RangeMap<string>();
    for (let i = 0; i < MILLION; i++) {
      const length = 1 + randomBelow(262_144);
      const start = randomBelow(PAGES - length);
      if (i % 2) map.set(start, start + length, 'private');
      else map.delete(start, start + length);
    }
  });
  row('1 000 000 conversions of 4 KiB to 1 GiB over 16 TiB', conversions, 'ms', 2000);

  const before = memory();
  const map = new RangeMap<string>();
  const scattered = milliseconds(() => {
    for (let i = 0; i < MILLION; i++) {
      const start = randomBelow(PAGES);
      map.set(start, start + 1, 'private');
    }
  });
  row('1 000 000 single pages at random', scattered, 'ms', 2000);
  row('memory of 1 000 000 ranges', memory() - before, 'MiB', 150);

  row(
    'get in 1 000 000 ranges',
    microseconds(() => map.get(randomBelow(PAGES)), 200_000),
    'µs',
    5,
  );
  const covers = () => {
    const start = randomBelow(PAGES);
    map.covers(start, start + 1000);
  };
  row('covers in 1 000 000 ranges', microseconds(covers, 200_000), 'µs', 5);
  const overlaps = () => {
    const start = randomBelow(PAGES);
    map.overlaps(start, start + 1000);
  };
  row('overlaps in 1 000 000 ranges', microseconds(overlaps, 200_000), 'µs', 5);
  row(
    'lengthWithin over 1 000 000 ranges',
    microseconds(() => map.lengthWithin(1, PAGES), 100),
    'µs',
    1000,
  );

  const iterate = () => {
    let sum = 0;
    for (const { start, end } of map) sum += end - start;
    if (sum !== map.length) throw new Error('an iteration must see everything');
  };
  row('iterate over 1 000 000 ranges', milliseconds(iterate), 'ms', 500);
  row(
    'clone 1 000 000 ranges',
    milliseconds(() => map.clone()),
    'ms',
    500,
  );
  return rows;
}
