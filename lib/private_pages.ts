import type { GuestMemfd } from './guest_memfd.ts';
import type { GuestRange } from './guest_range.ts';
import type { Kernel } from './kernel/kernel.ts';
import type { Memslot } from './memslot.ts';
import { RangeMap, type ReadonlyRangeMap } from './ranges.ts';

/** The file whose own state says which pages of a slot are private, where the kernel converts in place. */
export function fileInPlace({ guestMemfd }: Memslot): GuestMemfd | null {
  return guestMemfd?.backing.convertsInPlace ? guestMemfd : null;
}

/**
 * Which guest pages are private, wherever the kernel keeps that: with the VM, or, for slots of files that are converted in place, with the file. As
 * long as there are none of those it is what the kernel's side has, and costs nothing.
 */
export class PrivatePages {
  readonly #kernel: Kernel;
  /** The VM's attributes, by gfn. */
  readonly #ofVm: ReadonlyRangeMap<true>;
  #all: RangeMap<true> | null = null;

  constructor(kernel: Kernel, ofVm: ReadonlyRangeMap<true>) {
    this.#kernel = kernel;
    this.#ofVm = ofVm;
  }

  get gfns(): ReadonlyRangeMap<true> {
    return this.#all ?? this.#ofVm;
  }

  /** A slot is there: for one in place the file decides from now on. */
  slotAppeared(slot: Memslot): void {
    const file = fileInPlace(slot);
    if (!file) return;
    if (!this.#all) {
      this.#all = new RangeMap<true>();
      for (const { start, end } of this.#ofVm) this.#all.set(start, end, true);
    }
    const { first, pages, page } = this.#place(slot);
    this.#all.delete(first, first + pages);
    const secret = this.#kernel.privatePages(file.backing.fd);
    for (const { start, end } of secret?.within(page, page + pages) ?? [])
      this.#all.set(first + start - page, first + end - page, true);
  }

  slotDisappeared(slot: Memslot): void {
    if (!this.#all || !fileInPlace(slot)) return;
    const { first, pages } = this.#place(slot);
    this.#all.delete(first, first + pages);
    for (const { start, end } of this.#ofVm.within(first, first + pages)) this.#all.set(start, end, true);
  }

  /** What was set, of the VM or in place; gfns. */
  set(start: number, end: number, isPrivate: boolean): void {
    if (isPrivate) this.#all?.set(start, end, true);
    else this.#all?.delete(start, end);
  }

  #place({ address, size, guestMemfdOffset }: GuestRange & { guestMemfdOffset: number }) {
    const { pageSize } = this.#kernel;
    return { first: address / pageSize, pages: size / pageSize, page: guestMemfdOffset / pageSize };
  }
}
