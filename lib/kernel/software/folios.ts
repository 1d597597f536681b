import { type Range, RangeMap } from '../../ranges.ts';
import { GiB, MiB } from '../../uapi.ts';

/** A set of pages. */
export type Pages = Pick<RangeMap<true>, 'within' | 'gaps'>;
type Span = Pick<Range<unknown>, 'start' | 'end'>;

/**
 * Which pages of a file are together in one large folio: 1 GiB or 2 MiB, aligned in the file, all present and all private or all shared. A
 * folio is split no further than a cut through it asks for. Units: pages. Costs by ranges of folios of one size, never by folios.
 */
export class Folios {
  /** Sizes a folio may have, the largest first, without single pages. */
  readonly #sizes: readonly number[];
  /** Pages in large folios → the size. A range holds as many folios as fit. */
  readonly #large = new RangeMap<number>();
  readonly #present: Pages;
  readonly #private: Pages;

  /** @param largest Bytes. @param present Pages that exist. @param secret Pages that are private. */
  constructor(largest: number, pageSize: number, present: Pages, secret: Pages) {
    this.#sizes = [GiB, 2 * MiB].filter((size) => size <= largest).map((size) => size / pageSize);
    this.#present = present;
    this.#private = secret;
  }

  /** The folio of a page that exists. */
  at(page: number): Span {
    const size = this.#large.get(page) ?? 1;
    const start = page - (page % size);
    return { start, end: start + size };
  }

  /** The range, and what else its folios hold. */
  around(start: number, end: number): Span {
    return { start: this.at(start).start, end: Math.max(end, this.at(end - 1).end) };
  }

  /** The folios that a range would cut through, at most two. */
  cutBy(start: number, end: number): Span[] {
    const cut = [start, end]
      .map((page) => ({ page, folio: this.at(page) }))
      .filter(({ page, folio }) => page > folio.start);
    return cut
      .map(({ folio }) => folio)
      .filter((folio, at, all) => all.findIndex((one) => one.start === folio.start) === at);
  }

  /** Makes folios for what does not exist yet in a range, as large as fit. @returns what begins to exist, some of it outside the range. */
  allocate(start: number, end: number): Span[] {
    const largest = this.#sizes[0] ?? 1;
    const made: Span[] = [];
    const [from, to] = [start - (start % largest), Math.ceil(end / largest) * largest];
    for (const gap of this.#present.gaps(from, to)) {
      for (const part of this.#uniform(gap)) {
        const wanted = { start: Math.max(start, part.start), end: Math.min(end, part.end) };
        if (wanted.start < wanted.end) made.push(...this.#fill(part, wanted, this.#sizes));
      }
    }
    return made;
  }

  /** Splits folios until none lies across an end of the range. */
  split(start: number, end: number): void {
    for (const page of [start, end]) {
      for (let size = this.#large.get(page); size && page % size !== 0; size = this.#large.get(page)) {
        const first = page - (page % size);
        const smaller = this.#sizes[this.#sizes.indexOf(size) + 1];
        if (smaller) this.#large.set(first, first + size, smaller);
        else this.#large.delete(first, first + size);
      }
    }
  }

  /** Puts together what may be in one folio, in the range and around it. @param pinned Pages whose folio somebody holds, and that stay as they are. */
  merge(start: number, end: number, pinned: Iterable<Span>): void {
    const held = [...pinned];
    const largest = this.#sizes[0] ?? 1;
    const [from, to] = [start - (start % largest), Math.ceil(end / largest) * largest];
    for (const there of [...this.#present.within(from, to)])
      for (const part of this.#uniform(there)) this.#fill(part, part, this.#sizes, held);
  }

  /** The pages go; no folio lies across an end of the range. */
  remove(start: number, end: number): void {
    this.#large.delete(start, end);
  }

  /** How many folios of each size there are, by size in pages. */
  count(): Map<number, number> {
    const pages = new Map(this.#sizes.map((size) => [size, 0]));
    for (const { start, end, value } of this.#large) pages.set(value, (pages.get(value) ?? 0) + end - start);
    return new Map([...pages].map(([size, length]) => [size, length / size]));
  }

  /** The parts of a range that are all private or all shared. */
  *#uniform({ start, end }: Span): Generator<Span> {
    let at = start;
    for (const secret of [...this.#private.within(start, end)]) {
      if (secret.start > at) yield { start: at, end: secret.start };
      yield secret;
      at = secret.end;
    }
    if (at < end) yield { start: at, end };
  }

  /** Folios of the first size where `room` has whole ones that meet `wanted`, of the next size in what is left. */
  #fill(room: Span, wanted: Span, sizes: readonly number[], pinned: readonly Span[] = []): Span[] {
    const [size, ...smaller] = sizes;
    if (size === undefined) return wanted.start < wanted.end ? [wanted] : [];
    const floor = (page: number): number => page - (page % size);
    const ceil = (page: number): number => Math.ceil(page / size) * size;
    const whole = new RangeMap<true>();
    whole.set(Math.max(ceil(room.start), floor(wanted.start)), Math.min(floor(room.end), ceil(wanted.end)), true);
    for (const { start, end } of pinned) whole.delete(floor(start), ceil(end));
    const made: Span[] = [];
    for (const blocks of whole) {
      made.push(blocks);
      for (const part of [...this.#smallerThan(size, blocks)]) this.#large.set(part.start, part.end, size);
    }
    for (const rest of [...whole.gaps(wanted.start, wanted.end)])
      made.push(...this.#fill(rest.start < rest.end ? this.#roomLeft(room, rest, whole) : rest, rest, smaller, pinned));
    return made;
  }

  /** The parts of whole blocks that are not in folios of this size or a larger one yet. */
  *#smallerThan(size: number, { start, end }: Span): Generator<Span> {
    yield* this.#large.gaps(start, end);
    for (const range of this.#large.within(start, end)) if (range.value < size) yield range;
  }

  /** The room around a rest that no block has taken. */
  #roomLeft(room: Span, rest: Span, taken: RangeMap<true>): Span {
    for (const gap of taken.gaps(room.start, room.end)) if (gap.start <= rest.start && rest.end <= gap.end) return gap;
    return rest;
  }
}
