import { KvmError, systemError } from './errors.ts';
import { GuestMemfd } from './guest_memfd.ts';
import type { FileRange } from './guest_range.ts';
import type { Hold, Holds } from './holds.ts';
import { HostMemory } from './host_memory.ts';
import type { Kernel, Result } from './kernel/kernel.ts';
import { lockedSlotRules } from './kernel/rules/memslot_lock.ts';
import { check } from './kernel/rules/rule.ts';
import type { MemoryUser } from './memory_user.ts';
import {
  assertLockable,
  assertLocked,
  flagsOf,
  type LockReport,
  type LockRights,
  lockRights,
  MemslotLock,
  refuse,
  residentBytesOf,
} from './memslot_lock.ts';
import type { RangeMap } from './ranges.ts';
import { guardConstructor, type internal } from './resource.ts';
import { GUEST_MEMFD_FLAG_MMAP, KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY } from './uapi.ts';
import { boolean, fileRange, integer, oneOf, options, rangeError, typeError } from './validate.ts';
import type { Vm } from './vm.ts';

export interface MemslotOptions {
  /** The lowest free number when omitted. */
  readonly slot?: number;
  /** 1 is system management mode, on x86_64 VMs that have it. Default 0. */
  readonly addressSpace?: number;
  /** Guest physical address: bytes, page-aligned. */
  readonly address: number;
  /** Bytes, page-aligned; at most 2^31-1 pages. */
  readonly size: number;
  /** The shared side. Needed unless there is a guestMemfd. */
  readonly hostMemory?: HostMemory;
  /** Bytes, page-aligned. */
  readonly hostOffset?: number;
  /** The private side; for a file created with `mmap`, all the guest sees. */
  readonly guestMemfd?: GuestMemfd;
  /** Bytes, page-aligned. */
  readonly guestMemfdOffset?: number;
  /** Guest writes become MMIO exits. Not with a guestMemfd. */
  readonly readonly?: boolean;
  /** Not with a guestMemfd. */
  readonly logDirtyPages?: boolean;
}

/** What Memslot needs of its VM, and nobody outside this package can reach. */
export interface SlotOwner {
  readonly vm: Vm;
  readonly kernel: Kernel;
  readonly fd: number;
  assertOpen(): void;
  /** Throws EBUSY while a conversion works on the range. */
  assertIdle(address: number, size: number): void;
  /** Detaches the views on the range. */
  detachViews(address: number, size: number): void;
  readonly slots: Map<number, Memslot>;
  readonly users: ReadonlySet<MemoryUser>;
  /** Slots of address space 0 by guest physical address. */
  readonly byAddress: RangeMap<Memslot>;
  /** By address space, a number below which every slot exists. */
  readonly firstFree: number[];
  /** Throws where another thread is the one that changes this VM's memory. */
  assertOwn(): void;
  /** By guest physical address: what conversions leave alone. */
  readonly holds: Holds<string>;
  /** Fills the guest's tables for the slot; false where they cannot be filled ahead. */
  preFault(slot: Memslot): boolean;
  /** The slot is there, or is another than it was. */
  appeared(slot: Memslot): void;
  disappeared(slot: Memslot): void;
}

/** @internal */
export interface Placement {
  address: number;
  readonly size: number;
  readonly hostMemory: HostMemory | null;
  readonly hostOffset: number;
  readonly guestMemfd: GuestMemfd | null;
  readonly guestMemfdOffset: number;
  readonly readonly: boolean;
  logDirtyPages: boolean;
}

/**
 * Guest memory at a guest physical address, backed by host memory, by a guest_memfd, or by both (then an attribute decides, page by page,
 * which one the guest sees).
 *
 * @see KVM_SET_USER_MEMORY_REGION; KVM_SET_USER_MEMORY_REGION2, Linux 6.8
 */
export class Memslot implements Disposable {
  /** The slot's number; of another address space than 0 with that in bits 31–16, as the kernel has it. */
  readonly slot: number;
  readonly #owner: SlotOwner;
  readonly #placement: Placement;
  readonly #userspaceAddr: bigint;
  /** What of its host memory it shows. */
  readonly #shown: Hold<Memslot> | undefined;
  #removed = false;
  #lock: MemslotLock | null = null;

  /** @internal */
  static create(token: typeof internal, owner: SlotOwner, given: MemslotOptions): Memslot {
    const { slot, addressSpace: space = 0, address, size, hostMemory, guestMemfd, ...rest } = options('options', given);
    const addressSpace = integer('addressSpace', space, 0, 0xffff);
    if (slot !== undefined) integer('slot', slot, 0, 0xffff);
    if (hostMemory !== undefined && !HostMemory.is(hostMemory)) throw typeError('hostMemory must be a HostMemory');
    if (guestMemfd !== undefined && !GuestMemfd.is(guestMemfd)) throw typeError('guestMemfd must be a GuestMemfd');
    const placement: Placement = {
      address: integer('address', address),
      size: integer('size', size, 1),
      hostMemory: hostMemory ?? null,
      hostOffset: integer('hostOffset', rest.hostOffset ?? 0),
      guestMemfd: guestMemfd ?? null,
      guestMemfdOffset: integer('guestMemfdOffset', rest.guestMemfdOffset ?? 0),
      readonly: boolean('readonly', rest.readonly ?? false),
      logDirtyPages: boolean('logDirtyPages', rest.logDirtyPages ?? false),
    };
    owner.assertOpen();
    owner.assertOwn();
    checkBacking(owner.vm, placement);
    owner.assertIdle(placement.address, placement.size);
    return new Memslot(token, owner, (slot ?? freeSlot(owner, addressSpace)) | (addressSpace << 16), placement, true);
  }

  /** @internal */
  constructor(token: typeof internal, owner: SlotOwner, slot: number, placement: Placement, isNew: boolean) {
    guardConstructor(token, 'vm.createMemslot()');
    this.slot = slot >>> 0;
    this.#owner = owner;
    this.#placement = placement;
    if (owner.slots.has(this.slot)) {
      throw new KvmError({
        code: 'EEXIST',
        message: `memslot ${this.slot} exists: remove it first, or leave the number to the library`,
      });
    }
    this.#userspaceAddr = isNew ? userspaceAddr(owner.kernel, placement) : 0n;
    if (isNew) this.#setRegion(placement.address, placement.size, placement.logDirtyPages);
    if (owner.vm.type === 'protected') placement.hostMemory?.backing.takeFromHost();
    owner.slots.set(this.slot, this);
    placement.hostMemory?.backing.slots.add(this);
    this.#shown = placement.hostMemory?.backing.shown.add(
      placement.hostOffset,
      placement.hostOffset + placement.size,
      this,
    );
    placement.guestMemfd?.backing.slots.add(this);
    this.#appear();
    Object.freeze(this);
  }

  /** Guest physical address, in bytes. */
  get address(): number {
    return this.#placement.address;
  }

  /** Bytes. */
  get size(): number {
    return this.#placement.size;
  }

  get readonly(): boolean {
    return this.#placement.readonly;
  }

  get logDirtyPages(): boolean {
    return this.#placement.logDirtyPages;
  }

  get guestMemfd(): GuestMemfd | null {
    return this.#placement.guestMemfd;
  }

  /** Bytes of the file before the slot's first. */
  get guestMemfdOffset(): number {
    return this.#placement.guestMemfdOffset;
  }

  get hostMemory(): HostMemory | null {
    return this.#placement.hostMemory;
  }

  /** Bytes of the host memory before the slot's first. */
  get hostOffset(): number {
    return this.#placement.hostOffset;
  }

  /** The rights that lock() gave it; only the thread that created the VM knows. */
  get locked(): false | LockRights {
    return this.#lock?.rights ?? false;
  }

  /** Whether the slot was removed, by remove() or with its VM. */
  get removed(): boolean {
    return this.#removed;
  }

  /**
   * Moves the slot to another guest physical address; pending dirty pages move along.
   *
   * @param address Bytes, page-aligned.
   * @throws KvmError `EINVAL` a slot with a guest_memfd cannot move · `EEXIST` another slot is there · `EBUSY` a conversion is at work, or the
   *   slot is locked · `ERR_CLOSED`
   */
  move(address: number): void {
    integer('address', address);
    this.#assertThere();
    this.#owner.assertOwn();
    this.#owner.assertIdle(this.address, this.size);
    this.#owner.assertIdle(address, this.size);
    this.#assertChangeable({ moves: address !== this.address });
    this.#setRegion(address, this.size, this.logDirtyPages);
    this.#disappear();
    this.#placement.address = address;
    this.#appear();
  }

  /**
   * Starts or stops recording which pages the guest writes. Pages recorded and not yet read are lost when it stops.
   *
   * @throws KvmError `EINVAL` a slot with a guest_memfd cannot log · `EPERM` it is locked for writing · `ERR_CLOSED`
   */
  setLogDirtyPages(on: boolean): void {
    boolean('on', on);
    this.#assertThere();
    this.#owner.assertOwn();
    this.#assertChangeable({ startsLog: on && !this.logDirtyPages });
    this.#setRegion(this.address, this.size, on);
    this.#placement.logDirtyPages = on;
    this.#owner.appeared(this);
  }

  /**
   * The pages the guest wrote, relative to the slot's start. Unless the VM has manual dirty-log protection (capability 168), this also
   * starts a new round: a second call returns only what was written since.
   *
   * @throws KvmError `ENOENT` without logDirtyPages · `ENXIO` the VM uses a dirty ring · `ERR_CLOSED`
   * @see KVM_GET_DIRTY_LOG
   */
  dirtyPages(): number[] {
    this.#assertThere();
    this.#owner.assertOwn();
    const bitmap = new Uint8Array(Math.ceil(this.#pages / 64) * 8);
    const { kernel, fd } = this.#owner;
    this.#check(kernel.getDirtyLog(fd, { slot: this.slot, dirtyBitmap: bitmap }), 'KVM_GET_DIRTY_LOG', {});
    const pages: number[] = [];
    bitmap.forEach((byte, index) => {
      for (let bit = 0; byte >> bit; bit++) if ((byte >> bit) & 1) pages.push(index * 8 + bit);
    });
    return pages;
  }

  /**
   * Forgets that pages were written, so that the next write is recorded again.
   *
   * @param range Bytes of the slot, page-aligned; all of it when omitted.
   * @throws KvmError `ENOENT` without logDirtyPages · `ENXIO` the VM uses a dirty ring · `ERR_CLOSED` · RangeError `ERR_OUT_OF_RANGE`
   * @see KVM_CLEAR_DIRTY_LOG, Linux 5.0
   */
  clearDirtyPages(range?: FileRange): void {
    const { offset, size } = fileRange('range', range, this.size);
    this.#assertThere();
    this.#owner.assertOwn();
    const { kernel, fd } = this.#owner;
    if (offset % kernel.pageSize || size % kernel.pageSize)
      throw rangeError(`range must be made of whole pages, got ${offset}, +${size}`);
    const first = offset / kernel.pageSize;
    const end = first + size / kernel.pageSize;
    // The call takes whole groups of 64 pages; the bitmap says which of them are meant.
    const firstPage = first - (first % 64);
    const numPages = Math.min(this.#pages, Math.ceil(end / 64) * 64) - firstPage;
    const dirtyBitmap = new Uint8Array(Math.ceil(numPages / 64) * 8);
    for (let page = first - firstPage; page < end - firstPage; page++) {
      dirtyBitmap[page >> 3] = (dirtyBitmap[page >> 3] as number) | (1 << (page & 7));
    }
    this.#check(
      kernel.clearDirtyLog(fd, { slot: this.slot, numPages, firstPage, dirtyBitmap }),
      'KVM_CLEAR_DIRTY_LOG',
      { firstPage, numPages },
    );
  }

  /**
   * Promises the guest its memory: every page of the slot is there, mapped for the guest where the kernel can do that ahead, and stays until
   * unlock(). Host memory is locked and touched, pages of a guest_memfd are allocated: on each page the side that the guest sees now. Until then
   * the slot can be neither moved nor removed, converting any of it is `EAGAIN`, and giving its pages back `EBUSY`; closing the VM ends it all. It
   * takes its time by the page, on this thread.
   *
   * @param rights Of the locked mapping: 'read' leaves the guest's first write of a page to fault, and does not forbid it.
   * @throws KvmError `EBUSY` a vCPU of the VM runs, on any thread, or the slot is locked already · `EPERM` 'read-write' for a slot that is read-only
   *   or logs dirty pages · `ENOMEM` the limit of locked memory (RLIMIT_MEMLOCK), named, or no memory · `EFAULT` a file that was cut · `ERR_CLOSED`
   * @see mlock2(2), MADV_POPULATE_WRITE, KVM_PRE_FAULT_MEMORY (Linux 6.11, x86_64); KVM_CAP_ARM_LOCK_USER_MEMORY_REGION where a kernel has it (proposed)
   */
  lock(rights: LockRights): LockReport {
    oneOf('rights', rights, lockRights);
    this.#assertThere();
    this.#owner.assertOwn();
    this.#owner.assertIdle(this.address, this.size);
    assertLockable(this, this.#owner, rights);
    const lock = new MemslotLock(this, this.#owner, rights);
    this.#lock = lock;
    return { rights, residentBytes: this.residentBytes(), guestMapped: lock.guestMapped, by: lock.by };
  }

  /**
   * Ends the promise. The guest keeps what it has mapped, for as long as the host leaves it there.
   *
   * @throws KvmError `EINVAL` it is not locked · `ERR_CLOSED`
   */
  unlock(): void {
    this.#assertThere();
    this.#owner.assertOwn();
    assertLocked(this, this.#owner);
    this.#release();
  }

  /**
   * Bytes of what the guest sees in the slot that occupy memory.
   *
   * @see mincore(2), cachestat(2)
   */
  residentBytes(): number {
    this.#assertThere();
    return residentBytesOf(this, this.#owner);
  }

  /**
   * Takes the memory away from the guest. What the host memory and the guest_memfd hold stays. A second call does nothing.
   *
   * @throws KvmError `EBUSY` a conversion is at work on it, or it is locked
   */
  remove(): void {
    if (this.#removed || this.#owner.vm.closed) return;
    this.#owner.assertOwn();
    this.#owner.assertIdle(this.address, this.size);
    this.#assertChangeable({ removes: true });
    this.#setRegion(this.address, 0, false);
    this.gone();
  }

  [Symbol.dispose](): void {
    this.remove();
  }

  /** @internal */
  get backing() {
    const { vm, users } = this.#owner;
    return { vm, users };
  }

  get #pages(): number {
    return this.size / this.#owner.kernel.pageSize;
  }

  #appear(): void {
    if (this.slot < 0x10000) this.#owner.byAddress.set(this.address, this.address + this.size, this);
    this.#owner.appeared(this);
  }

  #disappear(): void {
    if (this.slot < 0x10000) {
      this.#owner.detachViews(this.address, this.size);
      this.#owner.byAddress.delete(this.address, this.address + this.size);
    }
    this.#owner.disappeared(this);
  }

  /** @internal The kernel has it no more: it was removed, here or by another thread, or its VM is gone. */
  gone(): void {
    const { hostMemory, guestMemfd } = this.#placement;
    this.#release();
    this.#removed = true;
    const { slots, firstFree } = this.#owner;
    slots.delete(this.slot);
    this.#disappear();
    firstFree[this.slot >>> 16] = Math.min(this.slot & 0xffff, firstFree[this.slot >>> 16] ?? 0);
    hostMemory?.backing.slots.delete(this);
    if (this.#shown) hostMemory?.backing.shown.delete(this.#shown);
    guestMemfd?.backing.slots.delete(this);
  }

  /** @internal There is a vCPU to fill the guest's tables with. What cannot be mapped now faults at its first access. */
  mapLocked(): void {
    try {
      this.#lock?.mapForGuest(this, this.#owner);
    } catch (error) {
      if (!(error instanceof KvmError)) throw error;
    }
  }

  #release(): void {
    this.#lock?.release();
    this.#lock = null;
  }

  #assertChangeable({ removes = false, moves = false, startsLog = false }): void {
    const change = { locked: flagsOf(this.locked), removes, moves, startsLog };
    refuse(check(lockedSlotRules, null, change), this);
  }

  #assertThere(): void {
    this.#owner.assertOpen();
    if (this.#removed) throw KvmError.closed(`memslot ${this.slot}`);
  }

  #setRegion(address: number, memorySize: number, logDirtyPages: boolean): void {
    const { kernel, fd } = this.#owner;
    const { guestMemfd, guestMemfdOffset, readonly } = this.#placement;
    const flags =
      (readonly ? KVM_MEM_READONLY : 0) |
      (logDirtyPages ? KVM_MEM_LOG_DIRTY_PAGES : 0) |
      (guestMemfd ? KVM_MEM_GUEST_MEMFD : 0);
    const bound = guestMemfd !== null && memorySize > 0;
    // One literal for both calls: this is a hot path, and a spread costs as much as the rest of it.
    const region = {
      slot: this.slot,
      flags: memorySize > 0 ? flags : 0,
      guestPhysAddr: address,
      memorySize,
      userspaceAddr: this.#userspaceAddr,
      guestMemfdOffset,
      guestMemfd: bound ? guestMemfd.backing.fd : -1,
    };
    if (bound) this.#check(kernel.setUserMemoryRegion2(fd, region), 'KVM_SET_USER_MEMORY_REGION2', region);
    else this.#check(kernel.setUserMemoryRegion(fd, region), 'KVM_SET_USER_MEMORY_REGION', region);
  }

  #check(result: Result, request: string, args: Readonly<Record<string, unknown>>): void {
    if (result < 0) throw systemError(result, { syscall: 'ioctl', request, args }, this.#owner.kernel.explain());
  }
}

function freeSlot({ slots, firstFree }: SlotOwner, addressSpace: number): number {
  let slot = firstFree[addressSpace] ?? 0;
  while (slots.has((slot | (addressSpace << 16)) >>> 0)) slot++;
  firstFree[addressSpace] = slot;
  return slot;
}

function assertAligned(name: string, offset: number, pageSize: number): void {
  if (offset % pageSize === 0) return;
  throw new KvmError({
    code: 'EINVAL',
    message: `${name} must be a multiple of the page size, ${pageSize}, got ${offset}`,
  });
}

function checkBacking(vm: Vm, { size, hostMemory, hostOffset, guestMemfd, guestMemfdOffset }: Placement): void {
  if (!hostMemory && !guestMemfd) throw typeError('a memslot needs hostMemory, a guestMemfd, or both');
  if (hostMemory) {
    const { kvm, assertOpen } = hostMemory.backing;
    assertOpen();
    if (hostMemory.kind === 'secret')
      throw new KvmError({
        code: 'EINVAL',
        message: 'secret memory is for the host alone: no kernel lets a guest reach it (memfd_secret)',
      });
    if (kvm !== vm.kvm)
      throw new KvmError({
        code: 'EINVAL',
        message: 'the host memory belongs to another Kvm: create it with this one',
      });
    assertAligned('hostOffset', hostOffset, vm.kvm.pageSize);
    if (hostOffset + size > hostMemory.size) {
      throw rangeError(
        `hostOffset + size is ${hostOffset + size}, past the end of the host memory, ${hostMemory.size}`,
      );
    }
    const [holder] = hostMemory.backing.leases.holders(hostOffset, hostOffset + size);
    if (holder !== undefined)
      throw new KvmError({
        code: 'EBUSY',
        message: `a part of the host memory was carved out, and ${holder} of another VM has it`,
      });
  }
  if (guestMemfd) {
    guestMemfd.backing.assertOpen();
    if (guestMemfd.backing.vm !== vm) {
      throw new KvmError({
        code: 'EINVAL',
        message: 'the guest_memfd belongs to another VM: a file serves the VM that created it',
      });
    }
    assertAligned('guestMemfdOffset', guestMemfdOffset, vm.kvm.pageSize);
    if (guestMemfdOffset + size > guestMemfd.size) {
      throw rangeError(
        `guestMemfdOffset + size is ${guestMemfdOffset + size}, past the end of the guest_memfd, ${guestMemfd.size}`,
      );
    }
  }
}

/** Where KVM's own accesses go: for a file the host can map, the file itself, so that they see what the guest sees. Contract §13.5. */
function userspaceAddr(kernel: Kernel, { hostMemory, hostOffset, guestMemfd, guestMemfdOffset }: Placement): bigint {
  if (hostMemory) return hostMemory.address + BigInt(hostOffset);
  const mappable = guestMemfd && guestMemfd.flags & BigInt(GUEST_MEMFD_FLAG_MMAP);
  return mappable ? kernel.addressOf(guestMemfd.backing.map()) + BigInt(guestMemfdOffset) : 0n;
}
