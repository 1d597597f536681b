import assert from 'node:assert/strict';
import fc from 'fast-check';
import { MADV_DONTNEED } from '../../lib/uapi.ts';
import { describe } from '../conformance/scenario.ts';
import type { World } from './world.ts';

/** Pages of the file under test. */
export const PAGES = 12;
const PUNCH_HOLE = 3;

/** One page as anybody would write it down: no ranges, no trees. */
interface Page {
  isPrivate: boolean;
  /** Mappings that have touched it. */
  readonly mappedBy: Set<number>;
  pins: number;
  content: number;
}

/** What the calls should come to, page by page. */
export class Oracle {
  readonly pages: Page[] = Array.from({ length: PAGES }, () => ({
    isPrivate: false,
    mappedBy: new Set(),
    pins: 0,
    content: 0,
  }));

  range(from: number, count: number): Page[] {
    return this.pages.slice(from, from + count);
  }

  convert(from: number, count: number, to: 'private' | 'shared', zero: boolean): string | number {
    const changing = this.range(from, count).filter((page) => page.isPrivate !== (to === 'private'));
    const held = to === 'private' && changing.find((page) => page.pins > 0 || page.mappedBy.size > 0);
    if (held) return `EAGAIN at ${this.pages.indexOf(held)}`;
    for (const page of changing) {
      page.isPrivate = to === 'private';
      if (zero) page.content = 0;
    }
    return 0;
  }
}

interface Real {
  readonly w: World;
  readonly file: number;
  readonly mappings: readonly number[];
  /** Those that hold pages now, with the pages they hold. */
  readonly pins: { release: () => void; pages: Page[] }[];
}

type Command = (oracle: Oracle, real: Real) => void;

const span = fc
  .tuple(fc.nat(PAGES - 1), fc.integer({ min: 1, max: PAGES }))
  .map(([from, count]) => [from, Math.min(count, PAGES - from)] as const);
const side = fc.constantFrom('private', 'shared');
const oneMapping = fc.nat(1);

const commands: readonly fc.Arbitrary<Command>[] = [
  fc.tuple(span, side, fc.constantFrom(0, 1, 2)).map(([[from, count], to, flags]) => (oracle, { w, file }) => {
    assert.equal(w.convert(file, from, count, to, flags), oracle.convert(from, count, to, flags === 1));
  }),
  fc
    .tuple(fc.nat(PAGES - 1), oneMapping, fc.integer({ min: 1, max: 255 }))
    .map(([number, which, value]) => (oracle, { w, mappings }) => {
      const page = oracle.pages[number] as Page;
      const result = describe(w.put(mappings[which] as number, number, value));
      assert.equal(result, page.isPrivate ? 'EFAULT' : '1');
      if (page.isPrivate) return;
      page.mappedBy.add(which);
      page.content = value;
    }),
  fc.tuple(span, oneMapping).map(([[from, count], which]) => (oracle, { w, mappings }) => {
    assert.equal(w.advise(mappings[which] as number, from, count, MADV_DONTNEED), 0);
    for (const page of oracle.range(from, count)) page.mappedBy.delete(which);
  }),
  span.map(([from, count]) => (oracle, { w, file, pins }) => {
    const pages = oracle.range(from, count);
    const release = w.kernel.pinPages(file, from * w.P, count * w.P);
    if (pages.some((page) => page.isPrivate)) {
      assert.equal(describe(release as number), 'EFAULT');
      return;
    }
    assert.equal(typeof release, 'function');
    for (const page of pages) page.pins++;
    pins.push({ release: release as () => void, pages });
  }),
  fc.nat(7).map((which) => (_oracle, { pins }) => {
    const [pin] = pins.splice(which, 1);
    pin?.release();
    for (const page of pin?.pages ?? []) page.pins--;
  }),
  span.map(([from, count]) => (oracle, { w, file, pins }) => {
    assert.equal(w.fallocate(file, PUNCH_HOLE, from, count), 0);
    const gone = oracle.range(from, count);
    for (const page of gone) {
      page.mappedBy.clear();
      page.pins = 0;
      page.content = 0;
    }
    for (const pin of pins) pin.pages = pin.pages.filter((page) => !gone.includes(page));
  }),
];

/** Everything that can be seen of the file without touching it. */
function compare(oracle: Oracle, { w, file }: Real): void {
  const ranges = w.privatePages(file);
  const isPrivate = oracle.pages.map((_page, at) => ranges.some(([start, end]) => at >= start && at < end));
  assert.deepEqual(
    isPrivate,
    oracle.pages.map((page) => page.isPrivate),
  );
}

/** What the shared pages hold, through a mapping of its own, which is gone again afterwards. */
function compareContents(oracle: Oracle, { w, file }: Real): void {
  const mapping = w.map(file, { pages: PAGES });
  for (const [at, { isPrivate, content }] of oracle.pages.entries())
    assert.equal(describe(w.get(mapping, at)), isPrivate ? 'EFAULT' : String(content));
  w.munmap(mapping);
}

/** Random calls against the oracle: every answer, and the state after each. */
export function againstOracle(open: () => { w: World; file: number }): void {
  const sequences = fc.array(fc.oneof(...commands), { maxLength: 40 });
  fc.assert(
    fc.property(sequences, (sequence) => {
      const { w, file } = open();
      const real: Real = {
        w,
        file,
        mappings: [w.map(file, { pages: PAGES }), w.map(file, { pages: PAGES })],
        pins: [],
      };
      const oracle = new Oracle();
      for (const command of sequence) {
        command(oracle, real);
        compare(oracle, real);
      }
      compareContents(oracle, real);
      assert.deepEqual(w.close(), []);
    }),
    { numRuns: 400 },
  );
}
