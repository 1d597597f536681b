import { RangeMap } from '../../ranges.ts';
import type { VmFile } from '../state.ts';
import type { TakenPages } from './protected_pages.ts';

/** A window covers whole spans of this many bytes: the most that one ArrayBuffer can hold on Node 20. */
const SPAN = 2 ** 32;

/** A file of the host that has the bytes, except those that a window shows or that it could not take. */
export interface Disk {
  read(offset: number, target: Uint8Array): void;
  /** Whether it took the bytes. */
  write(offset: number, source: Uint8Array): boolean;
  zero(offset: number, end: number): void;
  /** The parts of a range that are not holes. */
  dataWithin(offset: number, end: number): Iterable<{ readonly start: number; readonly end: number }>;
}

/** Bytes that are together in one buffer, because they are, or may be, seen through a window. */
class Extent {
  readonly start: number;
  readonly end: number;
  #buffer: ArrayBuffer;

  constructor(start: number, end: number) {
    this.start = start;
    this.end = end;
    this.#buffer = new ArrayBuffer(end - start);
  }

  /** A new one, of zeros, where somebody has transferred the old one away: its bytes are theirs now. */
  get buffer(): ArrayBuffer {
    if (this.#buffer.byteLength === 0) this.#buffer = new ArrayBuffer(this.end - this.start);
    return this.#buffer;
  }

  /** Takes the bytes out of every view's reach. */
  detach(): void {
    this.#buffer = structuredClone(this.buffer, { transfer: [this.buffer] });
  }
}

/**
 * The bytes of a file or of anonymous memory, sparse: nothing is held for a page until it is written. Units: bytes, and
 * pages where a name says so.
 *
 * A page is by itself until somebody asks for a window; then its whole span moves into one ArrayBuffer, whose untouched parts cost
 * nothing either, since the allocator gives zero pages on demand.
 */
export class PageStore {
  readonly pageSize: number;
  /** Pages that exist, whatever they hold. */
  readonly #present = new RangeMap<true>();
  /** Of these, the ones that were allocated and never touched: mincore(2) does not count them, cachestat(2) does. */
  readonly #untouched = new RangeMap<true>();
  readonly #pages = new Map<number, Uint8Array>();
  readonly #extents: Extent[] = [];
  /** Pages that someone may write to without our knowing. The value says whether the view counts as a use of them. */
  readonly #windowed = new RangeMap<boolean>();

  readonly #size: () => number;
  /** Who is told of pages that are about to go. */
  readonly watchers = new Set<(startPage: number, endPage: number) => void>();
  /** What guests of protected VMs have. */
  readonly taken = new RangeMap<TakenPages>();
  /** Ordinary VMs of such a host that have mapped any of it. */
  readonly guests = new Set<VmFile>();
  /** What else comes to be when pages do: asked before each time. */
  grow: ((startPage: number, endPage: number) => Iterable<{ readonly start: number; readonly end: number }>) | null =
    null;
  #zeroPage: Uint8Array | null = null;
  #clock = 0;
  /** Pages → the clock when they were unmapped; nothing before a guest has mapped any. */
  readonly #changed = new RangeMap<number>();
  #isMapped = false;
  readonly #disk: Disk | null;

  /** @param size Bytes of what is stored, which may change: a window's buffer need not be larger. */
  constructor(pageSize: number, size: () => number, disk: Disk | null = null) {
    this.pageSize = pageSize;
    this.#size = size;
    this.#disk = disk;
  }

  /** Counts the times that pages went, or that their mappings did. */
  get clock(): number {
    this.#isMapped = true;
    return this.#clock;
  }

  /** When the mappings of a page went for the last time. */
  changedAt(page: number): number {
    return this.#changed.get(page) ?? 0;
  }

  /** Takes pages out of every table that maps them. They stay. */
  unmap(startPage: number, endPage: number): void {
    if (this.#isMapped && startPage < endPage) this.#changed.set(startPage, endPage, ++this.#clock);
  }

  /** Makes pages exist, as fallocate(2) does; content that is there stays. */
  allocate(startPage: number, endPage: number): void {
    this.#grow(startPage, endPage);
    this.#add(startPage, endPage);
  }

  /** Makes pages exist because something touches them. */
  touch(startPage: number, endPage: number): void {
    this.#grow(startPage, endPage);
    this.#present.set(startPage, endPage, true);
    this.#untouched.delete(startPage, endPage);
  }

  /** Gives pages back: they read as zeros when they exist again. */
  discard(startPage: number, endPage: number): void {
    for (const watcher of [...this.watchers]) watcher(startPage, endPage);
    this.unmap(startPage, endPage);
    this.clear(startPage, endPage);
    this.#present.delete(startPage, endPage);
    this.#untouched.delete(startPage, endPage);
  }

  /** Zeroes whole pages, and leaves them where they are. */
  clear(startPage: number, endPage: number): void {
    this.#noticeWrites(startPage, endPage);
    for (const extent of this.#extents) {
      const start = Math.max(startPage * this.pageSize, extent.start);
      this.#zero(extent, start, Math.min(endPage * this.pageSize, extent.end));
    }
    if (this.#pages.size > 0) this.#forget(startPage, endPage);
    this.#disk?.zero(startPage * this.pageSize, endPage * this.pageSize);
  }

  /** Zeroes bytes inside pages that exist, as a hole smaller than a page does. */
  zero(offset: number, end: number): void {
    this.#disk?.zero(offset, end);
    for (const { start, end: stop } of this.#present.within(
      Math.floor(offset / this.pageSize),
      Math.ceil(end / this.pageSize),
    )) {
      for (let page = start; page < stop; page++) {
        const from = Math.max(offset, page * this.pageSize);
        const to = Math.min(end, (page + 1) * this.pageSize);
        this.#bytesAt(from, to)?.fill(0);
      }
    }
  }

  /** The pages that exist, live, as far as calls have said so. */
  get pages(): Pick<RangeMap<true>, 'within' | 'gaps'> {
    return this.#present;
  }

  residentPages(startPage: number, endPage: number): number {
    this.#noticeWrites(startPage, endPage);
    return this.#present.lengthWithin(startPage, endPage);
  }

  /** Bit 0 of one byte per page. */
  residency(startPage: number, endPage: number, target: Uint8Array): void {
    this.#noticeWrites(startPage, endPage);
    target.fill(0, 0, endPage - startPage);
    for (const { start, end } of this.#present.within(startPage, endPage))
      target.fill(1, start - startPage, end - startPage);
    for (const { start, end } of this.#untouched.within(startPage, endPage))
      target.fill(0, start - startPage, end - startPage);
  }

  /** The existing parts of a range of pages, in order. */
  presentWithin(
    startPage: number,
    endPage: number,
  ): IterableIterator<{ readonly start: number; readonly end: number }> {
    this.#noticeWrites(startPage, endPage);
    return this.#present.within(startPage, endPage);
  }

  /** The first page that exists and holds something, if only zeros: not one that was allocated and left alone. */
  firstTouched(startPage: number, endPage: number): number | undefined {
    for (const { start, end } of this.presentWithin(startPage, endPage))
      for (const touched of this.#untouched.gaps(start, end)) return touched.start;
    return undefined;
  }

  read(offset: number, target: Uint8Array): void {
    this.#pieces(offset, target.length, (at, position, length) => {
      const source = this.#bytesAt(at, at + length);
      if (source) target.set(source, position);
      else if (this.#disk) this.#disk.read(at, target.subarray(position, position + length));
      else target.fill(0, position, position + length);
    });
  }

  write(offset: number, source: Uint8Array): void {
    if (source.length === 0) return;
    this.touch(Math.floor(offset / this.pageSize), Math.ceil((offset + source.length) / this.pageSize));
    this.#pieces(offset, source.length, (at, position, length) => {
      const piece = source.subarray(position, position + length);
      let page = this.#bytesAt(at, at + length);
      if (this.#disk?.write(at, piece) && !page) return;
      if (!page) {
        const number = Math.floor(at / this.pageSize);
        const whole = new Uint8Array(this.pageSize);
        this.#disk?.read(number * this.pageSize, whole);
        this.#pages.set(number, whole);
        page = whole.subarray(at - number * this.pageSize);
      }
      page.set(piece);
    });
  }

  /** Puts on the disk what is only here: what windows show, and what the disk did not take before. Whether it took all of it. */
  writeBack(): boolean {
    const { pageSize } = this;
    let all = true;
    for (const [page, bytes] of this.#pages) {
      if (this.#disk?.write(page * pageSize, bytes)) this.#pages.delete(page);
      else all = false;
    }
    for (const { start, end } of this.#windowed)
      for (const part of this.presentWithin(start, end))
        for (let page = part.start; page < part.end; page++)
          all =
            (this.#disk?.write(page * pageSize, this.#bytesAt(page * pageSize, (page + 1) * pageSize) as Uint8Array) &&
              all) ||
            false;
    return all;
  }

  /** A live view, or null where its bytes are in two windows already that cannot be one. @param holds Whether it counts as a use of its pages. */
  window(offset: number, length: number, holds = true): Uint8Array | null {
    const end = offset + length;
    let extent = this.#extents.find((one) => one.start <= offset && end <= one.end);
    if (!extent) {
      const start = Math.floor(offset / SPAN) * SPAN;
      const span = { start, end: Math.max(end, Math.min(start + SPAN, this.#size())) };
      const wanted = end <= start + SPAN ? span : { start: offset, end };
      if (this.#extents.some((one) => one.start < wanted.end && wanted.start < one.end)) return null;
      extent = this.#materialize(wanted.start, wanted.end);
    }
    const [first, last] = [Math.floor(offset / this.pageSize), Math.ceil(end / this.pageSize)];
    for (const gap of holds ? [{ start: first, end: last }] : [...this.#windowed.gaps(first, last)])
      this.#windowed.set(gap.start, gap.end, holds);
    return new Uint8Array(extent.buffer, offset - extent.start, length);
  }

  /** Detaches every window on these bytes, and with them those that share their buffer. */
  detach(offset: number, length: number): void {
    for (const extent of this.#extents) {
      if (extent.start < offset + length && offset < extent.end) {
        const [start, end] = [Math.floor(extent.start / this.pageSize), Math.ceil(extent.end / this.pageSize)];
        this.#noticeWrites(start, end);
        this.#windowed.delete(start, end);
        extent.detach();
      }
    }
  }

  /** The first page that exists and that a live view reaches: it may have been touched, although no call said so. */
  firstHeld(startPage: number, endPage: number): number | undefined {
    for (const window of this.#windowed.within(startPage, endPage)) {
      if (!window.value) continue;
      for (const { start } of this.presentWithin(window.start, window.end)) return start;
    }
    return undefined;
  }

  /** Detaches the windows that reach any of these pages. */
  detachWindowed(startPage: number, endPage: number): void {
    for (const { start, end } of [...this.#windowed.within(startPage, endPage)])
      this.detach(start * this.pageSize, (end - start) * this.pageSize);
  }

  #grow(startPage: number, endPage: number): void {
    if (!this.grow || this.#present.covers(startPage, endPage)) return;
    for (const { start, end } of this.grow(startPage, endPage)) this.#add(start, end);
  }

  #add(startPage: number, endPage: number): void {
    for (const { start, end } of this.#present.gaps(startPage, endPage)) this.#untouched.set(start, end, true);
    this.#present.set(startPage, endPage, true);
  }

  #materialize(start: number, end: number): Extent {
    const extent = new Extent(start, end);
    const bytes = new Uint8Array(extent.buffer);
    for (const data of this.#disk?.dataWithin(start, end) ?? [])
      this.#disk?.read(data.start, bytes.subarray(data.start - start, data.end - start));
    for (const [page, content] of this.#pages) {
      const at = page * this.pageSize;
      if (at >= start && at < end) {
        bytes.set(content, at - start);
        this.#pages.delete(page);
      }
    }
    this.#extents.push(extent);
    return extent;
  }

  /** The bytes [from, to) of one page, or undefined where nothing was ever written. */
  #bytesAt(from: number, to: number): Uint8Array | undefined {
    for (const extent of this.#extents) {
      if (extent.start <= from && to <= extent.end)
        return new Uint8Array(extent.buffer, from - extent.start, to - from);
    }
    const page = Math.floor(from / this.pageSize);
    return this.#pages.get(page)?.subarray(from - page * this.pageSize, to - page * this.pageSize);
  }

  #pieces(offset: number, length: number, visit: (at: number, position: number, length: number) => void): void {
    for (let position = 0; position < length; ) {
      const at = offset + position;
      const piece = Math.min(length - position, this.pageSize - (at % this.pageSize));
      visit(at, position, piece);
      position += piece;
    }
  }

  #zero(extent: Extent, start: number, end: number): void {
    if (start >= end) return;
    for (const range of this.#present.within(start / this.pageSize, end / this.pageSize)) {
      new Uint8Array(
        extent.buffer,
        range.start * this.pageSize - extent.start,
        (range.end - range.start) * this.pageSize,
      ).fill(0);
    }
  }

  #forget(startPage: number, endPage: number): void {
    if (endPage - startPage > this.#pages.size) {
      for (const page of this.#pages.keys()) if (page >= startPage && page < endPage) this.#pages.delete(page);
    } else {
      for (let page = startPage; page < endPage; page++) this.#pages.delete(page);
    }
  }

  get #zeros(): Uint8Array {
    this.#zeroPage ??= new Uint8Array(this.pageSize);
    return this.#zeroPage;
  }

  /** Pages written through a window exist, although no call said so. */
  #noticeWrites(startPage: number, endPage: number): void {
    if (this.#windowed.size === 0) return;
    for (const { start, end } of [...this.#windowed.within(startPage, endPage)]) {
      for (const part of [...this.#present.gaps(start, end), ...this.#untouched.within(start, end)]) {
        for (let page = part.start; page < part.end; page++) {
          const bytes = this.#bytesAt(page * this.pageSize, (page + 1) * this.pageSize);
          if (bytes && Buffer.compare(bytes, this.#zeros) !== 0) this.touch(page, page + 1);
        }
      }
    }
  }
}
