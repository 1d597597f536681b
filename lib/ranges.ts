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
