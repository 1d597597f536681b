import { RangeMap } from '../../ranges.ts';
import { SET_MEMORY_ATTRIBUTES2_ZERO } from '../../uapi_proposed.ts';
import { i32, isAligned, isZero, low32, sumExceeds, toPages, u64 } from '../arguments.ts';
import type { MemoryAttributes2Args, Result, U64 } from '../kernel.ts';
import {
  conversionObstacle,
  conversionPages,
  conversionRules,
  isToPrivate,
  notGuestMemfd,
} from '../rules/conversion.ts';
import { largestBlock } from './mixed_blocks.ts';
import type { MovableZone } from './page_references.ts';
import { SoftwareGuestMemfd } from './software_files.ts';
import { VcpuCalls } from './vcpu_calls.ts';

/** A range of guest physical addresses, in bytes, and how the guest means it. */
export interface GuestView {
  readonly address: U64;
  readonly size: U64;
  /** null: as it is, whatever that may be. */
  readonly access: 'private' | 'shared' | null;
}

/**
 * Conversion in place, and stand-ins for what else is at work in a real machine and no system call shows: pins of devices and of the kernel,
 * zones of memory, page tables of the guest.
 */
export abstract class ConversionCalls extends VcpuCalls {
  setMemoryAttributes2(fd: number, args: MemoryAttributes2Args): Result {
    const request = {
      offset: u64('offset', args.offset),
      size: u64('size', args.size),
      attributes: u64('attributes', args.attributes),
      flags: u64('flags', args.flags),
    };
    const file = this.#gmem(fd);
    if (typeof file === 'number') return file;
    const refused = this.check(conversionRules, file, request);
    if (refused !== null) {
      const inOrder = this.brokenRule === 'conversion-movable' || this.brokenRule === 'conversion-reference';
      const obstacle = inOrder && conversionObstacle(file, request);
      if (obstacle) args.errorOffset = BigInt(obstacle.page) * BigInt(this.pageSize);
      return refused;
    }
    const [start, end] = conversionPages(file, request);
    const toPrivate = isToPrivate(request);
    if (low32(request.flags) & SET_MEMORY_ATTRIBUTES2_ZERO) {
      for (const part of file.changing(start, end, toPrivate)) file.store.clear(part.start, part.end);
    }
    file.applyConversion(start, end, toPrivate);
    return 0;
  }

  /**
   * Holds pages of a guest_memfd as get_user_pages() does for a device or for I/O under way. Only shared pages can be got that way.
   *
   * @returns the function that lets go, or -errno: EFAULT a page is private, EINVAL the range, EBADF, ENOTTY.
   */
  pinPages(fd: number, offset: U64, length: U64): (() => void) | Result {
    const found = this.#pages(fd, offset, length);
    if (typeof found === 'number') return found;
    const { file, start, end } = found;
    if (file.privatePages.overlaps(start, end)) return this.refuse('EFAULT', 'the host has no private pages to pin');
    file.store.touch(start, end);
    return file.references.pin(start, end);
  }

  /** Says that pages of a guest_memfd lie in memory they may not stay in; null: they do not. */
  setPageZone(fd: number, offset: U64, length: U64, zone: MovableZone | null): Result {
    const found = this.#pages(fd, offset, length);
    if (typeof found === 'number') return found;
    found.file.references.setZone(found.start, found.end, zone);
    return 0;
  }

  /**
   * Moves pages to another place in memory, as migration for NUMA or for a memory block that goes offline does, out of every zone set before.
   *
   * @returns 0, or -errno with nothing moved: EBUSY a page is private, EAGAIN one is pinned.
   */
  migratePages(fd: number, offset: U64, length: U64): Result {
    const found = this.#pages(fd, offset, length);
    if (typeof found === 'number') return found;
    const { file, start, end } = found;
    if (file.privatePages.overlaps(start, end)) return this.refuse('EBUSY', 'private pages stay where they are');
    if (file.references.firstPinned(start, end) !== undefined) return this.refuse('EAGAIN', 'a page is pinned');
    file.references.setZone(start, end, null);
    return 0;
  }

  /** Whether splitting a large folio of the file fails from now on, as it does where memory is short. */
  setSplitFailure(fd: number, fails: boolean): Result {
    const file = this.#gmem(fd);
    if (typeof file === 'number') return file;
    file.splitsFail = fails;
    return 0;
  }

  /** How many folios of each size a guest_memfd has, by bytes; -errno for any other file. */
  folioStatistics(fd: number): ReadonlyMap<number, number> | Result {
    const file = this.#gmem(fd);
    if (typeof file === 'number') return file;
    const large = [...(file.folios?.count() ?? [])];
    const inLarge = large.reduce((sum, [size, count]) => sum + size * count, 0);
    const sizes = large.map(([size, count]): [number, number] => [size * this.pageSize, count]);
    return new Map([[this.pageSize, file.store.residentPages(0, file.pages) - inLarge], ...sizes.reverse()]);
  }

  /**
   * Bytes of the largest block that may be mapped for the guest as one at a guest physical address: what a kernel shows in its statistics of
   * mappings only. ENOENT without a memslot.
   */
  largestMapping(vm: number, address: U64): Result {
    const at = u64('address', address);
    const owner = this.vm(vm);
    if (typeof owner === 'number') return owner;
    return largestBlock(owner, Math.floor(Number(at) / this.pageSize)) || this.refuse('ENOENT', 'no memslot is there');
  }

  /** What the guest's own page tables say of a range: an access that contradicts the page's state is a memory fault. */
  setGuestView(vm: number, { address, size, access }: GuestView): Result {
    const [at, length] = [u64('address', address), u64('size', size)];
    const owner = this.vm(vm);
    if (typeof owner === 'number') return owner;
    if (!isAligned(at, this.pageSize) || !isAligned(length, this.pageSize))
      return this.refuse('EINVAL', 'the range is not made of whole pages');
    owner.guestView ??= new RangeMap();
    const start = toPages(at, this.pageSize);
    const end = start + toPages(length, this.pageSize);
    if (access) owner.guestView.set(start, end, access === 'private');
    else owner.guestView.delete(start, end);
    return 0;
  }

  #pages(fd: number, offset: U64, length: U64): { file: SoftwareGuestMemfd; start: number; end: number } | Result {
    const [at, size] = [u64('offset', offset), u64('length', length)];
    const file = this.#gmem(fd);
    if (typeof file === 'number') return file;
    const whole = isAligned(at, this.pageSize) && isAligned(size, this.pageSize) && !isZero(size);
    if (!whole || sumExceeds(at, size, file.size))
      return this.refuse('EINVAL', 'the range is not made of whole pages of the file');
    const start = toPages(at, this.pageSize);
    return { file, start, end: start + toPages(size, this.pageSize) };
  }

  #gmem(fd: number): SoftwareGuestMemfd | Result {
    const file = this.file(i32('fd', fd));
    if (!file) return this.badFd(fd);
    if (file instanceof SoftwareGuestMemfd) return file;
    return this.refuse(notGuestMemfd(file.kind, this.machine.isArm), 'not a guest_memfd');
  }
}
