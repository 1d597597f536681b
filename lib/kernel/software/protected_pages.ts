import { RangeMap } from '../../ranges.ts';
import type { VmFile } from '../state.ts';
import { PageStore } from './page_store.ts';

/** Neighbours of which the same is true are one object, so that a RangeMap joins them. */
export interface TakenPages {
  readonly guest: ProtectedPages;
  readonly store: PageStore;
  /** Page of the store minus gfn. */
  readonly shift: number;
  /** 'lost': the host has taken them back by force. */
  readonly hold: 'owned' | 'shared' | 'lost';
}

/** The host memory that the guest of a protected VM has taken, by its own addresses. Units: gfns. Contract §17.1. */
export class ProtectedPages {
  readonly #pages = new RangeMap<TakenPages>();
  readonly #known: TakenPages[] = [];
  /** At their gfns: pages in whose place the host has others now. They are pinned, and stay the guest's. */
  readonly #kept: PageStore;
  readonly #watchers = new Map<PageStore, (start: number, end: number) => void>();

  static of(vm: VmFile): ProtectedPages {
    let pages = all.get(vm);
    if (!pages) {
      const taken = new ProtectedPages(vm.machine.pageSize);
      vm.atEnd.push(() => taken.#giveBack());
      all.set(vm, taken);
      pages = taken;
    }
    return pages;
  }

  private constructor(pageSize: number) {
    this.#kept = new PageStore(pageSize, () => 0);
  }

  at(gfn: number): TakenPages | undefined {
    return this.#pages.get(gfn);
  }

  take(gfn: number, store: PageStore, page: number): TakenPages {
    if (!this.#watchers.has(store)) {
      const watcher = (start: number, end: number): void => this.#keep(store, start, end);
      this.#watchers.set(store, watcher);
      store.watchers.add(watcher);
    }
    return this.#set(gfn, gfn + 1, store, page - gfn, 'owned');
  }

  /** Whether it was as it had to be. */
  change(gfn: number, from: 'owned' | 'shared', to: 'owned' | 'shared'): boolean {
    const pages = this.#pages.get(gfn);
    if (pages?.hold !== from) return false;
    this.#set(gfn, gfn + 1, pages.store, pages.shift, to);
    return true;
  }

  /** Pages that the guest alone had. */
  lose(start: number, end: number, { store, shift }: TakenPages): void {
    this.#set(start, end, store, shift, 'lost');
    store.clear(start + shift, end + shift);
  }

  #keep(store: PageStore, start: number, end: number): void {
    const page = new Uint8Array(store.pageSize);
    for (const range of [...store.taken.within(start, end)]) {
      const { guest, shift, hold } = range.value;
      if (guest !== this) continue;
      for (let at = range.start; at < range.end; at++) {
        store.read(at * page.length, page);
        this.#kept.write((at - shift) * page.length, page);
      }
      store.taken.delete(range.start, range.end);
      this.#set(range.start - shift, range.end - shift, this.#kept, 0, hold);
    }
  }

  /** What was shared stays as it is. */
  #giveBack(): void {
    for (const [store, watcher] of this.#watchers) store.watchers.delete(watcher);
    for (const { start, end, value } of [...this.#pages]) {
      if (value.hold === 'owned') this.lose(start, end, value);
      if (value.hold === 'shared') value.store.taken.delete(start + value.shift, end + value.shift);
    }
    this.#pages.clear();
  }

  #set(start: number, end: number, store: PageStore, shift: number, hold: TakenPages['hold']): TakenPages {
    let pages = this.#known.find((one) => one.store === store && one.shift === shift && one.hold === hold);
    if (!pages) {
      pages = { guest: this, store, shift, hold };
      this.#known.push(pages);
    }
    this.#pages.set(start, end, pages);
    if (hold === 'lost') store.taken.delete(start + shift, end + shift);
    else store.taken.set(start + shift, end + shift, pages);
    return pages;
  }
}

const all = new WeakMap<VmFile, ProtectedPages>();

/** What the kernel does to pages that it needs itself: the guest that has them loses them, and they are zeros. */
export function reclaim(store: PageStore, start: number, end: number): void {
  for (const range of [...store.taken.within(start, end)]) {
    const { guest, shift, hold } = range.value;
    if (hold === 'owned') guest.lose(range.start - shift, range.end - shift, range.value);
  }
}
