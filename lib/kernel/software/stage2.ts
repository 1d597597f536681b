import { RangeMap } from '../../ranges.ts';
import type { MemslotState, VmFile } from '../state.ts';
import type { PageStore } from './page_store.ts';

/** How guest pages are mapped: equal mappings of neighbours are one object, so that a RangeMap joins them. */
interface Mapped {
  readonly slot: MemslotState;
  readonly store: PageStore;
  /** Page of the store minus gfn. */
  readonly shift: number;
  /** The store's clock when it was made: what was discarded later is mapped no more. */
  readonly clock: number;
  readonly writable: boolean;
}

/** Where a guest page is. */
export interface Place {
  readonly slot: MemslotState;
  readonly store: PageStore;
  readonly shift: number;
}

/** The tables by which a VM's CPUs find its memory, as far as it takes to know which access faults. Units: gfns of address space 0. */
export class Stage2 {
  readonly #mapped = new RangeMap<Mapped>();
  #latest: Mapped | null = null;

  static of(vm: VmFile): Stage2 {
    let tables = all.get(vm);
    if (!tables) {
      tables = new Stage2();
      all.set(vm, tables);
    }
    return tables;
  }

  /** Whether an access needs no fault. */
  has(gfn: number, place: Place, write: boolean): boolean {
    const found = this.#mapped.get(gfn);
    if (!found || found.slot !== place.slot || found.store !== place.store || found.shift !== place.shift) return false;
    return (found.writable || !write) && place.store.changedAt(gfn + place.shift) <= found.clock;
  }

  /** Whether a page of the store that exists is mapped somewhere. */
  maps(store: PageStore, page: number): boolean {
    for (const { start, end, value } of this.#mapped) {
      const gfn = page - value.shift;
      if (value.store !== store || gfn < start || gfn >= end || store.changedAt(page) > value.clock) continue;
      if (value.slot.mapped?.get(gfn - value.slot.baseGfn)) return true;
    }
    return false;
  }

  map(start: number, end: number, { slot, store, shift }: Place, writable: boolean): void {
    const { clock } = store;
    const last = this.#latest;
    const same =
      last?.slot === slot &&
      last.store === store &&
      last.shift === shift &&
      last.clock === clock &&
      last.writable === writable;
    const mapped = same ? last : { slot, store, shift, clock, writable };
    this.#latest = mapped;
    this.#mapped.set(start, end, mapped);
  }

  /** Leaves the pages mapped for reading. */
  protect(start: number, end: number): void {
    for (const range of [...this.#mapped.within(start, end)])
      this.#mapped.set(range.start, range.end, { ...range.value, writable: false });
  }

  unmap(start: number, end: number): void {
    this.#mapped.delete(start, end);
  }
}

const all = new WeakMap<VmFile, Stage2>();
