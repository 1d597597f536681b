// RangeMap against two references: a map of single units (small universes, every method, every pair of bounds) and a
// sorted array of ranges (thousands of ranges, so that leaves split, join and disappear).
import assert from 'node:assert/strict';
import fc from 'fast-check';
import t from 'tap';
import { type Range, RangeMap } from '../lib/ranges.ts';

const END = 2 ** 53;

// ── Reference 1: one entry per unit of [base, base + UNITS) ──

const UNITS = 20;
const VALUES = ['private', 'shared', undefined] as const;
type Value = (typeof VALUES)[number];

class UnitMap {
  readonly base: number;
  #units = new Map<number, Value>();

  constructor(base: number, units?: Map<number, Value>) {
    this.base = base;
    this.#units = new Map(units);
  }

  set(start: number, end: number, value: Value): void {
    for (let at = start; at < end; at++) this.#units.set(at, value);
  }

  delete(start: number, end: number): void {
    for (let at = start; at < end; at++) this.#units.delete(at);
  }

  clear(): void {
    this.#units.clear();
  }

  clone(): UnitMap {
    return new UnitMap(this.base, this.#units);
  }

  has(at: number): boolean {
    return this.#units.has(at);
  }

  get(at: number): Value {
    return this.#units.get(at);
  }

  /** Maximal runs of covered (or uncovered) units in [start, end). */
  runs(start: number, end: number, covered: boolean): Range<Value>[] {
    const runs: Range<Value>[] = [];
    for (let at = start; at < end; at++) {
      if (this.has(at) !== covered) continue;
      const last = runs.at(-1);
      if (last?.end === at && last.value === this.get(at)) runs[runs.length - 1] = { ...last, end: at + 1 };
      else runs.push({ start: at, end: at + 1, value: this.get(at) });
    }
    return runs;
  }
}

interface Writable {
  set(start: number, end: number, value: Value): void;
  delete(start: number, end: number): void;
  clear(): void;
}
type Operation = (map: Writable) => void;

/** Bounds of a range in [base, base + UNITS], often empty or reversed. */
const bounds = fc.tuple(fc.nat(UNITS), fc.nat(UNITS));
const bases = fc.constantFrom(0, 2 ** 32 - UNITS / 2, 2 ** 52 - UNITS / 2, END - UNITS);

function operations(base: number, maxLength = 30): fc.Arbitrary<Operation[]> {
  const set = fc.tuple(bounds, fc.constantFrom(...VALUES)).map(([[start, end], value]) => {
    const operation: Operation = (map) => map.set(base + start, base + end, value);
    return Object.assign(operation, { toString: () => `set(${base + start}, ${base + end}, ${value})` });
  });
  const remove = bounds.map(([start, end]) => {
    const operation: Operation = (map) => map.delete(base + start, base + end);
    return Object.assign(operation, { toString: () => `delete(${base + start}, ${base + end})` });
  });
  const clear = fc.constant<Operation>((map) => map.clear());
  return fc.array(fc.oneof({ weight: 12, arbitrary: set }, { weight: 6, arbitrary: remove }, clear), { maxLength });
}

/** What a map must be whatever happened to it: sorted, disjoint, non-empty, merged ranges, counted right. */
function ranges<V>(map: RangeMap<V>): Range<V>[] {
  const all = [...map];
  for (const [i, { start, end, value }] of all.entries()) {
    assert.ok(start < end, 'non-empty');
    const next = all[i + 1];
    if (next) assert.ok(end < next.start || (end === next.start && value !== next.value), 'sorted, disjoint, merged');
  }
  assert.equal(map.size, all.length);
  assert.equal(
    map.length,
    all.reduce((sum, { start, end }) => sum + (end - start), 0),
  );
  return all;
}

function assertSame(map: RangeMap<Value>, model: UnitMap): void {
  const { base } = model;
  assert.deepEqual(ranges(map), model.runs(base, base + UNITS, true));
  for (let at = base; at < base + UNITS; at++) {
    assert.equal(map.get(at), model.get(at));
    const run = model.runs(base, base + UNITS, true).find(({ start, end }) => start <= at && at < end);
    assert.deepEqual(map.rangeAt(at), run);
  }
}

function assertSameQueries(map: RangeMap<Value>, model: UnitMap, start: number, end: number): void {
  const runs = model.runs(start, end, true);
  const whole = start >= end || (runs.length === 1 && runs[0]?.start === start && runs[0].end === end);
  assert.equal(map.covers(start, end), whole, 'covers');
  assert.equal(map.overlaps(start, end), runs.length > 0, 'overlaps');
  const length = runs.reduce((sum, run) => sum + (run.end - run.start), 0);
  assert.equal(map.lengthWithin(start, end), length, 'lengthWithin');
  assert.deepEqual([...map.within(start, end)], runs, 'within');
  const gaps = model.runs(start, end, false).map(({ start, end }) => ({ start, end }));
  assert.deepEqual([...map.gaps(start, end)], gaps, 'gaps');
}

t.test('every method agrees with a map of single units', async (t) => {
  const programs = bases.chain((base) => fc.tuple(fc.constant(base), operations(base)));
  fc.assert(
    fc.property(programs, ([base, program]) => {
      const map = new RangeMap<Value>();
      const model = new UnitMap(base);
      for (const operation of program) {
        operation(map);
        operation(model);
        assertSame(map, model);
      }
      for (let from = 0; from <= UNITS; from++) {
        for (let to = 0; to <= UNITS; to++) assertSameQueries(map, model, base + from, base + to);
      }
    }),
    { numRuns: 150 },
  );
  t.pass('150 programs');
});

t.test('a clone and its original do not see each other change', async (t) => {
  fc.assert(
    fc.property(operations(0), operations(0), operations(0), (before, here, there) => {
      const map = new RangeMap<Value>();
      const model = new UnitMap(0);
      for (const operation of before) for (const target of [map, model]) operation(target);
      const [mapClone, modelClone] = [map.clone(), model.clone()];
      assertSame(mapClone, modelClone);
      for (const operation of here) for (const target of [map, model]) operation(target);
      assertSame(mapClone, modelClone);
      for (const operation of there) for (const target of [mapClone, modelClone]) operation(target);
      assertSame(map, model);
      assertSame(mapClone, modelClone);
    }),
  );
  t.pass('100 pairs');
});

// ── Reference 2: a sorted array ──

/** The obvious way: cut what is near, insert, merge. O(n) for everything. */
class SortedArray<V> {
  readonly list: Range<V>[] = [];

  write(start: number, end: number, added: Range<V>[]): void {
    const from = this.list.filter((r) => r.end < start).length;
    const near = this.list.filter((r) => r.end >= start && r.start <= end);
    const before = near.filter((r) => r.start < start).map((r) => ({ ...r, end: Math.min(r.end, start) }));
    const after = near.filter((r) => r.end > end).map((r) => ({ ...r, start: Math.max(r.start, end) }));
    const merged: Range<V>[] = [];
    for (const range of [...before, ...added, ...after]) {
      const last = merged.at(-1);
      if (last?.end === range.start && last.value === range.value) {
        merged[merged.length - 1] = { ...last, end: range.end };
      } else {
        merged.push(range);
      }
    }
    this.list.splice(from, near.length, ...merged);
  }

  set(start: number, end: number, value: V): void {
    this.write(start, end, [{ start, end, value }]);
  }

  delete(start: number, end: number): void {
    this.write(start, end, []);
  }

  within(start: number, end: number): Range<V>[] {
    const met = this.list.filter((r) => r.end > start && r.start < end);
    return met.map((r) => ({ ...r, start: Math.max(r.start, start), end: Math.min(r.end, end) }));
  }

  gaps(start: number, end: number): { start: number; end: number }[] {
    const met = this.within(start, end);
    const starts = [start, ...met.map((r) => r.end)];
    const ends = [...met.map((r) => r.start), end];
    return starts.map((start, i) => ({ start, end: ends[i] as number })).filter((gap) => gap.start < gap.end);
  }
}

/** A small generator, so that a failing program is named by its seed alone (mulberry32). */
function randomFrom(seed: number): (below: number) => number {
  let state = seed;
  return (below) => {
    state = (state + 0x6d2b79f5) | 0;
    let x = Math.imul(state ^ (state >>> 15), 1 | state);
    x = (x + Math.imul(x ^ (x >>> 7), 61 | x)) ^ x;
    return Math.floor((((x ^ (x >>> 14)) >>> 0) / 2 ** 32) * below);
  };
}

t.test('thousands of ranges agree with a sorted array', async (t) => {
  const span = 12_000;
  // Growing fills and splits leaves, sweeping drops whole leaves and cuts two, thinning leaves sparse ones to join.
  const phases = [
    { name: 'grow', steps: 2500, width: 2, deletes: 0.1 },
    { name: 'sweep', steps: 40, width: 3000, deletes: 0.5 },
    { name: 'grow', steps: 2500, width: 3, deletes: 0.2 },
    { name: 'thin', steps: 2500, width: 12, deletes: 0.9 },
  ];
  let largest = 0;
  fc.assert(
    fc.property(fc.integer(), fc.constantFrom(0, 2 ** 52 - span / 2, END - span), (seed, base) => {
      const random = randomFrom(seed);
      const map = new RangeMap<number>();
      const reference = new SortedArray<number>();
      for (const { steps, width, deletes } of phases) {
        for (let step = 0; step < steps; step++) {
          const start = base + random(span - width);
          const end = start + 1 + random(width);
          const value = random(3);
          if (random(1000) < 1000 * deletes) for (const target of [map, reference]) target.delete(start, end);
          else for (const target of [map, reference]) target.set(start, end, value);
          assert.equal(map.size, reference.list.length);
          if (step % 125 && step !== steps - 1 && width < 1000) continue;

          largest = Math.max(largest, map.size);
          assert.deepEqual(ranges(map), reference.list);
          assert.deepEqual(ranges(map.clone()), reference.list);
          const [from, to] = [base + random(span), base + random(span)];
          const met = reference.within(from, to);
          const length = met.reduce((sum, r) => sum + (r.end - r.start), 0);
          assert.deepEqual([...map.within(from, to)], from < to ? met : []);
          assert.deepEqual([...map.gaps(from, to)], from < to ? reference.gaps(from, to) : []);
          assert.equal(map.lengthWithin(from, to), from < to ? length : 0);
          assert.equal(map.overlaps(from, to), from < to && met.length > 0);
          const at = reference.list.find((r) => r.start <= from && from < r.end);
          assert.deepEqual(map.rangeAt(from), at);
          assert.equal(map.covers(from, from + 1), at !== undefined);
        }
      }
    }),
    { numRuns: 6 },
  );
  t.ok(largest > 2000, `up to ${largest} ranges`);
});

t.test('ranges in ascending, descending and alternating order, built up and taken down', async (t) => {
  const count = 3000;
  const orders = {
    ascending: (i: number) => i,
    descending: (i: number) => count - 1 - i,
    alternating: (i: number) => (i % 2 ? count - 1 - (i >> 1) : i >> 1),
    scattered: (i: number) => (i * 1009) % count,
  };
  for (const [build, at] of Object.entries(orders)) {
    for (const [take, from] of Object.entries(orders)) {
      const map = new RangeMap<number>();
      for (let i = 0; i < count; i++) map.set(2 * at(i), 2 * at(i) + 1, i);
      t.equal(ranges(map).length, count, `${build}, then ${take}`);
      for (let i = 0; i < count; i++) {
        map.delete(2 * from(i), 2 * from(i) + 1);
        if (i % 500 === 0) t.equal(ranges(map).length, count - 1 - i);
      }
      t.equal(map.size, 0);
      t.equal(map.length, 0);
      map.set(5, 6, 1);
      t.same([...map], [{ start: 5, end: 6, value: 1 }], 'an emptied map is usable');
    }
  }
});

t.test('a map cut anywhere, from either side', async (t) => {
  const count = 800;
  const full = new RangeMap<number>();
  for (let i = 0; i < count; i++) full.set(2 * i, 2 * i + 1, i);
  const all = ranges(full);
  for (let cut = 0; cut <= count; cut++) {
    const head = full.clone();
    head.delete(2 * cut, END);
    assert.deepEqual(ranges(head), all.slice(0, cut));
    const tail = full.clone();
    tail.delete(0, 2 * cut);
    assert.deepEqual(ranges(tail), all.slice(cut));
    assert.equal([...tail.gaps(0, 2 * count)].length, count - cut + (cut > 0 ? 1 : 0));
  }
  t.pass(`${count} cuts`);
});

// ── The whole universe ──

t.test('bounds up to 2^53 are exact', async (t) => {
  const map = new RangeMap<string>();
  map.set(0, END, 'a');
  t.equal(map.length, END);
  t.equal(map.get(END - 1), 'a');
  t.ok(map.covers(0, END));
  map.delete(2 ** 52, 2 ** 52 + 1);
  t.equal(map.length, END - 1);
  map.delete(0, 1);
  map.delete(END - 1, END);
  t.same(
    [...map],
    [
      { start: 1, end: 2 ** 52, value: 'a' },
      { start: 2 ** 52 + 1, end: END - 1, value: 'a' },
    ],
  );
  t.equal(map.get(END - 1), undefined);
  t.equal(map.lengthWithin(0, END), END - 3);
  t.same([...map.gaps(0, END)].length, 3);
  map.set(2 ** 52, 2 ** 52 + 1, 'a');
  t.same([...map], [{ start: 1, end: END - 1, value: 'a' }], 'the middle closes');
  map.set(END - 1, END, 'b');
  t.same([...map.within(END - 2)].at(-1), { start: END - 1, end: END, value: 'b' });
});

t.test('lengths near 2^53 stay exact when many leaves are replaced', async (t) => {
  // The sum of old and new would need a 54th bit: 2^53 - 1 units in odd lengths, rewritten again and again.
  const map = new RangeMap<number>();
  const pieces = 2001;
  const width = Math.floor(END / pieces) | 1;
  map.set(0, END - 1, 0);
  for (let round = 0; round < 3; round++) {
    for (let i = 0; i < pieces - 2; i++) map.set(i * width, (i + 1) * width, 1 + ((i + round) % 2));
    t.equal(map.length, END - 1);
    map.set(width + 1, 1500 * width + 2, 3);
    t.equal(map.length, END - 1);
    t.equal(map.lengthWithin(1, END), END - 2);
    map.set(0, END - 1, 4);
    t.equal(map.length, END - 1);
    t.equal(map.size, 1);
  }
});

t.test('values are compared with ===', async (t) => {
  const [one, other] = [{ pins: 1 }, { pins: 1 }];
  const map = new RangeMap<unknown>();
  map.set(0, 1, one);
  map.set(1, 2, one);
  map.set(2, 3, other);
  map.set(3, 4, Number.NaN);
  map.set(4, 5, Number.NaN);
  map.set(5, 6, undefined);
  t.same(
    [...map].map(({ start, end }) => [start, end]),
    [
      [0, 2],
      [2, 3],
      [3, 4],
      [4, 5],
      [5, 6],
    ],
  );
  t.equal(map.rangeAt(1)?.value, one);
  t.ok(map.covers(5, 6), 'undefined is a value');
});

// ── Iterating while the map changes ──

function fragmented(count: number): RangeMap<string> {
  const map = new RangeMap<string>();
  for (let i = 0; i < count; i++) map.set(4 * i, 4 * i + 2, 'old');
  return map;
}

t.test('a loop may change what it visits', async (t) => {
  for (const count of [1, 3, 2000]) {
    const map = fragmented(count);
    let visits = 0;
    for (const { start, end } of map) {
      map.set(start, end, 'new');
      visits++;
    }
    t.equal(visits, count);
    t.ok([...map].every(({ value }) => value === 'new'));
    for (const { start, end } of map.gaps(0, 4 * count)) map.set(start, end, 'new');
    t.same([...map], [{ start: 0, end: 4 * count, value: 'new' }], 'gaps can be filled as they are found');

    const emptied = fragmented(count);
    visits = 0;
    for (const { start, end } of emptied.within()) {
      emptied.delete(start, end);
      visits++;
    }
    t.equal(visits, count);
    t.equal(emptied.size, 0);
  }
});

t.test('an iterator goes on in the map as it is', async (t) => {
  const take = (change: (map: RangeMap<string>) => void): string[] => {
    const map = fragmented(3); // 0–2, 4–6, 8–10
    const iterator = map[Symbol.iterator]();
    const seen = [iterator.next().value];
    change(map);
    seen.push(...iterator);
    return seen.map(({ start, end }) => `${start}-${end}`);
  };
  t.same(
    take(() => {}),
    ['0-2', '4-6', '8-10'],
  );
  t.same(
    take((map) => map.clear()),
    ['0-2'],
  );
  t.same(
    take((map) => map.delete(0, 6)),
    ['0-2', '8-10'],
  );
  t.same(
    take((map) => map.set(6, 7, 'new')),
    ['0-2', '4-6', '6-7', '8-10'],
    'what is added ahead is seen',
  );
  t.same(
    take((map) => map.set(0, 6, 'old')),
    ['0-2', '2-6', '8-10'],
    'a range that grew backwards is cut',
  );
  t.same(
    take((map) => map.set(9, 20, 'old')),
    ['0-2', '4-6', '8-10'],
    'nothing past the first end',
  );

  const map = fragmented(1);
  let visits = 0;
  for (const { end } of map) {
    map.set(end + 1, end + 2, 'chased');
    visits++;
  }
  t.equal(visits, 1, 'a loop cannot chase its own additions');
});

t.test('any change inside a loop leaves the iteration ordered, true and finite', async (t) => {
  fc.assert(
    fc.property(operations(0), operations(0, 60), fc.boolean(), (before, during, overGaps) => {
      const map = new RangeMap<Value>();
      const model = new UnitMap(0);
      for (const operation of before) for (const target of [map, model]) operation(target);
      const touched = new UnitMap(0);
      const initially = model.clone();
      const seen = new Set<number>();
      let at = 0;
      let limit = [...map].at(-1)?.end ?? 0;
      if (overGaps) limit = UNITS;
      for (const range of overGaps ? map.gaps(0, UNITS) : map) {
        assert.ok(at <= range.start && range.start < range.end && range.end <= limit);
        at = range.end;
        for (let unit = range.start; unit < range.end; unit++) {
          assert.equal(model.has(unit), !overGaps);
          if ('value' in range) assert.equal(model.get(unit), range.value);
          seen.add(unit);
        }
        const operation = during.pop();
        if (operation) for (const target of [map, model]) operation(target);
        for (let unit = 0; unit < UNITS; unit++) {
          if (model.has(unit) !== initially.has(unit)) touched.set(unit, unit + 1, undefined);
        }
      }
      for (let unit = 0; unit < limit; unit++) {
        if (!touched.has(unit) && initially.has(unit) !== overGaps) assert.ok(seen.has(unit), 'nothing is left out');
      }
    }),
    { numRuns: 500 },
  );
  t.pass('500 loops');
});
