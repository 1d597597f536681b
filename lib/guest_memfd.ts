import { KvmError, systemError } from './errors.ts';
import { formatBytes } from './format.ts';
import type { FileRange } from './guest_range.ts';
import { Holds } from './holds.ts';
import { keptAlive, refuseIfInUse, residentBytes, WINDOW_MAX } from './host_memory.ts';
import type { Kernel, Result } from './kernel/kernel.ts';
import { tellOfDiscard } from './memory_user.ts';
import type { Memslot } from './memslot.ts';
import { refuseIfLocked } from './memslot_lock.ts';
import { type NumaMode, type NumaPolicy, numaPolicy, policyAt, setPolicy } from './numa.ts';
import { guardConstructor, type internal, Resource } from './resource.ts';
import {
  ERRNO,
  FALLOC_FL_KEEP_SIZE,
  FALLOC_FL_PUNCH_HOLE,
  GUEST_MEMFD_FLAG_INIT_SHARED,
  GUEST_MEMFD_FLAG_MMAP,
  MAP_SHARED,
  PROT_READ,
  PROT_WRITE,
} from './uapi.ts';
import { fileRange, integer, options, rangeError, text } from './validate.ts';
import type { Vm } from './vm.ts';

/** The mode of fallocate(2) that gives pages back. */
export const PUNCH_HOLE = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE;

/**
 * A file whose pages are memory of one VM. Its size is fixed; pages come into being when the guest touches them, when the host may and does,
 * or by allocate(). The host can neither read nor write it, except through a view where it was created for that.
 *
 * @see KVM_CREATE_GUEST_MEMFD, Linux 6.8; on arm64 6.18
 */
export class GuestMemfd extends Resource {
  /** Bytes. */
  readonly size: number;
  /** GUEST_MEMFD_FLAG_MMAP 1, GUEST_MEMFD_FLAG_INIT_SHARED 2. */
  readonly flags: bigint;
  readonly #kernel: Kernel;
  readonly #vm: Vm;
  readonly #fd: number;
  readonly #slots = new Set<Memslot>();
  readonly #pins = new Holds<string>();
  /** What locked slots keep allocated. */
  readonly #locked = new Holds<Memslot>();
  readonly #mapping: { handle: number };

  /** @internal */
  constructor(token: typeof internal, vm: Vm, kernel: Kernel, file: { fd: number; size: number; flags: bigint }) {
    guardConstructor(token, 'vm.createGuestMemfd()');
    const { fd } = file;
    const mapping = { handle: -1 };
    super(vm, `guest_memfd (fd ${fd}, ${formatBytes(file.size)})`, releasing(kernel, fd, mapping));
    this.#kernel = kernel;
    this.#vm = vm;
    this.#fd = fd;
    this.#mapping = mapping;
    this.size = file.size;
    this.flags = file.flags;
    Object.freeze(this);
  }

  /** @internal */
  static is(value: unknown): value is GuestMemfd {
    return typeof value === 'object' && value !== null && #pins in value;
  }

  /** On KVM a file descriptor of this process, with FD_CLOEXEC; closed by close() and by nobody else. */
  get fd(): number {
    this.assertOpen();
    return this.#fd;
  }

  /**
   * Makes pages exist. What they hold stays; new ones read as zeros.
   *
   * @param range Bytes of the file, page-aligned; the whole file when omitted.
   * @throws KvmError `EINVAL` unaligned range · `ENOMEM`, `EINTR` (the pages allocated so far stay) · `EPERM` the VM is handed over · `ERR_CLOSED`
   * @see fallocate(2) with FALLOC_FL_KEEP_SIZE
   */
  allocate(range?: FileRange): void {
    this.#fallocate(FALLOC_FL_KEEP_SIZE, range);
  }

  /**
   * Gives pages of the file back to the host. Memory users hear of it first (`discarding`), then the guest loses its mappings; its next access
   * reads zeros.
   *
   * @param range Bytes of the file, page-aligned; the whole file when omitted.
   * @throws KvmError `EINVAL` unaligned range · `EBUSY` a memslot that has it is locked · `ERR_CLOSED` · what a user threw
   * @see fallocate(2) with FALLOC_FL_PUNCH_HOLE; guest_memfd since Linux 6.8
   */
  punchHole(range?: FileRange): void {
    const hole = fileRange('range', range, this.size);
    this.assertOpen();
    refuseIfLocked(this.#locked, hole.offset, hole.size, `guest_memfd fd ${this.#fd}`);
    tellOfDiscard(this.#slots, 'guestMemfdOffset', hole);
    this.#fallocate(PUNCH_HOLE, hole);
  }

  /**
   * A live view of the file, for a file created with `mmap` and `initShared` only: touching any other would kill the process. Detached
   * (length 0) by close().
   *
   * @param range Bytes, at most 4 GiB; the whole file when omitted.
   * @throws KvmError `UNSUPPORTED` where the file is not for the host · `EFAULT` a page is private, where they are converted in place ·
   *   `ERR_CLOSED`
   * @see mmap(2); GUEST_MEMFD_FLAG_MMAP and _INIT_SHARED, Linux 6.18
   */
  bytes(range?: FileRange): Uint8Array {
    const { offset, size } = fileRange('range', range, this.size);
    this.assertOpen();
    if (size > WINDOW_MAX) throw rangeError(`a view has at most ${formatBytes(WINDOW_MAX)}; ask for a part`);
    if (!this.#hostAccessible) {
      throw KvmError.unsupported(
        'this guest_memfd is not for the host: create it with { mmap: true, initShared: true } (Linux 6.18)',
      );
    }
    const { pageSize } = this.#kernel;
    const secret = this.#convertsInPlace ? this.#kernel.privatePages(this.#fd) : undefined;
    if (secret?.overlaps(Math.floor(offset / pageSize), Math.ceil((offset + size) / pageSize)))
      throw new KvmError({ code: 'EFAULT', errno: -ERRNO.EFAULT, message: 'a page of the range is private (EFAULT)' });
    const view = this.#kernel.window(this.#map(), offset, size);
    keptAlive.set(view.buffer, this);
    return view;
  }

  /**
   * Bytes of the file that really occupy memory. st_blocks would not tell: it is always 0.
   *
   * @param range Bytes; the whole file when omitted.
   * @throws KvmError `UNSUPPORTED` where neither call is allowed · `ERR_CLOSED`
   * @see cachestat(2), Linux 6.5, which needs no mapping; mincore(2) where a sandbox forbids it
   */
  residentBytes(range?: FileRange): number {
    const { offset, size } = fileRange('range', range, this.size);
    this.assertOpen();
    const status: { cache?: number } = {};
    const result = this.#kernel.cachestat(this.#fd, offset, size, status);
    if (result >= 0) return (status.cache ?? 0) * this.#kernel.pageSize;
    if (result !== -ERRNO.ENOSYS && result !== -ERRNO.EPERM) this.#check(result, 'cachestat', { offset, size });
    if (this.flags & BigInt(GUEST_MEMFD_FLAG_MMAP)) return residentBytes(this.#kernel, this.#map(), { offset, size });
    throw KvmError.unsupported(
      'cachestat(2) is not available here (Linux 6.5, or a sandbox forbids it), and the file cannot be mapped for mincore(2)',
    );
  }

  /**
   * Says which NUMA nodes the pages come from that are not there yet, whoever touches them first: the guest, the host, or allocate().
   *
   * @param range Bytes of the file, page-aligned; the whole file when omitted.
   * @throws KvmError `UNSUPPORTED` a kernel whose guest_memfds keep no policy, or a file created without `mmap` · `EINVAL` unaligned, or a node that the
   *   host does not have · `ERR_CLOSED`
   * @see mbind(2) on a mapping of the file, Linux 6.19
   */
  setNumaPolicy(policy: NumaPolicy, range?: FileRange): void {
    const wanted = numaPolicy(policy);
    const bytes = fileRange('range', range, this.size);
    this.assertOpen();
    this.#assertKeepsPolicy();
    setPolicy(this.#kernel, this.#map(), bytes, wanted);
  }

  /**
   * The policy of the page at an offset of the file, in bytes.
   *
   * @throws as setNumaPolicy()
   * @see get_mempolicy(2)
   */
  numaPolicyAt(offset: number): NumaMode {
    integer('offset', offset, 0, this.size - 1);
    this.assertOpen();
    this.#assertKeepsPolicy();
    return policyAt(this.#kernel, this.#map(), offset);
  }

  /**
   * Records that something outside the guest uses these pages. While the pin is held, converting guest memory that lies on them to private
   * fails with `EAGAIN`, the file offset in `errorOffset`, and the holders in the message.
   *
   * @param range Bytes of the file.
   * @param holder Who pins, as messages name it.
   * @returns The pin; dispose of it to let go.
   */
  pin(range: FileRange, holder = 'a pin'): Disposable {
    const { offset, size } = fileRange('range', options('range', range), this.size);
    this.assertOpen();
    this.#vm.backing.assertOwn();
    const pins = this.#pins;
    const pin = pins.add(offset, offset + size, text('holder', holder));
    let held = true;
    return {
      [Symbol.dispose]() {
        if (held) pins.delete(pin);
        held = false;
      },
    };
  }

  /**
   * Frees the file's memory and detaches its views. `Symbol.dispose` does the same, and removes the memslots bound to it first.
   *
   * @throws KvmError `EBUSY` while a memslot is bound to it
   */
  override close(): void {
    refuseIfInUse(this.#slots, `guest_memfd fd ${this.#fd}`);
    super.close();
  }

  override [Symbol.dispose](): void {
    for (const slot of this.#slots) slot.remove();
    super.close();
  }

  protected override closeWithOwner(): void {
    super.close();
  }

  /** @internal */
  get backing() {
    return {
      vm: this.#vm,
      fd: this.#fd,
      slots: this.#slots,
      /** The guest always sees the file's pages through a slot, never the slot's host memory. Contract §6. */
      gmemOnly: (this.flags & BigInt(GUEST_MEMFD_FLAG_MMAP)) !== 0n,
      hostAccessible: this.#hostAccessible,
      /** Its pages are private or shared by a state of the file's own. */
      convertsInPlace: this.#convertsInPlace,
      map: () => this.#map(),
      assertOpen: () => this.assertOpen(),
      pins: this.#pins,
      locked: this.#locked,
    };
  }

  /** Shared pages of it, at least. */
  get #hostAccessible(): boolean {
    const both = BigInt(GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED);
    return (this.flags & both) === both || this.#convertsInPlace;
  }

  get #convertsInPlace(): boolean {
    const mappable = (this.flags & BigInt(GUEST_MEMFD_FLAG_MMAP)) !== 0n;
    return mappable && !this.#vm.closed && this.#vm.capabilities.conversion === 'in-place';
  }

  /** Before Linux 6.19 mbind(2) marks the mapping only, and the file takes its pages from anywhere: tried on a file of its own. */
  #assertKeepsPolicy(): void {
    if (!(this.flags & BigInt(GUEST_MEMFD_FLAG_MMAP)))
      throw KvmError.unsupported('a NUMA policy is set through a mapping: create the guest_memfd with { mmap: true }');
    if (!this.#vm.backing.filesKeepPolicy())
      throw KvmError.unsupported(
        'a guest_memfd keeps its NUMA policy since Linux 6.19: this kernel would take it and not heed it',
      );
  }

  #map(): number {
    if (this.#mapping.handle < 0) {
      const args = { length: this.size, prot: PROT_READ | PROT_WRITE, flags: MAP_SHARED, fd: this.#fd, offset: 0 };
      this.#mapping.handle = this.#check(this.#kernel.mmap(args), 'mmap', { size: this.size });
    }
    return this.#mapping.handle;
  }

  #fallocate(mode: number, range?: FileRange): void {
    const { offset, size } = fileRange('range', range, this.size);
    this.assertOpen();
    this.#vm.assertThawed();
    this.#check(this.#kernel.fallocate(this.#fd, mode, offset, size), 'fallocate', { mode, offset, length: size });
  }

  #check(result: Result, syscall: string, args: Readonly<Record<string, unknown>>): number {
    if (result < 0) throw systemError(result, { syscall, args }, this.#kernel.explain());
    return result;
  }
}

function releasing(kernel: Kernel, fd: number, mapping: { readonly handle: number }): () => void {
  const weak = new WeakRef(kernel);
  return () => {
    if (mapping.handle >= 0) weak.deref()?.munmap(mapping.handle);
    weak.deref()?.close(fd);
  };
}
