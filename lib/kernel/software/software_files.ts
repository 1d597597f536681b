import { RangeMap } from '../../ranges.ts';
import { ERRNO } from '../../uapi.ts';
import { GUEST_MEMFD_FLAG_WRITE } from '../../uapi_proposed.ts';
import type { Result, U64 } from '../kernel.ts';
import { GuestMemfdFile, type Obstacle, OpenFile, type SplitProblem, type VmFile } from '../state.ts';
import { Folios } from './folios.ts';
import { GuestMemfdIo } from './guest_memfd_io.ts';
import { PageReferences } from './page_references.ts';
import { PageStore } from './page_store.ts';

/** The guest_memfd of the software kernel: the state every kernel keeps, and the bytes. */
export class SoftwareGuestMemfd extends GuestMemfdFile {
  readonly ino: bigint;
  readonly store: PageStore;
  /** NUMA policy by page of the file, since 6.19. */
  readonly policy = new RangeMap<number>();
  readonly references: PageReferences;

  /** null: the bytes cannot be read or written as those of a file. */
  readonly io: GuestMemfdIo | null;
  /** null: every page is a folio by itself. */
  readonly folios: Folios | null;
  /** Files that have the same pages, this one among them: the last to go frees them. */
  #links: { count: number } = { count: 1 };
  /** No memory is left for splitting folios. */
  splitsFail = false;

  /** @param folioSize Bytes of the largest folios; null for single pages. @param store Bytes that are there already. */
  constructor(
    vm: VmFile,
    size: U64,
    flags: number,
    ino: bigint,
    folioSize: number | null = null,
    store = new PageStore(vm.machine.pageSize, () => Number(size)),
    origin: SoftwareGuestMemfd | null = null,
  ) {
    super(vm, size, flags, origin?.privatePages);
    const { pageSize } = vm.machine;
    this.ino = ino;
    this.store = store;
    this.references = origin?.references ?? new PageReferences();
    this.io = flags & GUEST_MEMFD_FLAG_WRITE ? new GuestMemfdIo(this) : null;
    if (origin) {
      this.#links = origin.#links;
      this.#links.count++;
      this.folios = origin.folios;
      return;
    }
    const folios = folioSize === null ? null : new Folios(folioSize, pageSize, this.store.pages, this.privatePages);
    this.folios = folios;
    if (folios) this.store.grow = (start, end) => folios.allocate(start, end);
  }

  /** The same pages as a file of another VM, with bindings of its own. */
  linked(vm: VmFile): SoftwareGuestMemfd {
    return new SoftwareGuestMemfd(vm, this.size, this.flags, this.ino, null, this.store, this);
  }

  /** Gives pages back to the host, as PUNCH_HOLE and MADV_REMOVE do: all or, where a folio cannot be split, none. They stay private or shared. */
  punch(start: number, end: number): Result {
    const problem = this.splitProblem(start, end);
    if (problem) return -ERRNO[problem.errno];
    this.folios?.split(start, end);
    this.folios?.remove(start, end);
    this.references.forget(start, end);
    this.store.discard(start, end);
    return 0;
  }

  override obstacle(start: number, end: number): Obstacle | null {
    const { folios, references, store } = this;
    if (!folios) return references.first(start, end, store.firstHeld(start, end));
    const around = folios.around(start, end);
    const found = references.first(around.start, around.end, store.firstHeld(around.start, around.end));
    if (!found) return null;
    const folio = folios.at(found.page);
    if (folio.end - folio.start === 1) return found;
    return {
      page: Math.max(start, folio.start),
      kind: found.kind,
      sentence: `is in a large folio, of which a page ${found.sentence}`,
    };
  }

  override splitProblem(start: number, end: number): SplitProblem | null {
    for (const folio of this.folios?.cutBy(start, end) ?? []) {
      if (this.references.firstPinned(folio.start, folio.end) !== undefined)
        return { errno: 'EAGAIN', sentence: 'the range is a part of a large folio that is pinned and cannot be split' };
      if (this.splitsFail)
        return { errno: 'ENOMEM', sentence: 'the range is a part of a large folio, and no memory is left to split it' };
    }
    return null;
  }

  override applyConversion(start: number, end: number, toPrivate: boolean): void {
    // What a window shows of pages that do not exist yet must not show what the guest will put there.
    if (toPrivate) this.store.detachWindowed(start, end);
    this.store.unmap(start, end);
    for (const part of [...this.changing(start, end, toPrivate)]) this.folios?.split(part.start, part.end);
    super.applyConversion(start, end, toPrivate);
    this.folios?.merge(start, end, this.references.pinned());
  }

  protected override released(): void {
    super.released();
    if (--this.#links.count === 0) this.store.discard(0, this.pages);
  }
}

/** A file of memfd_secret(2): mapped or not at all, of one size once it has one. */
export class SecretFile extends OpenFile {
  readonly ino: bigint;
  readonly store: PageStore;
  size = 0;

  constructor(pageSize: number, ino: bigint) {
    super('secret');
    this.ino = ino;
    this.store = new PageStore(pageSize, () => this.size);
  }

  get pages(): number {
    return Math.ceil(this.size / this.store.pageSize);
  }

  protected override released(): void {
    this.store.discard(0, this.pages);
  }
}

/** A file of KVM_GET_STATS_FD: what it says is made up when it is read. */
export class StatsFile extends OpenFile {
  readonly content: () => Uint8Array;
  position = 0;

  constructor(content: () => Uint8Array) {
    super('stats');
    this.content = content;
  }

  read(target: Uint8Array, offset: number): Result {
    const content = this.content();
    const part = content.subarray(Math.min(offset, content.length), offset + target.length);
    target.set(part);
    return part.length;
  }
}

export class EpollFile extends OpenFile {
  constructor() {
    super('epoll');
  }
}

const EVENT_MAX = (1n << 64n) - 2n;

/** A counter of 64 bits that read takes and write adds to. Nobody can be waited for here, so what would block is EAGAIN. */
export class EventFile extends OpenFile {
  readonly #semaphore: boolean;
  #count: bigint;

  constructor(initial: number, semaphore: boolean) {
    super('eventfd');
    this.#count = BigInt(initial);
    this.#semaphore = semaphore;
  }

  read(target: Uint8Array): Result {
    if (target.length < 8) return -ERRNO.EINVAL;
    if (this.#count === 0n) return -ERRNO.EAGAIN;
    const taken = this.#semaphore ? 1n : this.#count;
    this.#count -= taken;
    new DataView(target.buffer, target.byteOffset).setBigUint64(0, taken, true);
    return 8;
  }

  write(source: Uint8Array): Result {
    if (source.length < 8) return -ERRNO.EINVAL;
    const more = new DataView(source.buffer, source.byteOffset).getBigUint64(0, true);
    if (more > EVENT_MAX) return -ERRNO.EINVAL;
    if (this.#count + more > EVENT_MAX) return -ERRNO.EAGAIN;
    this.#count += more;
    return 8;
  }
}
