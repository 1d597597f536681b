import { RangeMap } from '../ranges.ts';
import {
  GUEST_MEMFD_FLAG_INIT_SHARED,
  GUEST_MEMFD_FLAG_MMAP,
  KVM_MEM_GUEST_MEMFD,
  KVM_MEM_LOG_DIRTY_PAGES,
} from '../uapi.ts';
import { toPages } from './arguments.ts';
import type { U64 } from './kernel.ts';
import { conversionAttributes, type Machine } from './machine.ts';

/**
 * What a kernel holds, without the bytes: open files, VMs, memslots, bindings, attributes. The software kernel acts on it; the Linux
 * kernel keeps the same, after each call that succeeded, so that the same rules can explain the next one that does not.
 * Contract §11 (lifetimes), §21 (state).
 */

/** 'path' is an O_PATH fd. */
export type FileKind =
  | 'kvm'
  | 'vm'
  | 'vcpu'
  | 'gmem'
  | 'file'
  | 'epoll'
  | 'uffd'
  | 'path'
  | 'device'
  | 'eventfd'
  | 'stats'
  | 'secret'
  | 'socket';

/** An open file description: what fds, their duplicates and mappings refer to. */
export class OpenFile {
  readonly kind: FileKind;
  #references = 0;

  constructor(kind: FileKind) {
    this.kind = kind;
  }

  hold(): this {
    this.#references++;
    return this;
  }

  drop(): void {
    if (--this.#references === 0) this.released();
  }

  protected released(): void {}
}

/** One memslot. Units: pages, except the addresses. */
export interface MemslotState {
  readonly id: number;
  readonly addressSpace: number;
  baseGfn: number;
  readonly pages: number;
  readonly userspaceAddr: U64;
  flags: number;
  /** null: no GUEST_MEMFD flag, or its file is closed. */
  guestMemfd: GuestMemfdFile | null;
  /** First page of the file. */
  readonly pgoff: number;
  /** The guest sees nothing but the file: it was created with MMAP. Stays so when the file is closed. */
  readonly gmemOnly: boolean;
  /** Pages written since the log was read, relative to the slot; null without LOG_DIRTY. */
  dirty: RangeMap<true> | null;
  /** KVM_LOCK_MEM_READ and _WRITE, as proposed; 0 when it is not locked. */
  locked: number;
  /** Pages the guest's CPUs have mapped, relative to the slot; null before the first. */
  mapped: RangeMap<true> | null;
}

/** The fields of kvm_userspace_memory_region2, in canonical form; V1 has no flags for the last two. */
export interface RegionRequest {
  readonly v1: boolean;
  readonly addressSpace: number;
  readonly id: number;
  readonly flags: number;
  readonly guestPhysAddr: U64;
  readonly memorySize: U64;
  readonly userspaceAddr: U64;
  readonly guestMemfdOffset: U64;
  readonly guestMemfd: number;
  /** What the fd number stands for in the calling process. */
  readonly file: OpenFile | undefined;
}

export class VmFile extends OpenFile {
  readonly machine: Machine;
  readonly hasPrivate: boolean;
  readonly isProtected: boolean;
  /** arm64: bits of guest physical address. */
  readonly ipaBits: number;
  readonly addressSpaces: number;
  /** gfn → private. */
  readonly attributes = new RangeMap<true>();
  /** Pages a guest means as private (true) or as shared, where it says so itself, as SNP and TDX guests do; null where no guest can. */
  guestView: RangeMap<boolean> | null = null;
  manualDirtyLog = 0;
  dirtyRing: 'none' | 'ring' | 'ring-with-bitmap' = 'none';
  hypercallMask = 0;
  /** Ids of the vCPUs created so far, and of those that were there when one ran for the first time. */
  readonly vcpuIds = new Set<number>();
  firstRun: ReadonlySet<number> | null = null;
  /** Pages of its locked slots. */
  lockedPages = 0;
  /** Whether there has ever been one: KVM sets pages aside for its own page tables by the slots that come and go. */
  hadSlots = false;
  /** What is done when nobody has the VM any more, and whether that is so. */
  readonly atEnd: (() => void)[] = [];
  ended = false;
  readonly #slots: readonly Map<number, MemslotState>[];
  readonly #gfns: readonly RangeMap<MemslotState>[];

  /** @param addressSpaces What KVM_CAP_MULTI_ADDRESS_SPACE answers, where a real kernel can be asked. */
  constructor(machine: Machine, type: number, addressSpaces?: number) {
    super('vm');
    this.machine = machine;
    this.hasPrivate = !machine.isArm && [1, 4, 5].includes(type);
    this.isProtected = machine.isArm && type >= 0x8000_0000;
    this.ipaBits = machine.pkvm ? machine.ipaLimit : type & 0xff || 40;
    this.addressSpaces = addressSpaces ?? (!machine.smm ? 0 : this.hasPrivate ? 1 : 2);
    const count = Math.max(1, this.addressSpaces);
    this.#slots = Array.from({ length: count }, () => new Map());
    this.#gfns = Array.from({ length: count }, () => new RangeMap());
  }

  /** Address spaces that a slot number may name: at least one, even where the capability says 0. */
  get addressSpaceIds(): number {
    return this.#slots.length;
  }

  /** What a guest_memfd that can be mapped says of its pages holds for the guest's accesses, too. */
  get convertsInPlace(): boolean {
    return conversionAttributes(this.machine, this) !== 0;
  }

  slot(addressSpace: number, id: number): MemslotState | undefined {
    return this.#slots[addressSpace]?.get(id);
  }

  get hasSlots(): boolean {
    return this.#slots.some((slots) => slots.size > 0);
  }

  /** Every slot, of every address space. */
  *slots(): Generator<MemslotState> {
    for (const slots of this.#slots) yield* slots.values();
  }

  /** A slot of the address space, other than `except`, that covers any of these gfns. */
  slotOverlapping(addressSpace: number, start: number, end: number, except?: MemslotState): MemslotState | undefined {
    const ranges = this.#gfns[addressSpace];
    if (!ranges?.overlaps(start, end)) return undefined;
    for (const { value } of ranges.within(start, end)) if (value !== except) return value;
    return undefined;
  }

  /** Carries out a request that every rule accepted. Contract §10.2. */
  applyRegion(request: RegionRequest): void {
    const { pageSize } = this.machine;
    const slots = this.#slots[request.addressSpace] as Map<number, MemslotState>;
    const gfns = this.#gfns[request.addressSpace] as RangeMap<MemslotState>;
    const old = slots.get(request.id);
    const pages = toPages(request.memorySize, pageSize);
    const baseGfn = toPages(request.guestPhysAddr, pageSize);
    if (old && pages === 0) {
      slots.delete(request.id);
      gfns.delete(old.baseGfn, old.baseGfn + old.pages);
      old.guestMemfd?.bindings.delete(old.pgoff, old.pgoff + old.pages);
      return;
    }
    if (old) {
      gfns.delete(old.baseGfn, old.baseGfn + old.pages);
      old.baseGfn = baseGfn;
      gfns.set(baseGfn, baseGfn + pages, old);
      if ((old.flags ^ request.flags) & KVM_MEM_LOG_DIRTY_PAGES) old.dirty = this.#newDirtyLog(request.flags, pages);
      old.flags = request.flags;
      return;
    }
    const guestMemfd = request.flags & KVM_MEM_GUEST_MEMFD ? (request.file as GuestMemfdFile) : null;
    const slot: MemslotState = {
      id: request.id,
      addressSpace: request.addressSpace,
      baseGfn,
      pages,
      userspaceAddr: request.userspaceAddr,
      flags: request.flags,
      guestMemfd,
      pgoff: guestMemfd ? toPages(request.guestMemfdOffset, pageSize) : 0,
      gmemOnly: ((guestMemfd?.flags ?? 0) & GUEST_MEMFD_FLAG_MMAP) !== 0,
      dirty: this.#newDirtyLog(request.flags, pages),
      locked: 0,
      mapped: null,
    };
    this.hadSlots = true;
    slots.set(request.id, slot);
    gfns.set(baseGfn, baseGfn + pages, slot);
    guestMemfd?.bindings.set(slot.pgoff, slot.pgoff + pages, slot);
  }

  applyAttributes(address: U64, size: U64, attributes: U64): void {
    const start = toPages(address, this.machine.pageSize);
    const end = start + toPages(size, this.machine.pageSize);
    if (attributes) this.attributes.set(start, end, true);
    else this.attributes.delete(start, end);
  }

  protected override released(): void {
    this.lockedPages = 0;
    this.ended = true;
    for (const action of this.atEnd) action();
  }

  #newDirtyLog(flags: number, pages: number): RangeMap<true> | null {
    if (!(flags & KVM_MEM_LOG_DIRTY_PAGES) || this.dirtyRing === 'ring') return null;
    const log = new RangeMap<true>();
    if (this.manualDirtyLog & 2) log.set(0, pages, true);
    return log;
  }
}

/** Why a page cannot become private now. */
export interface Obstacle {
  /** Page of the file. */
  readonly page: number;
  /** 'reference': until it is let go. 'movable': until the page is moved to where it may stay. */
  readonly kind: 'reference' | 'movable';
  readonly sentence: string;
}

/** Why a large folio stays whole. */
export interface SplitProblem {
  readonly errno: 'EAGAIN' | 'ENOMEM';
  readonly sentence: string;
}

export class GuestMemfdFile extends OpenFile {
  readonly vm: VmFile;
  readonly size: U64;
  readonly flags: number;
  /** Pages of the file → the slot that has them. */
  readonly bindings = new RangeMap<MemslotState>();
  /**
   * Pages that are the guest's alone, whether they exist or not. As the file was created: all of it or nothing. Only the proposed in-place
   * conversion changes it.
   */
  readonly privatePages: RangeMap<true>;

  /** @param privatePages Of a file whose pages these are too. */
  constructor(vm: VmFile, size: U64, flags: number, privatePages?: RangeMap<true>) {
    super('gmem');
    this.vm = vm;
    this.size = size;
    this.flags = flags;
    this.privatePages = privatePages ?? new RangeMap();
    if (!privatePages && !(flags & GUEST_MEMFD_FLAG_INIT_SHARED)) this.privatePages.set(0, this.pages, true);
  }

  get machine(): Machine {
    return this.vm.machine;
  }

  get pages(): number {
    return toPages(this.size, this.machine.pageSize);
  }

  /** The parts of a range that a conversion changes. */
  *changing(
    start: number,
    end: number,
    toPrivate: boolean,
  ): Generator<{ readonly start: number; readonly end: number }> {
    yield* toPrivate ? this.privatePages.gaps(start, end) : this.privatePages.within(start, end);
  }

  /** Carries out a conversion that every rule accepted. */
  applyConversion(start: number, end: number, toPrivate: boolean): void {
    if (toPrivate) this.privatePages.set(start, end, true);
    else this.privatePages.delete(start, end);
  }

  /** What stands in the way of making pages private, as far as this kernel knows: a running one keeps it to itself. */
  obstacle(_start: number, _end: number): Obstacle | null {
    return null;
  }

  /** Why the folios that a range would cut through cannot be split. */
  splitProblem(_start: number, _end: number): SplitProblem | null {
    return null;
  }

  /** The slots outlive the file: their addresses stay taken, the memory is gone. Contract §11. */
  protected override released(): void {
    for (const { value } of this.bindings) value.guestMemfd = null;
    this.bindings.clear();
  }
}

/** A process's file descriptors, which are all that a kernel lets a caller name. */
export class FileTable {
  readonly #files = new Map<number, OpenFile>();
  #lowest: number;

  constructor(first = 0) {
    this.#lowest = first;
  }

  get size(): number {
    return this.#files.size;
  }

  get(fd: number): OpenFile | undefined {
    return this.#files.get(fd);
  }

  /** The VM behind a VM fd. */
  vm(fd: number): VmFile | undefined {
    const file = this.#files.get(fd);
    return file instanceof VmFile ? file : undefined;
  }

  gmem(fd: number): GuestMemfdFile | undefined {
    const file = this.#files.get(fd);
    return file instanceof GuestMemfdFile ? file : undefined;
  }

  /** Under a number that a real kernel chose. */
  put(fd: number, file: OpenFile): number {
    this.#files.get(fd)?.drop();
    this.#files.set(fd, file.hold());
    return fd;
  }

  /** Under the lowest free number, as POSIX has it. */
  add(file: OpenFile): number {
    while (this.#files.has(this.#lowest)) this.#lowest++;
    return this.put(this.#lowest, file);
  }

  close(fd: number): boolean {
    const file = this.#files.get(fd);
    if (!file) return false;
    this.#files.delete(fd);
    this.#lowest = Math.min(this.#lowest, fd);
    file.drop();
    return true;
  }

  /** The table of a forked child: the same files under the same numbers. */
  fork(): FileTable {
    const child = new FileTable(this.#lowest);
    for (const [fd, file] of this.#files) child.put(fd, file);
    return child;
  }
}
