import { types } from 'node:util';
import { AttachedMemory } from './attached_memory.ts';
import { guestMemfdKeepsPolicy, type VmCapabilities, vmCapabilities } from './capabilities.ts';
import { Conversion, type ConversionOwner, type ConversionReport, type ConvertOptions } from './conversion.ts';
import { KvmError, systemError } from './errors.ts';
import { formatBytes, formatRange } from './format.ts';
import { GuestMemfd } from './guest_memfd.ts';
import { GuestMemory } from './guest_memory.ts';
import type { GuestRange, Visibility } from './guest_range.ts';
import { Holds } from './holds.ts';
import { assertThawed, HostMemory } from './host_memory.ts';
import type { Kernel, MemoryAttributesArgs, Result } from './kernel/kernel.ts';
import { linuxKernel } from './kernel/linux/linux_kernel.ts';
import { type BackendName, capabilityNumber, Kvm, shareError } from './kvm.ts';
import { MemoryAttributes } from './memory_attributes.ts';
import { MemoryUser, type MemoryUserOptions } from './memory_user.ts';
import { Memslot, type MemslotOptions, type SlotOwner } from './memslot.ts';
import type { LockRights } from './memslot_lock.ts';
import { fileInPlace, PrivatePages } from './private_pages.ts';
import { RangeMap } from './ranges.ts';
import { ReadOnlyMap } from './read_only_map.ts';
import { closing, guardConstructor, internal, Resource } from './resource.ts';
import { readStatistics, type Statistics } from './statistics.ts';
import { ERRNO, GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP, KVM_MEMORY_ATTRIBUTE_PRIVATE } from './uapi.ts';
import { boolean, guestRange, integer, oneOf, options, rangeError, typeError } from './validate.ts';
import { Vcpu } from './vcpu.ts';
import { initialise } from './vcpu_setup.ts';
import { JournalReader, JournalWriter } from './vm_journal.ts';
import { type VmType, vmTypeNames } from './vm_type.ts';

export interface GuestMemfdOptions {
  /** Bytes, page-aligned; fixed for life. */
  readonly size: number;
  /** The host may map the file, and a guest sees nothing else in its slots. Linux 6.18. */
  readonly mmap?: boolean;
  /** The host may touch what it maps. Linux 6.18; not in VMs with private memory. */
  readonly initShared?: boolean;
  /** More flags by their bits, for kernels newer than this library. */
  readonly flags?: bigint;
}

/** A VM for another thread: see Vm.attach(). */
export interface VmHandle {
  readonly kvm: number;
  readonly vm: number;
  readonly type: VmType;
  readonly journal: SharedArrayBuffer;
}

export interface VmDescription {
  readonly backend: BackendName;
  readonly type: VmType;
  readonly memslots: readonly {
    readonly slot: number;
    readonly address: number;
    readonly size: number;
    readonly backing: string;
    readonly privateBytes: number;
    readonly locked: false | LockRights;
  }[];
  /** Bytes really held: by host memory and mappable files the guest sees, and by guest_memfds that only the guest sees. */
  readonly residentBytes: { readonly shared: number; readonly private: number };
}

/** Those that other threads may have. */
const shared = new Set<Vm>();

/**
 * A virtual machine: guest memory in memslots, the files behind it, and what of it is private.
 *
 * @see KVM_CREATE_VM
 */
export class Vm extends Resource {
  readonly type: VmType;
  /** The Kvm that created it. */
  readonly kvm: Kvm;
  readonly memory: GuestMemory;
  readonly #kernel: Kernel;
  readonly #fd: number;
  readonly #owner: SlotOwner & ConversionOwner;
  readonly #attributes: MemoryAttributes;
  readonly #private: PrivatePages;
  /** For the threads that look on. */
  #journal: JournalWriter | null = null;
  readonly #memslots: ReadonlyMap<number, Memslot>;
  readonly #users = new Set<MemoryUser>();
  /** Where another thread created the VM: its handle, and the memory as that thread made it. */
  readonly #attached: { readonly handle: VmHandle; readonly memory: AttachedMemory } | null;
  /** Conversions at work, or waiting for others, in the order they were asked for; and when each has ended. */
  readonly #converting = new Map<Conversion, Promise<unknown>>();
  #capabilities: VmCapabilities | null = null;
  /** Why its memory may not change, while that is so. */
  #frozen: string | null = null;
  /** What the host writes, for who copies the memory meanwhile: a dirty log has only what the guest writes. */
  #written: RangeMap<true> | null = null;
  /** Runs of its vCPUs that are awaited on this thread. */
  readonly #runs = { count: 0 };
  #nextVcpu = 0;
  /** Those of this thread. */
  readonly #vcpus = new Set<WeakRef<Vcpu>>();
  /** Whether a guest_memfd keeps its NUMA policy; null until it was tried. */
  #filesKeepPolicy: boolean | null = null;

  /** @internal */
  constructor(
    token: typeof internal,
    kvm: Kvm,
    kernel: Kernel,
    fd: number,
    type: VmType,
    handle: VmHandle | null = null,
  ) {
    guardConstructor(token, 'kvm.createVm()');
    super(kvm, `VM (fd ${fd})`, closing(kernel, fd));
    this.kvm = kvm;
    this.type = type;
    this.#kernel = kernel;
    this.#fd = fd;
    const gfns = new RangeMap<true>();
    const privatePages = new PrivatePages(kernel, kernel.privateGfns(fd) ?? gfns);
    this.#private = privatePages;
    const set = (args: MemoryAttributesArgs, result: Result): Result => this.#attributesSet(args, result);
    this.#owner = {
      vm: this,
      kernel,
      fd,
      assertOpen: () => this.assertOpen(),
      assertOwn: () => this.#assertOwn(),
      setAttributes: (args) => set(args, kernel.setMemoryAttributes(fd, args)),
      setAttributesAsync: async (args) => set(args, await kernel.setMemoryAttributesAsync(fd, args)),
      converted: (range, to) => this.#changed(range, to === 'private'),
      appeared: (slot) => {
        privatePages.slotAppeared(slot);
        this.#journal?.memslot(slot);
        if (fileInPlace(slot)) this.#journal?.rewrite();
      },
      disappeared: (slot) => {
        privatePages.slotDisappeared(slot);
        this.#journal?.memslotGone(slot.slot);
        if (fileInPlace(slot)) this.#journal?.rewrite();
      },
      assertIdle: (address, size) => this.#assertIdle(address, size),
      detachViews: (address, size) => this.memory.detachViews(address, size),
      slots: new Map(),
      byAddress: new RangeMap(),
      users: this.#users,
      holds: new Holds(),
      preFault: (slot) => this.#preFault(slot),
      firstFree: [],
    };
    this.#memslots = new ReadOnlyMap(this.#owner.slots);
    this.#attributes = new MemoryAttributes(internal, () => privatePages.gfns, kernel.pageSize);
    this.memory = new GuestMemory(internal, this.#owner);
    this.#attached = handle && {
      handle,
      memory: new AttachedMemory(this.#owner, gfns, new JournalReader(handle.journal)),
    };
    Object.freeze(this);
  }

  /**
   * The VM of another thread of this process, by the handle that thread posted. It can do what the thread needs that runs one of its vCPUs:
   * create vCPUs, look at memslots and attributes, read and write guest memory, all as the other thread keeps changing them (a view taken here
   * is detached at the next call that looks). Memslots, files and attributes are changed where the VM was created, and `UNSUPPORTED` here. Closing
   * it lets go of this thread's part, its Kvm included; once the other thread closes the VM, runs here end and every call is `ERR_CLOSED`.
   *
   * @throws KvmError `ERR_CLOSED` the VM is closed, or it is another process's · TypeError for what is no handle
   */
  static attach(handle: VmHandle): Vm {
    const { kvm: kvmShare, vm: vmShare, type, journal } = options('handle', handle);
    const shares = [integer('handle.kvm', kvmShare), integer('handle.vm', vmShare)] as const;
    oneOf('handle.type', type, vmTypeNames);
    if (!types.isSharedArrayBuffer(journal) || !JournalReader.canRead(journal))
      throw typeError('handle.journal is no journal: pass on `vm.handle` as it is');
    const kernel = linuxKernel();
    const kvm = Kvm.attach(internal, kernel, shares[0]);
    const fd = kernel.takeFile(shares[1], 'vm');
    if (fd >= 0) return new Vm(internal, kvm, kernel, fd, type, { kvm: shares[0], vm: shares[1], type, journal });
    kvm.close();
    throw KvmError.closed('the VM of this handle');
  }

  /**
   * What another thread of this process needs for Vm.attach(): plain data, for postMessage() or workerData. From now on the VM stays until it is
   * closed, or its thread ends.
   *
   * @throws KvmError `UNSUPPORTED` on the software kernel, which lives on one thread · `ERR_CLOSED`
   */
  get handle(): VmHandle {
    this.assertOpen();
    if (this.#attached) return this.#attached.handle;
    const [kvm, vm] = [this.kvm.share(), this.#shared(this.#kernel.shareFile(this.#fd), 'the VM')];
    // Its memory must not go before it, as the garbage collector might have it.
    shared.add(this);
    this.#journal ??= new JournalWriter({
      slots: this.#owner.slots,
      privateGfns: () => this.#private.gfns,
      shareOf: (memory) =>
        HostMemory.is(memory)
          ? this.#shared(this.#kernel.shareMapping(memory.backing.mapping), 'host memory')
          : this.#shared(this.#kernel.shareFile(memory.backing.fd), 'a guest_memfd'),
    });
    return { kvm, vm, type: this.type, journal: this.#journal.buffer };
  }

  /** Whether close() was called; of an attached VM also whether the thread that created it closed it. */
  override get closed(): boolean {
    return super.closed || this.#hasEnded;
  }

  get attributes(): MemoryAttributes {
    this.#attached?.memory.follow();
    return this.#attributes;
  }

  /** By slot number; live. */
  get memslots(): ReadonlyMap<number, Memslot> {
    this.#attached?.memory.follow();
    return this.#memslots;
  }

  /** What this VM can do, asked of its fd once. */
  get capabilities(): VmCapabilities {
    this.assertOpen();
    this.#capabilities ??= vmCapabilities(this.#kernel, this.#fd);
    return this.#capabilities;
  }

  /** The slot of address space 0 that holds a guest physical address. */
  memslotAt(address: number): Memslot | undefined {
    const at = integer('address', address);
    this.#attached?.memory.follow();
    return this.#owner.byAddress.get(at);
  }

  /**
   * @param capability By name ('GUEST_MEMFD') or number.
   * @returns What the VM fd answers: 0 is no.
   * @see KVM_CHECK_EXTENSION
   */
  checkExtension(capability: string | number): number {
    const number = capabilityNumber(capability);
    this.assertOpen();
    return this.#check(this.#kernel.checkExtension(this.#fd, number), 'KVM_CHECK_EXTENSION', { capability });
  }

  /**
   * Creates a file of guest memory. Nothing is allocated.
   *
   * @throws KvmError `EINVAL` size or flags · `UNSUPPORTED` a kernel or a VM type without guest_memfd, or without the flags · `EMFILE` ·
   *   `ERR_CLOSED`
   * @see KVM_CREATE_GUEST_MEMFD, Linux 6.8; on arm64 6.18
   */
  createGuestMemfd(given: GuestMemfdOptions): GuestMemfd {
    const { size, mmap = false, initShared = false, flags = 0n } = options('options', given);
    integer('size', size, 1);
    if (typeof flags !== 'bigint') throw typeError('flags must be a bigint');
    if (flags < 0n || flags >= 1n << 64n) throw rangeError('flags must have at most 64 bits');
    const wanted =
      flags |
      BigInt(boolean('mmap', mmap) ? GUEST_MEMFD_FLAG_MMAP : 0) |
      BigInt(boolean('initShared', initShared) ? GUEST_MEMFD_FLAG_INIT_SHARED : 0);
    this.assertOpen();
    this.#assertOwn();
    this.#assertGuestMemfd(mmap, initShared);
    const args = { size, flags: wanted };
    const fd = this.#check(this.#kernel.createGuestMemfd(this.#fd, args), 'KVM_CREATE_GUEST_MEMFD', args);
    return new GuestMemfd(internal, this, this.#kernel, { fd, size, flags: wanted });
  }

  /**
   * Shows memory to the guest at a guest physical address. The guest of a VM of type 'protected' takes each page of the host memory that it touches
   * for itself: views of that memory are detached, and there are none from then on; once the guest has run, the memslot stays where it is.
   *
   * @throws KvmError `EEXIST` the address range, the slot number or the bytes of the file are taken · `EINVAL` unaligned or beyond a limit,
   *   memory of another Kvm or VM · `ERR_CLOSED` · TypeError, RangeError for arguments that cannot be
   * @see KVM_SET_USER_MEMORY_REGION; with a guestMemfd KVM_SET_USER_MEMORY_REGION2, Linux 6.8
   */
  createMemslot(given: MemslotOptions): Memslot {
    return Memslot.create(internal, this.#owner, given);
  }

  /**
   * Adds a virtual CPU with every feature that KVM can give it: on x86_64 the CPUID it supports, on aarch64 the preferred target with PSCI 0.2.
   *
   * @param id The lowest free number when omitted. A number is taken until the VM is closed, also when its vCPU is.
   * @throws KvmError `EEXIST` the id is taken · `EINVAL` it is too large · `ERR_CLOSED`
   * @see KVM_CREATE_VCPU; KVM_GET_SUPPORTED_CPUID, KVM_SET_CPUID2; KVM_ARM_PREFERRED_TARGET, KVM_ARM_VCPU_INIT
   */
  createVcpu(id?: number): Vcpu {
    let number = id === undefined ? this.#nextVcpu : integer('id', id, 0, 0x7fffffff);
    this.assertOpen();
    let result = this.#kernel.createVcpu(this.#fd, number);
    // Other threads may have taken numbers too.
    while (id === undefined && result === -ERRNO.EEXIST) result = this.#kernel.createVcpu(this.#fd, ++number);
    const fd = this.#check(result, 'KVM_CREATE_VCPU', { id: number });
    this.#nextVcpu = Math.max(this.#nextVcpu, number + 1);
    try {
      initialise(this.#kernel, this.#fd, fd);
    } catch (error) {
      this.#kernel.close(fd);
      throw error;
    }
    const vcpu = new Vcpu(internal, this, this.#kernel, fd, number);
    this.#vcpus.add(new WeakRef(vcpu));
    if (!this.#attached) for (const slot of this.#owner.slots.values()) slot.mapLocked();
    return vcpu;
  }

  /**
   * Unlocks every locked memslot.
   *
   * @throws KvmError `UNSUPPORTED` not on the thread that created the VM · `ERR_CLOSED`
   * @see Memslot.lock()
   */
  unlockAll(): void {
    this.assertOpen();
    this.#assertOwn();
    for (const slot of this.#owner.slots.values()) if (slot.locked) slot.unlock();
  }

  /**
   * What the kernel counted for this VM: 'remote_tlb_flush', on x86_64 'pages_4k' …; nothing on the software kernel, which counts by vCPU.
   *
   * @throws KvmError `UNSUPPORTED` a kernel before 5.14 · `ERR_CLOSED`
   * @see KVM_GET_STATS_FD
   */
  statistics(): Statistics {
    this.assertOpen();
    return readStatistics(this.#kernel, this.#fd);
  }

  /**
   * Says which pages are private: the bare kernel call. It neither moves nor frees any content; convert() does it all.
   *
   * @param range Guest physical addresses, page-aligned, with or without memslots.
   * @throws KvmError `EINVAL` unaligned · `UNSUPPORTED` a VM type without private memory · `EBUSY` a conversion is at work there, or
   *   a memslot there is locked · `ERR_CLOSED`
   * @see KVM_SET_MEMORY_ATTRIBUTES, Linux 6.8, x86_64
   */
  setMemoryAttributes(range: GuestRange, attributes: { readonly private: boolean }): void {
    const { address, size } = guestRange('range', range);
    const secret = boolean('attributes.private', options('attributes', attributes).private);
    this.assertOpen();
    this.#assertOwn();
    if (this.capabilities.memoryAttributes === 0n) {
      throw KvmError.unsupported(`VMs of type '${this.type}' have no private memory (KVM_CAP_MEMORY_ATTRIBUTES is 0)`);
    }
    this.#assertIdle(address, size);
    this.#assertUnlocked(address, size);
    const args = { address, size, attributes: secret ? KVM_MEMORY_ATTRIBUTE_PRIVATE : 0, flags: 0 };
    this.#check(this.#owner.setAttributes(args), 'KVM_SET_MEMORY_ATTRIBUTES', args);
    if (secret) this.memory.detachViews(address, size);
  }

  /**
   * Converts guest memory to private or shared: asks whoever uses it, sets the attribute, gives the memory of the other side back to the host,
   * so that no byte is held twice, and tells the users. The kernel works page by page and cannot be interrupted, so this goes in chunks, on another
   * thread; conversions of the same memory take place in the order they were asked for. If anything fails before the last chunk, a user says no, or
   * the signal aborts, all the guest and the host can see is as it was (with `content: 'zero'` the side that was about to appear is empty by then).
   *
   * @param range Guest physical addresses, page-aligned. Parts without a memslot only get the attribute.
   * @throws KvmError `UNSUPPORTED` no private memory here, or content that nobody can preserve · `EAGAIN` somebody uses a page: a pin
   *   (`errorOffset`: the file offset), a hold (the guest address), a veto; `args.holders` has the names · `EINVAL` a memslot without memory
   *   for the side that would appear · `ERR_CLOSED` · the signal's reason · what a user threw
   */
  async convert(range: GuestRange, to: Visibility, given?: ConvertOptions): Promise<ConversionReport> {
    const conversion = new Conversion(this.#owner, guestRange('range', range), to, given);
    this.assertOpen();
    this.#assertOwn();
    const { address, size } = conversion.range;
    const result = conversion.runAfter(Promise.all(this.#conversionsOf(address, size).map(([, ended]) => ended)));
    const ended = result.then(
      () => this.#converting.delete(conversion),
      () => this.#converting.delete(conversion),
    );
    this.#converting.set(conversion, ended);
    await ended;
    return result;
  }

  /**
   * The same in one go on this thread.
   *
   * @throws KvmError as convert() · `EBUSY` a conversion is at work there
   */
  convertSync(range: GuestRange, to: Visibility, given?: ConvertOptions): ConversionReport {
    const { address, size } = guestRange('range', range);
    const conversion = new Conversion(this.#owner, { address, size }, to, given);
    this.assertOpen();
    this.#assertOwn();
    this.#assertIdle(address, size);
    this.#converting.set(conversion, Promise.resolve());
    try {
      return conversion.runSync();
    } finally {
      this.#converting.delete(conversion);
    }
  }

  /**
   * Registers a user of guest memory besides the guest: a device with DMA, another process. It is asked before memory changes sides, and told the
   * outcome; what it holds stays on its side.
   *
   * @throws KvmError `UNSUPPORTED` not on the thread that created the VM · `ERR_CLOSED` · TypeError
   */
  addMemoryUser(user: MemoryUserOptions): MemoryUser {
    this.#assertOwn();
    const { vm, holds, assertOpen } = this.#owner;
    const assertIdle = (address: number, size: number): void =>
      this.#assertIdle(address, size, (conversion) => conversion.working);
    return MemoryUser.add(internal, { vm, users: this.#users, holds, assertOpen, assertIdle }, user);
  }

  /** What there is, as plain data: every memslot, and the bytes really held. */
  describe(): VmDescription {
    this.assertOpen();
    const slots = [...this.memslots.values()];
    const files = new Set(slots.flatMap(({ guestMemfd }) => guestMemfd ?? []));
    const memories = new Set(slots.flatMap(({ hostMemory }) => hostMemory ?? []));
    const resident = { shared: 0, private: 0 };
    for (const memory of memories) resident.shared += memory.residentBytes();
    for (const file of files) resident[file.backing.hostAccessible ? 'shared' : 'private'] += file.residentBytes();
    return {
      backend: this.kvm.backend,
      type: this.type,
      memslots: slots.map((slot) => ({
        slot: slot.slot,
        address: slot.address,
        size: slot.size,
        backing: backing(slot),
        privateBytes: this.attributes.privateRanges(slot).reduce((sum, { size }) => sum + size, 0),
        locked: slot.locked,
      })),
      residentBytes: resident,
    };
  }

  /**
   * Removes every memslot, closes every guest_memfd of the VM, and the VM. Other threads that have it too find it closed; runs of its vCPUs
   * end.
   */
  override close(): void {
    if (super.closed) return;
    this.#journal?.end();
    this.#journal = null;
    shared.delete(this);
    for (const slot of [...this.#memslots.values()]) slot.gone();
    super.close();
    if (this.#attached) this.kvm.close();
  }

  protected override assertOpen(): void {
    super.assertOpen();
    if (this.#hasEnded) throw KvmError.closed('the VM, by the thread that created it,');
  }

  protected override get usesOthers(): boolean {
    return true;
  }

  /** Closed by the thread that created it, or that thread has ended. */
  get #hasEnded(): boolean {
    if (!this.#attached) return false;
    const { memory, handle } = this.#attached;
    return memory.ended || !this.#kernel.isShared(handle.vm);
  }

  /** Whether its memory is being handed over, or was: it neither runs nor changes then. */
  get frozen(): boolean {
    return this.#frozen !== null;
  }

  /** @internal */
  get backing() {
    return {
      kernel: this.#kernel,
      fd: this.#fd,
      runs: this.#runs,
      users: this.#users,
      assertOpen: () => this.assertOpen(),
      assertOwn: () => this.#assertOwn(),
      assertIdle: (address: number, size: number) => this.#assertIdle(address, size),
      assertUnheld: ({ address, size }: GuestRange) => this.#assertUnheld(address, size),
      filesKeepPolicy: () => {
        this.#filesKeepPolicy ??= guestMemfdKeepsPolicy(this.#kernel, this.#fd);
        return this.#filesKeepPolicy;
      },
      freeze: (why: string | null) => {
        this.#frozen = why;
      },
      noteWrites: (ranges: RangeMap<true> | null) => {
        this.#written = ranges;
      },
    };
  }

  /** By a vCPU of this thread, if there is one. */
  #preFault({ slot, address, size }: Memslot): boolean {
    if (slot >= 0x10000 || !this.capabilities.preFaultMemory) return false;
    for (const weak of this.#vcpus) {
      const vcpu = weak.deref();
      if (!vcpu || vcpu.closed) this.#vcpus.delete(weak);
      else if (preFaultAll(vcpu, { address, size })) return true;
    }
    return false;
  }

  #assertUnlocked(address: number, size: number): void {
    for (const { value: slot } of this.#owner.byAddress.within(address, address + size)) {
      if (!slot.locked) continue;
      const message = `memslot ${slot.slot} is locked, and what its guest sees stays: unlock it first (EBUSY)`;
      throw new KvmError({ code: 'EBUSY', errno: -ERRNO.EBUSY, message });
    }
  }

  /** @internal */
  written(address: number, size: number): void {
    if (size > 0) this.#written?.set(address, address + size, true);
  }

  /** @internal */
  assertThawed(): void {
    if (this.#frozen !== null) assertThawed(this.#frozen);
  }

  #assertOwn(): void {
    assertThawed(this.#frozen);
    if (this.#attached)
      throw KvmError.unsupported(
        'the memory of a VM is changed on the thread that created it: ask it to, by a message',
      );
  }

  #shared(share: Result, what: string): number {
    if (share < 0) throw shareError(this.#kernel, share, what);
    return share;
  }

  #attributesSet({ address, size, attributes }: MemoryAttributesArgs, result: Result): Result {
    if (result < 0) return result;
    // Slots that are converted in place have a state of their own.
    const [start, end] = [Number(address), Number(address) + Number(size)];
    let at = start;
    for (const piece of this.#owner.byAddress.within(start, end)) {
      if (!fileInPlace(piece.value)) continue;
      if (piece.start > at) this.#changed({ address: at, size: piece.start - at }, Boolean(attributes));
      at = piece.end;
    }
    if (at < end) this.#changed({ address: at, size: end - at }, Boolean(attributes));
    return result;
  }

  #changed({ address, size }: GuestRange, isPrivate: boolean): void {
    const { pageSize } = this.#kernel;
    this.#private.set(address / pageSize, (address + size) / pageSize, isPrivate);
    this.#journal?.attributes(address / pageSize, (address + size) / pageSize, isPrivate);
  }

  #conversionsOf(address: number, size: number): [Conversion, Promise<unknown>][] {
    return [...this.#converting].filter(
      ([{ range }]) => range.address < address + size && address < range.address + range.size,
    );
  }

  #assertIdle(address: number, size: number, isInTheWay = (conversion: Conversion) => !conversion.settled): void {
    const [at] = this.#conversionsOf(address, size).find(([conversion]) => isInTheWay(conversion)) ?? [];
    if (!at) return;
    const message = `a conversion of ${formatRange(at.range.address, at.range.size)} is at work: await it first`;
    throw new KvmError({ code: 'EBUSY', message });
  }

  /** Nobody besides the guest uses the range. */
  #assertUnheld(address: number, size: number): void {
    const holders = [...this.#owner.holds.holders(address, address + size)];
    if (holders.length === 0) return;
    throw new KvmError({
      code: 'EAGAIN',
      errno: -ERRNO.EAGAIN,
      message: `${formatRange(address, size)} is held by ${holders.join(' and ')}: release it first (EAGAIN)`,
      args: { holders },
    });
  }

  /** Flags and VM types that the kernel would answer with a bare EINVAL or ENOTTY. */
  #assertGuestMemfd(mmap: boolean, initShared: boolean): void {
    const { guestMemfd, guestMemfdMmap, guestMemfdInitShared } = this.capabilities;
    const { kernelRelease } = this.kvm;
    if (!guestMemfd) {
      throw KvmError.unsupported(
        `VMs of type '${this.type}' on kernel ${kernelRelease} have no guest_memfd (KVM_CAP_GUEST_MEMFD is 0): it needs Linux 6.18, or 6.8 and a VM type with private memory`,
      );
    }
    if (mmap && !guestMemfdMmap)
      throw KvmError.unsupported(`guest_memfd cannot be mapped on kernel ${kernelRelease}: \`mmap\` needs Linux 6.18`);
    if (initShared && !guestMemfdInitShared) {
      throw KvmError.unsupported(
        `\`initShared\` needs Linux 6.18 and a VM type without private memory, not '${this.type}' on kernel ${kernelRelease}`,
      );
    }
  }

  #check(result: Result, request: string, args: Readonly<Record<string, unknown>>): number {
    if (result < 0) throw systemError(result, { syscall: 'ioctl', request, args }, this.#kernel.explain());
    return result;
  }
}

/** Maps a range before the guest touches it. False where KVM cannot do that for this VM now, or the vCPU is busy. */
function preFaultAll(vcpu: Vcpu, range: GuestRange): boolean {
  for (let remaining = range; remaining.size > 0; ) {
    try {
      ({ remaining } = vcpu.preFaultMemory(remaining));
    } catch (error) {
      if (!(error instanceof KvmError)) throw error;
      if (['EOPNOTSUPP', 'EBUSY', 'EAGAIN'].includes(error.code)) return false;
      // A signal: nothing was done, and it can be done again.
      if (error.code !== 'EINTR') throw error;
    }
  }
  return true;
}

function backing({ guestMemfd, hostMemory, readonly }: Memslot): string {
  const sides = [
    hostMemory && `${hostMemory.kind} ${formatBytes(hostMemory.size)}`,
    guestMemfd &&
      `guest_memfd ${formatBytes(guestMemfd.size)}${guestMemfd.backing.hostAccessible ? ' (shared with the host)' : ''}`,
  ];
  return `${sides.filter(Boolean).join(' + ')}${readonly ? ', read-only' : ''}`;
}
