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

/** Ranges a leaf may hold between two calls; an edit may overfill it by two before it is split. */
const LEAF_MAX = 126;
/** A position is one number: the leaf's index times this, plus the index in the leaf. */
const STRIDE = LEAF_MAX + 2;

/** Up to LEAF_MAX consecutive ranges. */
class Leaf<V> {
  count = 0;
  /** Sum of the lengths, so that sums over many leaves need not look inside. */
  length = 0;
  readonly starts = new Float64Array(STRIDE);
  readonly ends = new Float64Array(STRIDE);
  readonly values: V[] = [];

  range(i: number): Range<V> {
    return { start: this.starts[i] as number, end: this.ends[i] as number, value: this.values[i] as V };
  }

  /** Index of the first range that ends after `at`; `count` when none does. */
  seek(at: number): number {
    const { ends } = this;
    let low = 0;
    let high = this.count;
    while (low < high) {
      const middle = (low + high) >>> 1;
      if ((ends[middle] as number) > at) high = middle;
      else low = middle + 1;
    }
    return low;
  }

  lengthOf(from: number, to: number): number {
    if (from === 0 && to === this.count) return this.length;
    let length = 0;
    for (let i = from; i < to; i++) length += (this.ends[i] as number) - (this.starts[i] as number);
    return length;
  }

  /** Replaces the ranges with index [from, to). */
  splice(from: number, to: number, pieces: readonly Range<V>[]): void {
    this.length -= this.lengthOf(from, to);
    this.starts.copyWithin(from + pieces.length, to, this.count);
    this.ends.copyWithin(from + pieces.length, to, this.count);
    this.values.splice(from, to - from, ...pieces.map((piece) => piece.value));
    this.count += pieces.length - (to - from);
    for (const piece of pieces) {
      this.starts[from] = piece.start;
      this.ends[from++] = piece.end;
      this.length += piece.end - piece.start;
    }
  }

  /** Appends the ranges of `other` from index `from` on. */
  append(other: Leaf<V>, from = 0): void {
    this.starts.set(other.starts.subarray(from, other.count), this.count);
    this.ends.set(other.ends.subarray(from, other.count), this.count);
    this.values.push(...other.values.slice(from));
    this.length += other.lengthOf(from, other.count);
    this.count += other.count - from;
  }
}

const NOTHING: readonly never[] = [];

/**
 * A map from integers 0 … 2^53 - 1 to values that costs by the number of ranges, never by their length: sorted ranges
 * in leaves of about a hundred, and an array of leaves.
 *
 * Bounds are integers, `end` at most 2^53; callers check that. A range with start ≥ end is empty: writing it changes
 * nothing, and asking about it finds nothing. Values are compared with `===`; neighbours with equal values are one range.
 * With n ranges a look-up costs O(log n), a change O(log n + ranges it replaces).
 *
 * Iterators are live: each step continues behind the range it gave last, in the map as it is then, up to the end that
 * the last range had when the iteration began. So a loop may change what it visits, and it terminates.
 */
export class RangeMap<V> implements ReadonlyRangeMap<V> {
  /** Never without a leaf; a leaf is empty only when it is the only one. */
  #leaves: Leaf<V>[] = [new Leaf()];
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
    const p = this.#seek(at);
    const leaf = this.#leafAt(p);
    const i = p % STRIDE;
    return i < leaf.count && (leaf.starts[i] as number) <= at ? leaf.values[i] : undefined;
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

  /** Costs by the number of leaves, a hundredth of the ranges in [start, end). */
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
    const lastLeaf = this.#leaves.at(-1) as Leaf<V>;
    const limit = Math.min(end, lastLeaf.ends[lastLeaf.count - 1] ?? 0);
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
      const range = leaf.range(i++);
      if (range.start >= limit) return;
      yield range.start < at || range.end > limit
        ? { start: Math.max(range.start, at), end: Math.min(range.end, limit), value: range.value }
        : range;
      at = range.end;
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
    copy.#size = this.#size;
    copy.#length = this.#length;
    return copy;
  }

  /** Replaces what lies in [start, end) by `range` or by nothing. */
  #write(start: number, end: number, range?: Range<V>): void {
    // From the first range that ends at or after start to the last that begins at or before end: ranges that only
    // touch are included, because they may merge.
    const p = this.#seek(start - 1);
    let q = this.#seek(end);
    const first = this.#rangeAtPosition(p);
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
  }

  #splitIfFull(k: number): void {
    const leaf = this.#leaves[k] as Leaf<V>;
    if (leaf.count <= LEAF_MAX) return;
    const right = new Leaf<V>();
    right.append(leaf, leaf.count >>> 1);
    leaf.splice(leaf.count >>> 1, leaf.count, NOTHING);
    this.#leaves.splice(k + 1, 0, right);
  }

  /** Joins leaf k with the next one when one is empty or both would half fill a leaf, so leaves stay a quarter full on average. */
  #joinIfSparse(k: number): void {
    const left = this.#leaves[k];
    const right = this.#leaves[k + 1];
    if (!left || !right) return;
    if (left.count && right.count && left.count + right.count > LEAF_MAX / 2) return;
    left.append(right);
    this.#leaves.splice(k + 1, 1);
  }

  #leafAt(position: number): Leaf<V> {
    return this.#leaves[leafOf(position)] as Leaf<V>;
  }

  /** Position of the first range that ends after `at`; behind the last range when none does. */
  #seek(at: number): number {
    const leaves = this.#leaves;
    let low = 0;
    let high = leaves.length - 1;
    while (low < high) {
      const middle = (low + high) >>> 1;
      const leaf = leaves[middle] as Leaf<V>;
      if ((leaf.ends[leaf.count - 1] as number) > at) high = middle;
      else low = middle + 1;
    }
    return low * STRIDE + (leaves[low] as Leaf<V>).seek(at);
  }

  #rangeAtPosition(position: number): Range<V> | undefined {
    const leaf = this.#leafAt(position);
    const i = position % STRIDE;
    return i < leaf.count ? leaf.range(i) : undefined;
  }

  /** The first range that ends after `at`. */
  #rangeFrom(at: number): Range<V> | undefined {
    return this.#rangeAtPosition(this.#seek(at));
  }
}

function leafOf(position: number): number {
  return Math.floor(position / STRIDE);
}
