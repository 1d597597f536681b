import { hex } from '../../format.ts';
import type { ModelOptions } from '../../model_options.ts';
import type { ReadonlyRangeMap } from '../../ranges.ts';
import {
  ERRNO,
  F_SETFD,
  FD_CLOEXEC,
  FIOCLEX,
  FIONCLEX,
  KVM_API_VERSION,
  KVM_CHECK_EXTENSION,
  KVM_CLEAR_DIRTY_LOG,
  KVM_CREATE_GUEST_MEMFD,
  KVM_CREATE_VM,
  KVM_ENABLE_CAP,
  KVM_GET_API_VERSION,
  KVM_GET_DIRTY_LOG,
  KVM_GET_VCPU_MMAP_SIZE,
  KVM_MEM_LOG_DIRTY_PAGES,
  KVM_SET_MEMORY_ATTRIBUTES,
  KVM_SET_USER_MEMORY_REGION,
  KVM_SET_USER_MEMORY_REGION2,
} from '../../uapi.ts';
import { KVM_CAP_PROPOSED, KVM_LINK_GUEST_MEMFD, KVM_SET_MEMORY_ATTRIBUTES2 } from '../../uapi_proposed.ts';
import { bytes, i32, isZero, low32, text, toPages, u32, u64 } from '../arguments.ts';
import type { Kernel, MemoryAttributesArgs, Result, U64, UserMemoryRegion, UserMemoryRegion2 } from '../kernel.ts';
import { checkExtension } from '../machine.ts';
import { clearDirtyLogRules, getDirtyLogRules } from '../rules/dirty_log.ts';
import { createGuestMemfdRules, folioSize } from '../rules/guest_memfd.ts';
import { memoryAttributesRules } from '../rules/memory_attributes.ts';
import { isSameRegion, memslotRules, regionRequest } from '../rules/memslot.ts';
import { changeOf, lockedSlotRules } from '../rules/memslot_lock.ts';
import { applyEnableCap, createVmRules, enableCapRules, vmType } from '../rules/vm.ts';
import { type MemslotState, OpenFile, type RegionRequest, VmFile } from '../state.ts';
import { MemslotLockCalls } from './memslot_lock_calls.ts';
import { SoftwareGuestMemfd } from './software_files.ts';
import { Stage2 } from './stage2.ts';
import { SoftwareVcpu } from './vcpu.ts';

/** A kernel in TypeScript: the whole of the contract that needs no vCPU, as one process sees it. */
export class SoftwareKernel extends MemslotLockCalls implements Kernel {
  /** VMs this process created, whose ioctls it may therefore call. Contract §2.1. */
  readonly #ownVms: WeakSet<VmFile> = new WeakSet();

  constructor(model: ModelOptions = {}, parent?: SoftwareKernel) {
    super(model, parent);
  }

  /** The view of a forked child: the same open files and shared memory, an address space of its own. */
  fork(): SoftwareKernel {
    return new SoftwareKernel(this.shared.model, this);
  }

  privateGfns(vm: number): ReadonlyRangeMap<true> | undefined {
    return this.files.vm(vm)?.attributes;
  }

  privatePages(fd: number): ReadonlyRangeMap<true> | undefined {
    return this.files.gmem(fd)?.privatePages;
  }

  // ── any fd

  ioctl(fd: number, request: number, argument: U64): Result {
    const [file, number, value] = [this.file(i32('fd', fd)), u32('request', request), u64('argument', argument)];
    if (!file) return this.badFd(fd);
    // The VFS answers these two itself, for every kind of file.
    if (number === FIOCLEX || number === FIONCLEX) return this.fcntl(fd, F_SETFD, number === FIOCLEX ? FD_CLOEXEC : 0);
    if (file.kind === 'kvm') {
      if (number === KVM_CREATE_VM) return this.createVm(fd, value);
      if (number === KVM_CHECK_EXTENSION) return this.checkExtension(fd, low32(value) | 0);
      if (number === KVM_GET_API_VERSION || number === KVM_GET_VCPU_MMAP_SIZE) {
        if (!isZero(value)) return this.refuse('EINVAL', 'the argument is not 0');
        return number === KVM_GET_API_VERSION ? this.getApiVersion(fd) : this.getVcpuMmapSize(fd);
      }
      return this.refuse('EINVAL', `/dev/kvm has no request ${hex(number)}`);
    }
    if (file instanceof SoftwareVcpu) return this.vcpuIoctl(fd, number);
    if (
      number === KVM_SET_MEMORY_ATTRIBUTES2 &&
      file.kind === 'gmem' &&
      this.machine.proposals.has('in-place-conversion')
    )
      return this.refuse('EFAULT', 'the argument is not a readable address');
    if (!(file instanceof VmFile)) return this.refuse('ENOTTY', 'this kind of file has no ioctls');
    const refused = this.vm(fd);
    if (typeof refused === 'number') return refused;
    if (number === KVM_CHECK_EXTENSION) return this.checkExtension(fd, low32(value) | 0);
    if (number === KVM_SET_MEMORY_ATTRIBUTES && !this.machine.swProtected) return this.#unknownVmRequest(number);
    if (number === KVM_CREATE_GUEST_MEMFD && !this.machine.hasGuestMemfd) return this.#unknownVmRequest(number);
    const pointers: readonly number[] = [
      ...(this.machine.proposals.has('link') ? [KVM_LINK_GUEST_MEMFD] : []),
      KVM_GET_DIRTY_LOG,
      KVM_CLEAR_DIRTY_LOG,
      KVM_SET_USER_MEMORY_REGION,
      KVM_SET_USER_MEMORY_REGION2,
      KVM_ENABLE_CAP,
      KVM_SET_MEMORY_ATTRIBUTES,
      KVM_CREATE_GUEST_MEMFD,
    ];
    return pointers.includes(number)
      ? this.refuse('EFAULT', 'the argument is not a readable address')
      : this.#unknownVmRequest(number);
  }

  // ── /dev/kvm

  openKvm(path = '/dev/kvm'): Result {
    if (text('path', path) !== '/dev/kvm') return this.refuse('ENOENT', `the software kernel has no device ${path}`);
    return this.install(() => new OpenFile('kvm'));
  }

  getApiVersion(kvm: number): Result {
    return this.#kvm(kvm) ?? KVM_API_VERSION;
  }

  getVcpuMmapSize(kvm: number): Result {
    return this.#kvm(kvm) ?? (this.machine.isArm ? 2 : 3) * this.pageSize;
  }

  checkExtension(fd: number, capability: number): Result {
    const number = i32('capability', capability);
    if (this.file(i32('fd', fd))?.kind === 'kvm') return checkExtension(this.machine, number);
    const vm = this.vm(fd);
    return typeof vm === 'number' ? vm : checkExtension(this.machine, number, vm);
  }

  createVm(kvm: number, type: U64): Result {
    const request = vmType(type);
    const refused = this.#kvm(kvm) ?? this.noFreeFd();
    if (refused !== null) return refused;
    return (
      this.check(createVmRules, this.machine, request) ??
      this.install(() => {
        const vm = new VmFile(this.machine, low32(request.type));
        this.#ownVms.add(vm);
        return vm;
      })
    );
  }

  // ── VM fds

  createGuestMemfd(vm: number, args: { size: U64; flags: U64 }): Result {
    const request = { size: u64('size', args.size), flags: u64('flags', args.flags) };
    const owner = this.vm(vm);
    if (typeof owner === 'number') return owner;
    return (
      this.check(createGuestMemfdRules, owner, request) ??
      this.install(() => {
        const folios = folioSize(request.flags) ?? null;
        return new SoftwareGuestMemfd(owner, request.size, low32(request.flags), this.newIno(), folios);
      })
    );
  }

  setUserMemoryRegion(vm: number, region: UserMemoryRegion): Result {
    return this.#setRegion(vm, region, 0, -1, true);
  }

  setUserMemoryRegion2(vm: number, region: UserMemoryRegion2): Result {
    return this.#setRegion(vm, region, region.guestMemfdOffset, region.guestMemfd, false);
  }

  setMemoryAttributes(vm: number, args: MemoryAttributesArgs): Result {
    const { address, size, attributes, flags } = args;
    const request = {
      address: u64('address', address),
      size: u64('size', size),
      attributes: u64('attributes', attributes),
      flags: u64('flags', flags),
    };
    const owner = this.vm(vm);
    if (typeof owner === 'number') return owner;
    const refused = this.check(memoryAttributesRules, owner, request);
    if (refused !== null) return refused;
    owner.applyAttributes(request.address, request.size, request.attributes);
    const [start, end] = [toPages(request.address, this.pageSize), toPages(request.size, this.pageSize)];
    Stage2.of(owner).unmap(start, start + end);
    return 0;
  }

  async setMemoryAttributesAsync(vm: number, args: MemoryAttributesArgs): Promise<Result> {
    return this.setMemoryAttributes(vm, args);
  }

  enableCap(fd: number, args: { cap: number; flags: number; args: readonly U64[] }): Result {
    const [a0 = 0, a1 = 0, a2 = 0, a3 = 0] = Array.from(args.args, (value) => u64('args', value));
    const request = { cap: u32('cap', args.cap), flags: u32('flags', args.flags), args: [a0, a1, a2, a3] as const };
    const vm = this.vm(fd);
    if (typeof vm === 'number') return vm;
    if (request.cap === KVM_CAP_PROPOSED.GRANT_RING && this.machine.proposals.has('grant-ring'))
      return this.enableGrantRing(vm, request);
    if (request.cap === KVM_CAP_PROPOSED.ARM_LOCK_USER_MEMORY_REGION && this.machine.proposals.has('memslot-lock'))
      return this.enableMemslotLock(vm, request);
    const refused = this.check(enableCapRules, vm, request);
    if (refused !== null) return refused;
    applyEnableCap(vm, request);
    return 0;
  }

  getDirtyLog(vm: number, args: { slot: number; dirtyBitmap: Uint8Array | null }): Result {
    const slotNumber = u32('slot', args.slot);
    const bitmap = args.dirtyBitmap === null ? null : bytes('dirtyBitmap', args.dirtyBitmap);
    const owner = this.vm(vm);
    if (typeof owner === 'number') return owner;
    const request = { addressSpace: slotNumber >>> 16, id: slotNumber & 0xffff };
    const refused = this.check(getDirtyLogRules, owner, request);
    if (refused !== null) return refused;
    const slot = owner.slot(request.addressSpace, request.id);
    const dirty = slot?.dirty;
    if (!slot || !dirty) return -ERRNO.ENOENT;
    const pages = [...dirty];
    if (request.addressSpace === 0)
      for (const { start, end } of owner.manualDirtyLog === 0 ? pages : [])
        Stage2.of(owner).protect(slot.baseGfn + start, slot.baseGfn + end);
    // Without manual protection the bits are taken before they are copied out, and lost when that fails. Contract §16.
    if (owner.manualDirtyLog === 0) dirty.clear();
    const size = Math.ceil(slot.pages / 64) * 8;
    if (!bitmap || this.memory.touchable(bitmap) < size)
      return this.refuse('EFAULT', `the bitmap is shorter than ${size} bytes`);
    bitmap.fill(0, 0, size);
    for (const { start, end } of pages) setBits(bitmap, start, end);
    return 0;
  }

  clearDirtyLog(
    vm: number,
    args: { slot: number; numPages: number; firstPage: U64; dirtyBitmap: Uint8Array | null },
  ): Result {
    const slotNumber = u32('slot', args.slot);
    const request = {
      addressSpace: slotNumber >>> 16,
      id: slotNumber & 0xffff,
      numPages: u32('numPages', args.numPages),
      firstPage: u64('firstPage', args.firstPage),
    };
    const bitmap = args.dirtyBitmap === null ? null : bytes('dirtyBitmap', args.dirtyBitmap);
    const owner = this.vm(vm);
    if (typeof owner === 'number') return owner;
    const refused = this.check(clearDirtyLogRules, owner, request);
    if (refused !== null) return refused;
    if (request.numPages === 0) return 0;
    const size = Math.ceil(request.numPages / 64) * 8;
    if (!bitmap || this.memory.touchable(bitmap) < size)
      return this.refuse('EFAULT', `the bitmap is shorter than ${size} bytes`);
    const dirty = owner.slot(request.addressSpace, request.id)?.dirty;
    const first = Number(request.firstPage);
    for (const { start, end } of setRuns(bitmap, request.numPages)) dirty?.delete(first + start, first + end);
    return 0;
  }

  #setRegion(vm: number, region: UserMemoryRegion, guestMemfdOffset: U64, guestMemfd: number, v1: boolean): Result {
    const asked = regionRequest(region, guestMemfdOffset, guestMemfd, v1, (fd) => this.file(fd));
    const owner = this.vm(vm);
    if (typeof owner === 'number') return owner;
    const request = { ...asked, file: this.asGuestFile(asked.file, owner) };
    const refused = this.check(memslotRules, owner, request);
    if (refused !== null) return refused;
    if (!isSameRegion(owner, request)) {
      const old = owner.slot(request.addressSpace, request.id);
      const locked = old && this.check(lockedSlotRules, null, changeOf(old, request, this.pageSize));
      if (typeof locked === 'number') return locked;
      if (old && request.addressSpace === 0) this.#remap(owner, old, request);
      owner.applyRegion(request);
      this.keepGuestFile(asked.file, request);
    }
    return 0;
  }

  /** A slot that moves or goes takes its mappings along; a log that begins has to see the next write of each page. */
  #remap(vm: VmFile, { baseGfn, pages }: MemslotState, { guestPhysAddr, memorySize, flags }: RegionRequest): void {
    const stays = !isZero(memorySize) && toPages(guestPhysAddr, this.pageSize) === baseGfn;
    if (!stays) Stage2.of(vm).unmap(baseGfn, baseGfn + pages);
    else if (flags & KVM_MEM_LOG_DIRTY_PAGES) Stage2.of(vm).protect(baseGfn, baseGfn + pages);
  }

  #kvm(fd: number): Result | null {
    const file = this.file(i32('kvm', fd));
    if (!file) return this.badFd(fd);
    if (file.kind === 'kvm') return null;
    if (file instanceof VmFile && !this.#ownVms.has(file))
      return this.refuse('EIO', 'the VM belongs to another process');
    if (file instanceof SoftwareVcpu) return this.#notForVcpus(file);
    return file.kind === 'vm' ? this.#unknownVmRequest(0) : this.refuse('ENOTTY', 'not /dev/kvm');
  }

  /** The VM behind an fd this process may use, or the -errno. Contract §2. */
  protected override vm(fd: number): VmFile | Result {
    const file = this.file(i32('vm', fd));
    if (!file) return this.badFd(fd);
    if (file instanceof VmFile)
      return this.#ownVms.has(file) ? file : this.refuse('EIO', 'the VM belongs to another process');
    if (file instanceof SoftwareVcpu) return this.#notForVcpus(file);
    return file.kind === 'kvm'
      ? this.refuse('EINVAL', '/dev/kvm has no such request: it is one of VM fds')
      : this.refuse('ENOTTY', 'not a VM fd');
  }

  protected override isOwn(vm: VmFile): boolean {
    return this.#ownVms.has(vm);
  }

  #notForVcpus({ vm }: SoftwareVcpu): Result {
    return this.isOwn(vm)
      ? this.refuse('EINVAL', 'vCPU fds have no such request')
      : this.refuse('EIO', 'the VM belongs to another process');
  }

  #unknownVmRequest(request: number): Result {
    return this.refuse(this.machine.isArm ? 'EINVAL' : 'ENOTTY', `VM fds have no request ${hex(request)}`);
  }
}

function setBits(bitmap: Uint8Array, start: number, end: number): void {
  for (let bit = start; bit < end; ) {
    if (bit % 8 === 0 && end - bit >= 8) {
      const whole = Math.floor((end - bit) / 8);
      bitmap.fill(0xff, bit / 8, bit / 8 + whole);
      bit += whole * 8;
    } else {
      bitmap[bit >> 3] = (bitmap[bit >> 3] as number) | (1 << (bit % 8));
      bit++;
    }
  }
}

function* setRuns(bitmap: Uint8Array, bits: number): Generator<{ start: number; end: number }> {
  let start = -1;
  for (let bit = 0; bit < bits; bit++) {
    const set = ((bitmap[bit >> 3] as number) >> (bit % 8)) & 1;
    if (set && start < 0) start = bit;
    if (!set && start >= 0) {
      yield { start, end: bit };
      start = -1;
    }
  }
  if (start >= 0) yield { start, end: bits };
}
