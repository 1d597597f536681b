/** Half-open ranges [start, end) of integers below 2^53, each with a value; neighbours with equal values are one range. */
export interface Range<V> {
  readonly start: number;
  readonly end: number;
  readonly value: V;
}
export interface ReadonlyRangeMap<V> {
  /** Number of ranges. */
  readonly size: number;
  /** Sum of the ranges' lengths. */
  readonly length: number;
  get(at: number): V | undefined;
  /** The range that covers `at`. */
  rangeAt(at: number): Range<V> | undefined;
  /** Whether every integer of [start, end) is covered by one range (so by one value). */
  covers(start: number, end: number): boolean;
  /** Whether any integer of [start, end) is covered. */
  overlaps(start: number, end: number): boolean;
  /** How many integers of [start, end) are covered. */
  lengthWithin(start: number, end: number): number;
  /** The ranges that meet [start, end), cut to it, in order. Everything when omitted. */
  within(start?: number, end?: number): IterableIterator<Range<V>>;
  [Symbol.iterator](): IterableIterator<Range<V>>;
}

/**
 * Ranges a leaf may hold between two calls; an edit may overfill it by two before it is split. Smaller leaves make
 * a million ranges slower to find, larger ones slower to edit.
 */
const LEAF_MAX = 254;
/** A position is one number: the leaf's index times this, plus the index in the leaf. */
const STRIDE = LEAF_MAX + 2;

/** Ranges a new leaf has room for. */
const FEW = 4;

const NOTHING: readonly never[] = [];

/** Consecutive ranges, in order. Indexes are not checked. */
class Leaf<V> {
  count = 0;
  /** Sum of the lengths, so that sums over many leaves need not look inside. */
  length = 0;
  /** start, end, start, end, …: whoever reads the one reads the other, and this way it is one cache line. It grows: most maps stay small. */
  bounds = new Float64Array(2 * FEW);
  readonly values: V[] = [];

  start(i: number): number {
    return this.bounds[2 * i] as number;
  }

  end(i: number): number {
    return this.bounds[2 * i + 1] as number;
  }

  get lastEnd(): number {
    return this.count ? this.end(this.count - 1) : 0;
  }

  range(i: number): Range<V> {
    return { start: this.start(i), end: this.end(i), value: this.values[i] as V };
  }

  /** Index of the first range that ends after `at`; `count` when none does. */
  seek(at: number): number {
    let low = 0;
    let high = this.count;
    while (low < high) {
      const middle = (low + high) >>> 1;
      if (this.end(middle) > at) high = middle;
      else low = middle + 1;
    }
    return low;
  }

  /** Sum of the lengths of the ranges with index [from, to). */
  lengthOf(from: number, to: number): number {
    if (from === 0 && to === this.count) return this.length;
    let length = 0;
    for (let i = from; i < to; i++) length += this.end(i) - this.start(i);
    return length;
  }

  /** Replaces the ranges with index [from, to). */
  splice(from: number, to: number, pieces: readonly Range<V>[]): void {
    this.#reserve(this.count + pieces.length - (to - from));
    this.length -= this.lengthOf(from, to);
    this.bounds.copyWithin(2 * (from + pieces.length), 2 * to, 2 * this.count);
    this.values.splice(from, to - from, ...pieces.map((piece) => piece.value));
    this.count += pieces.length - (to - from);
    let at = 2 * from;
    for (const piece of pieces) {
      this.bounds[at++] = piece.start;
      this.bounds[at++] = piece.end;
      this.length += piece.end - piece.start;
    }
  }

  /** Appends the ranges of `other` from index `from` on. */
  append(other: Leaf<V>, from = 0): void {
    this.#reserve(this.count + other.count - from);
    this.bounds.set(other.bounds.subarray(2 * from, 2 * other.count), 2 * this.count);
    this.values.push(...other.values.slice(from));
    this.length += other.lengthOf(from, other.count);
    this.count += other.count - from;
  }

  #reserve(count: number): void {
    if (2 * count <= this.bounds.length) return;
    const { bounds } = this;
    this.bounds = new Float64Array(2 * (count <= 4 * FEW ? 4 * FEW : STRIDE));
    this.bounds.set(bounds);
  }
}

/**
 * A map from integers 0 … 2^53 - 1 to values that costs by the number of ranges, never by their length: sorted ranges
 * in leaves of up to 254, and an array of leaves.
 *
 * Bounds are integers, `end` at most 2^53; callers check that. A range with start ≥ end is empty: writing it changes
 * nothing, and asking about it finds nothing. Values are compared with `===`; neighbours with equal values are one range.
 * With n ranges a look-up costs O(log n), a change O(log n + ranges it replaces); a range takes about 40 bytes.
 *
 * Iterators are live, and a loop may change the map it visits. Each step goes on from the end of what it gave before, in
 * the map as it is then: a range that grew backwards is cut there. An iteration never goes past the end that the last
 * range has at its first step, so what is appended meanwhile is not visited and no loop can chase its own additions.
 */
export class RangeMap<V> implements ReadonlyRangeMap<V> {
  /** Never without a leaf; a leaf is empty only when it is the only one. */
  #leaves: Leaf<V>[] = [new Leaf()];
  /** Where each leaf's last range ends: a search reads this array instead of one cache line per leaf. */
  #lastEnds: number[] = [0];
  #size = 0;
  #length = 0;
  /** Counts changes: tells an iterator that its position may have moved. */
  #version = 0;

  get size(): number {
    return this.#size;
  }

  get length(): number {
    return this.#length;
  }

  get(at: number): V | undefined {
    return this.rangeAt(at)?.value;
  }

  rangeAt(at: number): Range<V> | undefined {
    const range = this.#rangeFrom(at);
    return range && range.start <= at ? range : undefined;
  }

  /** Whether one range covers every integer of [start, end); an empty range is always covered. */
  covers(start: number, end: number): boolean {
    if (start >= end) return true;
    const range = this.#rangeFrom(start);
    return range !== undefined && range.start <= start && range.end >= end;
  }

  overlaps(start: number, end: number): boolean {
    if (start >= end) return false;
    const range = this.#rangeFrom(start);
    return range !== undefined && range.start < end;
  }

  /** Costs by the number of leaves, about a hundredth of the ranges in [start, end). */
  lengthWithin(start: number, end: number): number {
    if (start >= end) return 0;
    const p = this.#seek(start);
    const q = this.#seek(end);
    let length = 0;
    for (let k = leafOf(p), i = p % STRIDE; k <= leafOf(q); k++, i = 0) {
      const leaf = this.#leaves[k] as Leaf<V>;
      length += leaf.lengthOf(i, k === leafOf(q) ? q % STRIDE : leaf.count);
    }
    const first = this.#rangeFrom(start);
    const last = this.#rangeFrom(end);
    if (last && last.start < end) length += end - last.start;
    if (first && first.start < start) length -= start - first.start;
    return length;
  }

  *within(start = 0, end = Number.MAX_SAFE_INTEGER + 1): IterableIterator<Range<V>> {
    const limit = Math.min(end, this.#lastEnds.at(-1) as number);
    let at = start;
    let version = -1;
    let k = 0;
    let i = 0;
    while (at < limit) {
      if (version !== this.#version) {
        const p = this.#seek(at);
        k = leafOf(p);
        i = p % STRIDE;
        version = this.#version;
      }
      let leaf = this.#leaves[k] as Leaf<V>;
      if (i === leaf.count) {
        const next = this.#leaves[++k];
        if (!next) return;
        leaf = next;
        i = 0;
      }
      const from = Math.max(leaf.start(i), at);
      if (from >= limit) return;
      at = Math.min(leaf.end(i), limit);
      yield { start: from, end: at, value: leaf.values[i++] as V };
    }
  }

  [Symbol.iterator](): IterableIterator<Range<V>> {
    return this.within();
  }

  /** The parts of [start, end) that no range covers, in order; each is a gap at the moment it is given. */
  *gaps(start: number, end: number): IterableIterator<{ readonly start: number; readonly end: number }> {
    let at = start;
    while (at < end) {
      const range = this.#rangeFrom(at);
      const stop = Math.min(range?.start ?? end, end);
      if (stop > at) yield { start: at, end: stop };
      at = stop > at || !range ? stop : range.end;
    }
  }

  /** Gives every integer of [start, end) this value, whatever it had. */
  set(start: number, end: number, value: V): void {
    if (start < end) this.#write(start, end, { start, end, value });
  }

  /** Leaves every integer of [start, end) uncovered. */
  delete(start: number, end: number): void {
    if (start < end) this.#write(start, end);
  }

  clear(): void {
    this.#leaves = [new Leaf()];
    this.#lastEnds = [0];
    this.#size = 0;
    this.#length = 0;
    this.#version++;
  }

  /** An independent copy; costs O(n). */
  clone(): RangeMap<V> {
    const copy = new RangeMap<V>();
    copy.#leaves = this.#leaves.map((leaf) => {
      const twin = new Leaf<V>();
      twin.append(leaf);
      return twin;
    });
    copy.#lastEnds = this.#lastEnds.slice();
    copy.#size = this.#size;
    copy.#length = this.#length;
    return copy;
  }

  /** Replaces what lies in [start, end) by `range` or by nothing. */
  #write(start: number, end: number, range?: Range<V>): void {
    // Ranges that only touch [start, end) are rewritten too, because they may merge: from the first that ends at or
    // after start to the last that begins at or before end.
    const p = this.#seek(start - 1);
    const first = this.#rangeAtPosition(p);
    let q = first && first.end > end ? p : this.#seek(end);
    const last = this.#rangeAtPosition(q);
    const pieces: Range<V>[] = [];
    let middle = range;
    if (first && first.start < start) {
      if (middle && first.value === middle.value) middle = { ...middle, start: first.start };
      else pieces.push({ ...first, end: start });
    }
    if (middle) pieces.push(middle);
    if (last && last.start <= end) {
      q++;
      if (middle && last.value === middle.value) pieces[pieces.length - 1] = { ...middle, end: last.end };
      else pieces.push({ ...last, start: end });
    }
    this.#splice(p, q, pieces);
  }

  /** Replaces the ranges at positions [p, q). */
  #splice(p: number, q: number, pieces: readonly Range<V>[]): void {
    const leaves = this.#leaves;
    const a = leafOf(p);
    const b = leafOf(q);
    if (a === b) {
      this.#spliceLeaf(a, p % STRIDE, q % STRIDE, pieces);
    } else {
      // What goes is removed before what comes is added: sums above 2^53 would be rounded.
      this.#spliceLeaf(b, 0, q % STRIDE, NOTHING);
      this.#lastEnds.splice(a + 1, b - a - 1);
      for (const leaf of leaves.splice(a + 1, b - a - 1)) {
        this.#size -= leaf.count;
        this.#length -= leaf.length;
      }
      this.#spliceLeaf(a, p % STRIDE, (leaves[a] as Leaf<V>).count, pieces);
    }
    this.#version++;
    this.#splitIfFull(a);
    this.#joinIfSparse(a + 1);
    this.#joinIfSparse(a);
    this.#joinIfSparse(a - 1);
  }

  #spliceLeaf(k: number, from: number, to: number, pieces: readonly Range<V>[]): void {
    const leaf = this.#leaves[k] as Leaf<V>;
    this.#size -= leaf.count;
    this.#length -= leaf.length;
    leaf.splice(from, to, pieces);
    this.#size += leaf.count;
    this.#length += leaf.length;
    this.#lastEnds[k] = leaf.lastEnd;
  }

  #splitIfFull(k: number): void {
    const leaf = this.#leaves[k] as Leaf<V>;
    if (leaf.count <= LEAF_MAX) return;
    const right = new Leaf<V>();
    right.append(leaf, leaf.count >>> 1);
    leaf.splice(leaf.count >>> 1, leaf.count, NOTHING);
    this.#leaves.splice(k + 1, 0, right);
    this.#lastEnds.splice(k, 1, leaf.lastEnd, right.lastEnd);
  }

  /** Two neighbours that fit in half a leaf become one, so leaves stay a quarter full on average and none is empty. */
  #joinIfSparse(k: number): void {
    // Asked first, because V8 looks up an index that is not in the array slowly.
    if (k < 0 || k + 1 >= this.#leaves.length) return;
    const left = this.#leaves[k] as Leaf<V>;
    const right = this.#leaves[k + 1] as Leaf<V>;
    if (left.count && right.count && left.count + right.count > LEAF_MAX / 2) return;
    left.append(right);
    this.#leaves.splice(k + 1, 1);
    this.#lastEnds.splice(k, 2, left.lastEnd);
  }

  /** Position of the first range that ends after `at`; behind the last range when none does. */
  #seek(at: number): number {
    const lastEnds = this.#lastEnds;
    let low = 0;
    let high = lastEnds.length - 1;
    while (low < high) {
      const middle = (low + high) >>> 1;
      if ((lastEnds[middle] as number) > at) high = middle;
      else low = middle + 1;
    }
    return low * STRIDE + (this.#leaves[low] as Leaf<V>).seek(at);
  }

  #rangeAtPosition(position: number): Range<V> | undefined {
    const leaf = this.#leaves[leafOf(position)] as Leaf<V>;
    const i = position % STRIDE;
    return i < leaf.count ? leaf.range(i) : undefined;
  }

  /** The first range that ends after `at`. */
  #rangeFrom(at: number): Range<V> | undefined {
    return this.#rangeAtPosition(this.#seek(at));
  }
}

function leafOf(position: number): number {
  return (position / STRIDE) | 0;
}
