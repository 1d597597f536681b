import {
  ERRNO,
  F_ADD_SEALS,
  F_GET_SEALS,
  F_SEAL_WRITE,
  SEEK_CUR,
  SEEK_DATA,
  SEEK_END,
  SEEK_HOLE,
  SEEK_SET,
} from '../../uapi.ts';
import { F_SEAL_GUEST } from '../../uapi_proposed.ts';
import type { Result } from '../kernel.ts';
import { type GuestMemfdFile, OpenFile } from '../state.ts';
import { type Disk, PageStore } from './page_store.ts';
import { reclaim } from './protected_pages.ts';

export const SEAL_SEAL = 1;
const SEAL_SHRINK = 2;
const SEAL_GROW = 4;
const ALL_SEALS = 0x3f;

/** Bytes: no file reaches further. */
const BEYOND = 2 ** 63;

/** A file of bytes: a memfd, an opened file, or the shmem behind shared anonymous memory. Sizes and offsets below 2^53. */
export class MemoryFile extends OpenFile {
  readonly store: PageStore;
  readonly ino: bigint;
  readonly mode: number;
  /** Its pages are the kernel's own, of tmpfs: not a disk's, and no huge ones of hugetlbfs. */
  readonly isShmem: boolean;
  size = 0;
  position = 0;
  seals: number;
  /** Shared mappings made with PROT_WRITE: F_SEAL_WRITE has to wait for them. */
  writableMappings = 0;
  /** All mappings: F_SEAL_GUEST has to wait for them. */
  mappings = 0;
  /** What a VM sees of a file that is sealed for a guest, from the first memslot on. */
  guest: GuestMemfdFile | null = null;

  constructor(
    pageSize: number,
    ino: bigint,
    options: { sealable?: boolean; mode?: number; disk?: Disk; shmem?: boolean } = {},
  ) {
    super('file');
    this.store = new PageStore(pageSize, () => this.size, options.disk);
    this.ino = ino;
    this.mode = options.mode ?? 0o100777;
    this.isShmem = options.shmem ?? true;
    this.seals = options.sealable ? 0 : SEAL_SEAL;
  }

  /** Pages of the file that its size covers, the last one perhaps in part. */
  get pages(): number {
    return Math.ceil(this.size / this.store.pageSize);
  }

  /** Nobody but a guest gets at its bytes, and its size is for ever. */
  get isForGuest(): boolean {
    return (this.seals & F_SEAL_GUEST) !== 0;
  }

  protected override released(): void {
    this.guest?.drop();
  }

  read(target: Uint8Array, offset: number): Result {
    const length = Math.max(0, Math.min(target.length, this.size - offset));
    this.#reclaim(offset, offset + length);
    this.store.read(offset, target.subarray(0, length));
    return length;
  }

  write(source: Uint8Array, offset: number): Result {
    if (source.length === 0) return 0;
    if (this.seals & F_SEAL_WRITE) return -ERRNO.EPERM;
    const end = offset + source.length;
    if (end > this.size && this.seals & SEAL_GROW) return -ERRNO.EPERM;
    this.#reclaim(offset, end);
    this.store.write(offset, source);
    this.size = Math.max(this.size, end);
    return source.length;
  }

  truncate(size: number): Result {
    if (size < this.size && this.seals & SEAL_SHRINK) return -ERRNO.EPERM;
    if (size > this.size && this.seals & SEAL_GROW) return -ERRNO.EPERM;
    // Whole pages go, also those behind the end that KEEP_SIZE made.
    if (size <= this.size) this.#erase(size, BEYOND);
    this.size = size;
    return 0;
  }

  /** fallocate(2) with mode 0 or KEEP_SIZE. */
  allocate(offset: bigint, length: bigint, keepSize: boolean): Result {
    const page = BigInt(this.store.pageSize);
    const end = offset + length;
    if (end > this.size && this.seals & SEAL_GROW) return -ERRNO.EPERM;
    const last = Number((end + page - 1n) / page);
    // Whole pages are allocated, and their end has to be an offset too.
    if (BigInt(last) * page >= BEYOND) return -ERRNO.EFBIG;
    const first = Number(offset / page);
    // shmem zeroes a page only when it is asked for it the second time, and from then on it counts as resident.
    for (const { start, end: stop } of [...this.store.pages.within(first, last)]) this.store.touch(start, stop);
    this.store.allocate(first, last);
    if (!keepSize) this.size = Math.max(this.size, Number(end));
    return 0;
  }

  punch(offset: number, length: number): Result {
    if (this.seals & F_SEAL_WRITE) return -ERRNO.EPERM;
    this.#erase(offset, offset + length);
    return 0;
  }

  seek(offset: number, whence: number): Result {
    let to: number;
    switch (whence) {
      case SEEK_SET:
        to = offset;
        break;
      case SEEK_CUR:
        to = this.position + offset;
        break;
      case SEEK_END:
        to = this.size + offset;
        break;
      case SEEK_DATA:
      case SEEK_HOLE:
        if (offset < 0 || offset >= this.size) return -ERRNO.ENXIO;
        to = this.#find(offset, whence === SEEK_DATA);
        if (to < 0) return to;
        break;
      default:
        return -ERRNO.EINVAL;
    }
    if (to < 0) return -ERRNO.EINVAL;
    this.position = to;
    return to;
  }

  fcntlSeals(command: number, argument: number): Result {
    if (command === F_GET_SEALS) return this.seals;
    if (command !== F_ADD_SEALS || argument & ~ALL_SEALS) return -ERRNO.EINVAL;
    if (this.seals & SEAL_SEAL) return -ERRNO.EPERM;
    if (argument & F_SEAL_WRITE && this.writableMappings > 0) return -ERRNO.EBUSY;
    this.seals |= argument;
    return 0;
  }

  /** msync, fsync: nothing to do for memory. */
  sync(): Result {
    return 0;
  }

  #reclaim(offset: number, end: number): void {
    const { pageSize } = this.store;
    reclaim(this.store, Math.floor(offset / pageSize), Math.ceil(end / pageSize));
  }

  /** Whole pages go, the ends of partly covered ones become zeros. */
  #erase(offset: number, end: number): void {
    const { pageSize } = this.store;
    const first = Math.ceil(offset / pageSize);
    const last = Math.floor(end / pageSize);
    this.#reclaim(offset, Math.min(end, first * pageSize));
    if (last * pageSize < end) this.#reclaim(last * pageSize, Math.min(end, this.pages * pageSize));
    if (first > last) {
      this.store.zero(offset, end);
      return;
    }
    this.store.zero(offset, first * pageSize);
    this.store.zero(last * pageSize, end);
    this.store.discard(first, last);
  }

  #find(offset: number, data: boolean): number {
    const { pageSize } = this.store;
    let hole = offset;
    for (const { start, end } of this.store.presentWithin(Math.floor(offset / pageSize), this.pages)) {
      if (data) return Math.max(offset, start * pageSize);
      if (start * pageSize > hole) break;
      hole = end * pageSize;
    }
    return data ? -ERRNO.ENXIO : Math.min(hole, this.size);
  }
}
