import { RangeMap } from './ranges.ts';

/** Somebody's use of a range. */
export interface Hold<H> {
  readonly start: number;
  readonly end: number;
  readonly holder: H;
}

/** Who uses which part of something, as an interval map: costs grow with the pieces that are touched. */
export class Holds<H> {
  readonly #ranges = new RangeMap<readonly Hold<H>[]>();

  add(start: number, end: number, holder: H): Hold<H> {
    const hold: Hold<H> = { start, end, holder };
    // As a rule nobody else is there, and this is on the way of every memslot.
    if (this.#ranges.overlaps(start, end)) this.#change(hold, (holds) => [...holds, hold]);
    else this.#ranges.set(start, end, [hold]);
    return hold;
  }

  delete(hold: Hold<H>): void {
    const { start, end } = hold;
    const there = this.#ranges.rangeAt(start);
    const alone = there?.start === start && there.end === end && there.value.length === 1 && there.value[0] === hold;
    if (alone) this.#ranges.delete(start, end);
    else this.#change(hold, (holds) => holds.filter((other) => other !== hold));
  }

  /** The first integer of [start, end) that somebody holds. */
  first(start: number, end: number): number | undefined {
    return this.#ranges.overlaps(start, end) ? this.#ranges.within(start, end).next().value?.start : undefined;
  }

  /** The parts of [start, end) that nobody holds. */
  free(start: number, end: number): Iterable<{ readonly start: number; readonly end: number }> {
    return this.#ranges.gaps(start, end);
  }

  /** Who holds any of [start, end). */
  holders(start: number, end: number): Set<H> {
    const holders = new Set<H>();
    if (!this.#ranges.overlaps(start, end)) return holders;
    for (const { value } of this.#ranges.within(start, end)) for (const { holder } of value) holders.add(holder);
    return holders;
  }

  /** Neighbours that the same holds cover become one piece again, or short holds would leave a long one in crumbs. */
  #change({ start, end }: Hold<H>, change: (holds: readonly Hold<H>[]) => readonly Hold<H>[]): void {
    const gaps = Array.from(this.#ranges.gaps(start, end), (gap) => ({ ...gap, value: [] as readonly Hold<H>[] }));
    const pieces = [...this.#ranges.within(start, end), ...gaps].sort((a, b) => a.start - b.start);
    let before = start > 0 ? this.#ranges.get(start - 1) : undefined;
    for (const piece of pieces) {
      before = same(change(piece.value), before);
      if (before.length > 0) this.#ranges.set(piece.start, piece.end, before);
      else this.#ranges.delete(piece.start, piece.end);
    }
    const after = this.#ranges.rangeAt(end);
    if (after) this.#ranges.set(after.start, after.end, same(after.value, before));
  }
}

/** The one that is there already, if they are equal: a RangeMap joins ranges whose values are identical. */
function same<T>(list: readonly T[], known: readonly T[] | undefined): readonly T[] {
  return known?.length === list.length && list.every((one, index) => one === known[index]) ? known : list;
}
