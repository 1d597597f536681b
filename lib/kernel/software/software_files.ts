import { RangeMap } from '../../ranges.ts';
import { ERRNO, GUEST_MEMFD_FLAG_INIT_SHARED } from '../../uapi.ts';
import type { Result, U64 } from '../kernel.ts';
import { GuestMemfdFile, OpenFile, type VmFile } from '../state.ts';
import { PageStore } from './page_store.ts';

/** The guest_memfd of the software kernel: the state every kernel keeps, and the bytes. */
export class SoftwareGuestMemfd extends GuestMemfdFile {
  readonly ino: bigint;
  readonly store: PageStore;
  /** NUMA policy by page of the file, since 6.19. */
  readonly policy = new RangeMap<number>();

  constructor(vm: VmFile, size: U64, flags: number, ino: bigint) {
    super(vm, size, flags);
    this.ino = ino;
    this.store = new PageStore(vm.machine.pageSize, () => Number(size));
  }

  get pages(): number {
    return Number(this.size) / this.store.pageSize;
  }

  get initShared(): boolean {
    return (this.flags & GUEST_MEMFD_FLAG_INIT_SHARED) !== 0;
  }

  protected override released(): void {
    super.released();
    this.store.discard(0, this.pages);
  }
}

export class UserfaultFile extends OpenFile {
  features: bigint | null = null;

  constructor() {
    super('uffd');
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
