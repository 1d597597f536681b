import type { GuestRange, Visibility } from './guest_range.ts';
import type { ReadonlyRangeMap } from './ranges.ts';
import { guardConstructor, type internal } from './resource.ts';
import { guestRange, integer } from './validate.ts';

/** The address space ends where a page number no longer fits: 2^53-1 bytes as a number, 2^64 in the kernel. */
const LAST = Number.MAX_SAFE_INTEGER;

/**
 * What is private now. The kernel has no getter; this is what was set through this VM, as an interval map: costs grow with the
 * number of ranges, not of pages. Addresses and sizes in bytes.
 */
export class MemoryAttributes implements Iterable<GuestRange & { readonly visibility: Visibility }> {
  readonly #source: () => ReadonlyRangeMap<true>;
  readonly #pageSize: number;

  /** @internal */
  constructor(token: typeof internal, source: () => ReadonlyRangeMap<true>, pageSize: number) {
    guardConstructor(token, 'vm.attributes');
    this.#source = source;
    this.#pageSize = pageSize;
    Object.freeze(this);
  }

  /** The visibility of the page that holds the address. */
  at(address: number): Visibility {
    return this.#gfns.get(Math.floor(integer('address', address) / this.#pageSize)) ? 'private' : 'shared';
  }

  /** 'mixed' when the range has pages of both kinds. */
  state(range: GuestRange): Visibility | 'mixed' {
    const { start, end } = this.#pages(range);
    if (!this.#gfns.overlaps(start, end)) return 'shared';
    return this.#gfns.covers(start, end) ? 'private' : 'mixed';
  }

  /** In ascending order, as large as possible; only what lies within the range, when there is one. */
  privateRanges(within?: GuestRange): GuestRange[] {
    if (within === undefined)
      return Array.from(this.#gfns.within(0, LAST), ({ start, end }) => this.#bytes(start, end));
    const { address, size } = guestRange('within', within);
    const last = address + size;
    const [start, end] = [Math.floor(address / this.#pageSize), Math.ceil(last / this.#pageSize)];
    if (!this.#gfns.overlaps(start, end)) return [];
    return Array.from(this.#gfns.within(start, end), (range) => {
      const whole = this.#bytes(range.start, range.end);
      const from = Math.max(address, whole.address);
      return { address: from, size: Math.min(last, whole.address + whole.size) - from };
    });
  }

  /** @internal The parts of a range that are one or the other. */
  rangesOf(visibility: Visibility, within: GuestRange): GuestRange[] {
    const secret = this.privateRanges(within);
    if (visibility === 'private') return secret;
    const open: GuestRange[] = [];
    let at = within.address;
    for (const range of [...secret, { address: within.address + within.size, size: 0 }]) {
      if (range.address > at) open.push({ address: at, size: range.address - at });
      at = range.address + range.size;
    }
    return open;
  }

  get privateBytes(): number {
    return this.#gfns.length * this.#pageSize;
  }

  /** Every private range and the shared ones between them, in ascending order; what lies after the last private page is left out. */
  *[Symbol.iterator](): Iterator<GuestRange & { readonly visibility: Visibility }> {
    let shared = 0;
    for (const { start, end } of this.#gfns) {
      if (start > shared) yield { ...this.#bytes(shared, start), visibility: 'shared' };
      yield { ...this.#bytes(start, end), visibility: 'private' };
      shared = end;
    }
  }

  get #gfns(): ReadonlyRangeMap<true> {
    return this.#source();
  }

  #pages(range: GuestRange): { start: number; end: number } {
    const { address, size } = guestRange('range', range);
    return { start: Math.floor(address / this.#pageSize), end: Math.ceil((address + size) / this.#pageSize) };
  }

  #bytes(start: number, end: number): GuestRange {
    return { address: start * this.#pageSize, size: (end - start) * this.#pageSize };
  }
}
