import { type VmCapabilities, vmCapabilities } from './capabilities.ts';
import { Conversion, type ConversionReport, type ConvertOptions } from './conversion.ts';
import { KvmError, systemError } from './errors.ts';
import { formatBytes, formatRange } from './format.ts';
import { GuestMemfd } from './guest_memfd.ts';
import { GuestMemory } from './guest_memory.ts';
import type { GuestRange, Visibility } from './guest_range.ts';
import type { Kernel, Result } from './kernel/kernel.ts';
import type { BackendName, Kvm } from './kvm.ts';
import { capabilityNumber } from './kvm.ts';
import { MemoryAttributes } from './memory_attributes.ts';
import { Memslot, type MemslotOptions, type SlotOwner } from './memslot.ts';
import { RangeMap } from './ranges.ts';
import { ReadOnlyMap } from './read_only_map.ts';
import { closing, guardConstructor, internal, Resource } from './resource.ts';
import { GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP, KVM_MEMORY_ATTRIBUTE_PRIVATE } from './uapi.ts';
import { boolean, guestRange, integer, options, rangeError, typeError } from './validate.ts';
import { Vcpu } from './vcpu.ts';
import type { VmType } from './vm_type.ts';

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

export interface VmDescription {
  readonly backend: BackendName;
  readonly type: VmType;
  readonly memslots: readonly {
    readonly slot: number;
    readonly address: number;
    readonly size: number;
    readonly backing: string;
    readonly privateBytes: number;
  }[];
  /** Bytes really held: by host memory and mappable files the guest sees, and by guest_memfds that only the guest sees. */
  readonly residentBytes: { readonly shared: number; readonly private: number };
}

/**
 * A virtual machine: guest memory in memslots, the files behind it, and what of it is private.
 *
 * @see KVM_CREATE_VM
 */
export class Vm extends Resource {
  readonly type: VmType;
  /** The Kvm that created it. */
  readonly kvm: Kvm;
  readonly attributes: MemoryAttributes;
  readonly memory: GuestMemory;
  /** By slot number; live. */
  readonly memslots: ReadonlyMap<number, Memslot>;
  readonly #kernel: Kernel;
  readonly #fd: number;
  readonly #owner: SlotOwner;
  /** Ranges that a conversion is working on, or will. */
  readonly #converting = new Set<Conversion>();
  #lastConversion: Promise<unknown> = Promise.resolve();
  #capabilities: VmCapabilities | null = null;
  #nextVcpu = 0;

  /** @internal */
  constructor(token: typeof internal, kvm: Kvm, kernel: Kernel, fd: number, type: VmType) {
    guardConstructor(token, 'kvm.createVm()');
    super(kvm, `VM (fd ${fd})`, closing(kernel, fd));
    this.kvm = kvm;
    this.type = type;
    this.#kernel = kernel;
    this.#fd = fd;
    this.#owner = {
      vm: this,
      kernel,
      fd,
      assertOpen: () => this.assertOpen(),
      assertIdle: (address, size) => this.#assertIdle(address, size),
      detachViews: (address, size) => this.memory.detachViews(address, size),
      slots: new Map(),
      byAddress: new RangeMap(),
      firstFree: [],
    };
    this.memslots = new ReadOnlyMap(this.#owner.slots);
    this.attributes = new MemoryAttributes(internal, kernel.privateGfns(fd) ?? new RangeMap<true>(), kernel.pageSize);
    this.memory = new GuestMemory(internal, this.#owner);
    Object.freeze(this);
  }

  /** What this VM can do, asked of its fd once. */
  get capabilities(): VmCapabilities {
    this.assertOpen();
    this.#capabilities ??= vmCapabilities(this.#kernel, this.#fd);
    return this.#capabilities;
  }

  /** The slot of address space 0 that holds a guest physical address. */
  memslotAt(address: number): Memslot | undefined {
    return this.#owner.byAddress.get(integer('address', address));
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
    this.#assertGuestMemfd(mmap, initShared);
    const args = { size, flags: wanted };
    const fd = this.#check(this.#kernel.createGuestMemfd(this.#fd, args), 'KVM_CREATE_GUEST_MEMFD', args);
    return new GuestMemfd(internal, this, this.#kernel, { fd, size, flags: wanted });
  }

  /**
   * Shows memory to the guest at a guest physical address.
   *
   * @throws KvmError `EEXIST` the address range, the slot number or the bytes of the file are taken · `EINVAL` unaligned or beyond a limit,
   *   memory of another Kvm or VM · `ERR_CLOSED` · TypeError, RangeError for arguments that cannot be
   * @see KVM_SET_USER_MEMORY_REGION; with a guestMemfd KVM_SET_USER_MEMORY_REGION2, Linux 6.8
   */
  createMemslot(given: MemslotOptions): Memslot {
    return Memslot.create(internal, this.#owner, given);
  }

  /**
   * Adds a virtual CPU.
   *
   * @param id The lowest free number when omitted.
   * @throws KvmError `EEXIST` the id is taken · `EINVAL` it is too large · `ERR_CLOSED`
   * @see KVM_CREATE_VCPU
   */
  createVcpu(id?: number): Vcpu {
    const number = id === undefined ? this.#nextVcpu : integer('id', id, 0, 0x7fffffff);
    this.assertOpen();
    const fd = this.#check(this.#kernel.createVcpu(this.#fd, number), 'KVM_CREATE_VCPU', { id: number });
    this.#nextVcpu = Math.max(this.#nextVcpu, number + 1);
    return new Vcpu(internal, this, this.#kernel, fd, number);
  }

  /**
   * Says which pages are private: the bare kernel call. It neither moves nor frees any content; convert() does it all.
   *
   * @param range Guest physical addresses, page-aligned, with or without memslots.
   * @throws KvmError `EINVAL` unaligned · `UNSUPPORTED` a VM type without private memory · `EBUSY` a conversion is at work there ·
   *   `ERR_CLOSED`
   * @see KVM_SET_MEMORY_ATTRIBUTES, Linux 6.8, x86_64
   */
  setMemoryAttributes(range: GuestRange, attributes: { readonly private: boolean }): void {
    const { address, size } = guestRange('range', range);
    const secret = boolean('attributes.private', options('attributes', attributes).private);
    this.assertOpen();
    if (this.capabilities.memoryAttributes === 0n) {
      throw KvmError.unsupported(`VMs of type '${this.type}' have no private memory (KVM_CAP_MEMORY_ATTRIBUTES is 0)`);
    }
    this.#assertIdle(address, size);
    const args = { address, size, attributes: secret ? KVM_MEMORY_ATTRIBUTE_PRIVATE : 0, flags: 0 };
    this.#check(this.#kernel.setMemoryAttributes(this.#fd, args), 'KVM_SET_MEMORY_ATTRIBUTES', args);
    if (secret) this.memory.detachViews(address, size);
  }

  /**
   * Converts guest memory to private or shared: sets the attribute, and gives the memory of the other side back to the host, so that no byte is
   * held twice. The kernel works page by page and cannot be interrupted, so this goes in chunks, on another thread; conversions of one VM take
   * place one after the other. If anything fails before the last chunk, or the signal aborts, all the guest and the host can see is as it was (with
   * `content: 'zero'` the side that was about to appear is empty by then).
   *
   * @param range Guest physical addresses, page-aligned. Parts without a memslot only get the attribute.
   * @throws KvmError `UNSUPPORTED` no private memory here, or content that nobody can preserve · `EAGAIN` a page is pinned (`errorOffset`: the
   *   file offset) · `EINVAL` a memslot without memory for the side that would appear · `ERR_CLOSED` · the signal's reason
   */
  async convert(range: GuestRange, to: Visibility, given?: ConvertOptions): Promise<ConversionReport> {
    const conversion = new Conversion(this.#owner, guestRange('range', range), to, given);
    this.assertOpen();
    this.#converting.add(conversion);
    const before = this.#lastConversion;
    const result = conversion.runAfter(before);
    this.#lastConversion = Promise.allSettled([before, result]);
    try {
      return await result;
    } finally {
      this.#converting.delete(conversion);
    }
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
    this.#assertIdle(address, size);
    this.#converting.add(conversion);
    try {
      return conversion.runSync();
    } finally {
      this.#converting.delete(conversion);
    }
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
      })),
      residentBytes: resident,
    };
  }

  /** Removes every memslot, closes every guest_memfd of the VM, and the VM. */
  override close(): void {
    if (this.closed) return;
    for (const slot of [...this.memslots.values()]) slot.removedWithVm();
    super.close();
  }

  /** @internal */
  get backing() {
    return { kernel: this.#kernel, fd: this.#fd };
  }

  #assertIdle(address: number, size: number): void {
    for (const { range } of this.#converting) {
      if (range.address < address + size && address < range.address + range.size) {
        const message = `a conversion of ${formatRange(range.address, range.size)} is at work: await it first`;
        throw new KvmError({ code: 'EBUSY', message });
      }
    }
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

function backing({ guestMemfd, hostMemory, readonly }: Memslot): string {
  const sides = [
    hostMemory && `${hostMemory.kind} ${formatBytes(hostMemory.size)}`,
    guestMemfd &&
      `guest_memfd ${formatBytes(guestMemfd.size)}${guestMemfd.backing.hostAccessible ? ' (shared with the host)' : ''}`,
  ];
  return `${sides.filter(Boolean).join(' + ')}${readonly ? ', read-only' : ''}`;
}
