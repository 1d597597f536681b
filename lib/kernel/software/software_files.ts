import { RangeMap } from '../../ranges.ts';
import { GUEST_MEMFD_FLAG_INIT_SHARED } from '../../uapi.ts';
import type { U64 } from '../kernel.ts';
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
