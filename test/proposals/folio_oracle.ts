import assert from 'node:assert/strict';
import fc from 'fast-check';
import { Folios } from '../../lib/kernel/software/folios.ts';
import { RangeMap } from '../../lib/ranges.ts';
import { GiB, MiB } from '../../lib/uapi.ts';

/** Pages so large that a 1 GiB folio is an array a test can look through. */
const PAGE = MiB / 2;
const [HUGE, LARGE] = [GiB / PAGE, (2 * MiB) / PAGE];
const PAGES = 2 * HUGE;

/** One entry per page: 0 for a page that is not there, else the size of its folio. */
class Oracle {
  readonly sizes: number[] = Array.from({ length: PAGES }, () => 0);
  readonly isPrivate: boolean[] = Array.from({ length: PAGES }, () => false);

  allocate(start: number, end: number): void {
    for (let page = start; page < end; page++) {
      if (this.sizes[page] !== 0) continue;
      const size = [HUGE, LARGE].find((one) => this.#isOne(page - (page % one), one, (there) => there === 0)) ?? 1;
      this.sizes.fill(size, page - (page % size), page - (page % size) + size);
    }
  }

  split(page: number): void {
    for (let size = this.sizes[page] ?? 0; size > 1 && page % size !== 0; size = this.sizes[page] ?? 0) {
      const first = page - (page % size);
      this.sizes.fill(size === HUGE ? LARGE : 1, first, first + size);
    }
  }

  merge(start: number, end: number, pinned: ReadonlySet<number>): void {
    const [from, to] = [start - (start % HUGE), Math.ceil(end / HUGE) * HUGE];
    for (const size of [LARGE, HUGE]) {
      for (let first = from; first < to; first += size) {
        const held = Array.from({ length: size }, (_, at) => first + at).some((page) => pinned.has(page));
        if (held || !this.#isOne(first, size, (there) => there > 0)) continue;
        for (let page = first; page < first + size; page++)
          this.sizes[page] = Math.max(size, this.sizes[page] as number);
      }
    }
  }

  convert(start: number, end: number, toPrivate: boolean, pinned: ReadonlySet<number>): void {
    for (let page = start; page < end; page++) {
      if (this.isPrivate[page] === toPrivate) continue;
      if (page === start || this.isPrivate[page - 1] === toPrivate) this.split(page);
      if (page + 1 === end || this.isPrivate[page + 1] === toPrivate) this.split(page + 1);
    }
    this.isPrivate.fill(toPrivate, start, end);
    this.merge(start, end, pinned);
  }

  punch(start: number, end: number): void {
    this.split(start);
    this.split(end);
    this.sizes.fill(0, start, end);
  }

  #isOne(first: number, size: number, is: (size: number) => boolean): boolean {
    for (let page = first; page < first + size; page++) {
      if (!is(this.sizes[page] as number) || this.isPrivate[page] !== this.isPrivate[first]) return false;
    }
    return true;
  }
}

/** The same on ranges. */
class Real {
  readonly present = new RangeMap<true>();
  readonly secret = new RangeMap<true>();
  readonly folios = new Folios(GiB, PAGE, this.present, this.secret);

  allocate(start: number, end: number): void {
    for (const made of this.folios.allocate(start, end)) this.present.set(made.start, made.end, true);
  }

  convert(start: number, end: number, toPrivate: boolean, pinned: ReadonlySet<number>): void {
    const parts = [...(toPrivate ? this.secret.gaps(start, end) : this.secret.within(start, end))];
    for (const part of parts) this.folios.split(part.start, part.end);
    if (toPrivate) this.secret.set(start, end, true);
    else this.secret.delete(start, end);
    this.folios.merge(
      start,
      end,
      [...pinned].map((page) => ({ start: page, end: page + 1 })),
    );
  }

  punch(start: number, end: number): void {
    this.folios.split(start, end);
    this.folios.remove(start, end);
    this.present.delete(start, end);
  }

  sizes(): number[] {
    return Array.from({ length: PAGES }, (_, page) => {
      if (!this.present.get(page)) return 0;
      const { start, end } = this.folios.at(page);
      assert.ok(start <= page && page < end);
      return end - start;
    });
  }
}

/** Ends near the borders of folios, where everything happens, and anywhere. */
const border = fc
  .tuple(fc.constantFrom(0, LARGE, 7 * LARGE, HUGE - LARGE, HUGE, HUGE + LARGE, PAGES), fc.integer({ min: -2, max: 2 }))
  .map(([at, by]) => Math.min(PAGES, Math.max(0, at + by)));
const span = fc
  .tuple(fc.oneof(border, fc.nat(PAGES)), fc.oneof(border, fc.nat(PAGES)))
  .map(([a, b]) => [Math.min(a, b), Math.max(a, b)] as const)
  .filter(([start, end]) => start < end);

type Step = (on: Oracle | Real, pinned: ReadonlySet<number>) => void;
const step: fc.Arbitrary<Step> = fc.oneof(
  span.map(
    ([start, end]): Step =>
      (on) =>
        on.allocate(start, end),
  ),
  fc.tuple(span, fc.boolean()).map(
    ([[start, end], toPrivate]): Step =>
      (on, pinned) =>
        on.convert(start, end, toPrivate, pinned),
  ),
  span.map(
    ([start, end]): Step =>
      (on) =>
        on.punch(start, end),
  ),
);

/** Random allocations, conversions and punches: the folio of every page after each. @param pins Pages that are pinned all along. */
export function foliosAgainstOracle(): void {
  fc.assert(
    fc.property(fc.array(step, { maxLength: 12 }), fc.array(fc.nat(PAGES - 1), { maxLength: 2 }), (steps, pins) => {
      const [oracle, real, pinned] = [new Oracle(), new Real(), new Set(pins)];
      for (const each of steps) {
        each(oracle, pinned);
        each(real, pinned);
        assert.deepEqual(real.sizes(), oracle.sizes);
      }
      const counted = new Map(
        [HUGE, LARGE].map((size) => [size, oracle.sizes.filter((one) => one === size).length / size]),
      );
      assert.deepEqual(real.folios.count(), counted);
    }),
    { numRuns: 150 },
  );
}
