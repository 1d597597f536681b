import { RangeMap } from '../../ranges.ts';
import { PROT_READ, PROT_WRITE } from '../../uapi.ts';
import type { MemoryFile } from './memory_file.ts';
import { PageStore } from './page_store.ts';
import { reclaim } from './protected_pages.ts';
import { SecretFile, SoftwareGuestMemfd } from './software_files.ts';
import type { UserfaultFile } from './userfault_file.ts';

export type MappedFile = MemoryFile | SoftwareGuestMemfd | SecretFile;

/** Units: pages of the mapping, unless a name or a comment says bytes. */
export class Mapping {
  readonly address: bigint;
  readonly pages: number;
  readonly shared: boolean;
  readonly file: MappedFile | null;
  /** Page of the file, or of the store, where the mapping starts. */
  readonly pgoff: number;
  /** Where its bytes are: the file's own, or a private copy of what was written. */
  readonly store: PageStore;
  readonly protection = new RangeMap<number>();
  readonly #createdWritable: boolean;
  /** Who is asked for pages of it that are not there. */
  userfault: { readonly file: UserfaultFile; readonly missing: RangeMap<true> } | null = null;
  readonly guards = new RangeMap<true>();
  readonly locked = new RangeMap<true>();
  readonly policy = new RangeMap<number>();
  /** Pages of anonymous memory that were only read: all of them are one page of zeros, which nobody may write. */
  readonly zeros = new RangeMap<true>();
  /** Bytes of the store that somebody has a view on through this mapping. */
  readonly windows = new RangeMap<true>();
  /** Its page tables give way when a page becomes private: it holds none. */
  readonly yields: boolean;
  /** Of a guest_memfd: pages of the file that this mapping has faulted in and holds. */
  readonly faulted: RangeMap<true> | null;

  constructor(
    address: bigint,
    pages: number,
    shared: boolean,
    file: MappedFile | null,
    pgoff: number,
    pageSize: number,
    prot: number,
    yields: boolean,
  ) {
    this.address = address;
    this.yields = yields;
    this.pages = pages;
    this.shared = shared;
    this.file = file;
    this.pgoff = pgoff;
    this.store = shared && file ? file.store : new PageStore(pageSize, () => (pgoff + pages) * pageSize);
    this.protection.set(0, pages, prot);
    this.#createdWritable = (prot & PROT_WRITE) !== 0;
    file?.hold();
    this.faulted = (!yields && this.gmem?.references.addMapping()) || null;
    if (this.#writes) this.#writes.writableMappings++;
    if (this.#memory) this.#memory.mappings++;
  }

  /** What F_SEAL_WRITE has to know of this mapping. */
  get #writes(): MemoryFile | null {
    return this.shared && this.#createdWritable ? this.#memory : null;
  }

  get #memory(): MemoryFile | null {
    return this.file instanceof SoftwareGuestMemfd || this.file instanceof SecretFile ? null : this.file;
  }

  drop(): void {
    if (this.#writes) this.#writes.writableMappings--;
    if (this.#memory) this.#memory.mappings--;
    if (this.faulted) this.gmem?.references.removeMapping(this.faulted);
    this.file?.drop();
  }

  /** Of memfd_secret(2): only the processes that map it reach it. */
  get secret(): boolean {
    return this.file instanceof SecretFile;
  }

  get gmem(): SoftwareGuestMemfd | null {
    return this.file instanceof SoftwareGuestMemfd ? this.file : null;
  }

  /** Whether an access to the page has to wait for a userfaultfd. */
  isMissing(page: number): boolean {
    if (!this.userfault?.missing.get(page)) return false;
    return this.store.residentPages(this.pgoff + page, this.pgoff + page + 1) === 0;
  }

  /** Whether the kernel, which unlike a CPU asks for each permission by name, may reach a page on the guest's behalf. */
  permits(page: number, prot: number): boolean {
    return ((this.protection.get(page) ?? 0) & prot) === prot;
  }

  /** How many pages from `page` on a touch may reach before it is SIGSEGV or SIGBUS, up to `end`. Contract §8.2. */
  accessible(page: number, end: number, prot: number): number {
    const start = this.pgoff + page;
    let stop = start + this.reachable(page, end, prot);
    for (const { start: first, value } of this.store.taken.within(start, stop)) {
      if (value.hold === 'owned') stop = Math.min(stop, first);
    }
    if (this.shared || !this.file) return stop - start;
    // What a private mapping has no copy of is the file's.
    for (const taken of this.file.store.taken.within(start, stop)) {
      if (taken.value.hold !== 'owned') continue;
      for (const gap of this.store.pages.gaps(taken.start, taken.end)) stop = Math.min(stop, gap.start);
    }
    return stop - start;
  }

  /** The same for a kernel that only looks pages up, and does not touch what is in them. */
  reachable(page: number, end: number, prot: number): number {
    let stop = Math.min(end, this.pages, this.file ? this.file.pages - this.pgoff : end);
    for (const secret of this.gmem?.privatePages.within(this.pgoff + page, this.pgoff + stop) ?? []) {
      stop = secret.start - this.pgoff;
      break;
    }
    for (const guard of this.guards.within(page, stop)) stop = Math.min(stop, guard.start);
    for (const range of this.protection.within(page, stop)) {
      // The CPUs know no page that can be written and not be read.
      const allowed = range.value & PROT_WRITE ? range.value | PROT_READ : range.value;
      if ((allowed & prot) !== prot) stop = Math.min(stop, range.start);
    }
    return Math.max(0, stop - page);
  }
}

/** A forked child's: the bytes of a shared mapping are shared, those of a private one copied. */
export function copyMapping(mapping: Mapping, pageSize: number): Mapping {
  const { address, pages, shared, file, pgoff, yields } = mapping;
  const copy = new Mapping(address, pages, shared, file, pgoff, pageSize, mapping.protection.get(0) ?? 0, yields);
  for (const { start, end, value } of mapping.protection) copy.protection.set(start, end, value);
  for (const { start, end } of mapping.guards) copy.guards.set(start, end, true);
  for (const { start, end, value } of mapping.policy) copy.policy.set(start, end, value);
  if (shared) return copy;
  // They are pinned: fork(2) copies them at once, which takes them from a guest that has them.
  reclaim(mapping.store, pgoff, pgoff + pages);
  for (const range of mapping.store.presentWithin(0, pgoff + pages)) {
    const bytes = new Uint8Array((range.end - range.start) * pageSize);
    mapping.store.read(range.start * pageSize, bytes);
    copy.store.write(range.start * pageSize, bytes);
  }
  return copy;
}
