import { KvmError, systemError } from './errors.ts';
import { formatBytes } from './format.ts';
import type { FileRange } from './guest_range.ts';
import { Holds } from './holds.ts';
import type { Kernel, Result } from './kernel/kernel.ts';
import type { Kvm } from './kvm.ts';
import { tellOfDiscard } from './memory_user.ts';
import type { Memslot } from './memslot.ts';
import { lockError, refuseIfLocked } from './memslot_lock.ts';
import { type NumaMode, type NumaPolicy, numaPolicy, policyAt, setPolicy } from './numa.ts';
import { guardConstructor, type internal, Resource } from './resource.ts';
import {
  ERRNO,
  HUGE_SHIFT,
  HUGETLBFS_MAGIC,
  MADV_DONTNEED,
  MADV_REMOVE,
  MAP_ANONYMOUS,
  MAP_NORESERVE,
  MAP_PRIVATE,
  MAP_SHARED,
  MFD_CLOEXEC,
  MFD_HUGETLB,
  MiB,
  O_CLOEXEC,
  O_CREAT,
  O_RDWR,
  PROT_READ,
  PROT_WRITE,
} from './uapi.ts';
import { fileRange, integer, oneOf, options, rangeError, text } from './validate.ts';

export const hostMemoryKinds = ['anonymous', 'memfd', 'hugetlb', 'file', 'secret'] as const;
export type HostMemoryKind = (typeof hostMemoryKinds)[number];

export interface HostMemoryOptions {
  /** Bytes: a multiple of the page size, or of `hugePageSize`. */
  readonly size: number;
  /**
   * 'anonymous' (default) is memory of this process only; 'memfd', 'hugetlb' and 'file' can be shared with others. Touching a view of a 'file' that
   * another process has cut meanwhile is SIGBUS, as with every mapped file; copies through `vm.memory` are not. 'secret' is for the host's own
   * secrets, not for guests: not even the kernel has it in its page tables, and it is zeroed when it is closed (Linux 5.14; since 7.3 all of it is
   * there from the start). 'hugetlb' and 'secret' are `UNSUPPORTED` where the host has none.
   */
  readonly kind?: HostMemoryKind;
  /** Of a 'file', which is created when missing and made larger when shorter than `size`. On hugetlbfs it consists of huge pages, as `size` has to. */
  readonly path?: string;
  /** Bytes; 'hugetlb' only. 2 MiB by default. */
  readonly hugePageSize?: number;
  /** Takes pages from this NUMA node only. */
  readonly numaNode?: number;
}

/** Longest window: what one ArrayBuffer holds on Node 20. */
export const WINDOW_MAX = 2 ** 32;
const MINCORE_PAGES = 1 << 20;

/** Bytes of a mapping that occupy memory, by mincore(2). */
export function residentBytes(kernel: Kernel, mapping: number, { offset, size }: FileRange): number {
  const { pageSize } = kernel;
  const start = Math.floor(offset / pageSize);
  const end = Math.ceil((offset + size) / pageSize);
  const residency = new Uint8Array(Math.min(MINCORE_PAGES, end - start));
  let pages = 0;
  for (let page = start; page < end; page += residency.length) {
    const count = Math.min(residency.length, end - page);
    checked(kernel, kernel.mincore(mapping, page * pageSize, count * pageSize, residency), 'mincore');
    for (let i = 0; i < count; i++) pages += (residency[i] as number) & 1;
  }
  return pages * pageSize;
}

function checked(
  kernel: Kernel,
  result: Result,
  syscall: string,
  args: Readonly<Record<string, unknown>> = {},
): number {
  if (result < 0) throw systemError(result, { syscall, args }, kernel.explain());
  return result;
}

/** Whoever brings the pages of a memory. */
export interface Paging {
  /** Why not all of them will come, and the first that will not. */
  failure(): { readonly error: KvmError; readonly range: FileRange } | null;
}

/** How many memories have one, so that those who ask for failures need not look. */
export const paged = { count: 0 };

/**
 * Memory of this process that memslots can show to a guest: the shared side. Pages come into being when they are first touched.
 *
 * @see mmap(2), memfd_create(2)
 */
export class HostMemory extends Resource {
  /** Bytes. */
  readonly size: number;
  readonly kind: HostMemoryKind;
  readonly #kernel: Kernel;
  readonly #kvm: Kvm;
  readonly #mapping: number;
  readonly #fd: number;
  readonly #alignment: number;
  /** Why its pages may neither come nor go, while that is so. */
  #frozen: string | null = null;
  /** What brings its pages; stays when it has failed. */
  #paging: Paging | null = null;
  /** A protected guest may have pages of it, for as long as anybody has a file of its VM. */
  #isTaken = false;
  readonly #slots = new Set<Memslot>();
  /** What locked slots keep in memory. */
  readonly #locked = new Holds<Memslot>();
  /** The slots that show its bytes. */
  readonly #shown = new Holds<Memslot>();
  /** What of it is one VM's alone, by who has it. */
  readonly #leases = new Holds<string>();

  /** @internal */
  static create(
    token: typeof internal,
    kvm: Kvm,
    kernel: Kernel,
    given: HostMemoryOptions,
    assertOpen: () => void,
  ): HostMemory {
    const read = options('options', given);
    const kind = read.kind === undefined ? 'anonymous' : oneOf('kind', read.kind, hostMemoryKinds);
    const size = integer('size', read.size, 1);
    const { path, hugePageSize = 2 * MiB, numaNode } = read;
    integer('hugePageSize', hugePageSize, 2 * kernel.pageSize);
    if (!Number.isInteger(Math.log2(hugePageSize)))
      throw rangeError(`hugePageSize must be a power of two, got ${hugePageSize}`);
    if (numaNode !== undefined) integer('numaNode', numaNode, 0, 1023);
    assertPages(size, kind === 'hugetlb' ? hugePageSize : kernel.pageSize);
    const file = kind === 'file' ? text('path', path) : '';
    assertOpen();
    const { mapping, fd, alignment } = map(kernel, kind, size, file, hugePageSize);
    try {
      if (numaNode !== undefined) setPolicy(kernel, mapping, { offset: 0, size }, { mode: 'bind', nodes: [numaNode] });
      if (kind === 'secret') touchSecrets(kernel, mapping, size);
    } catch (error) {
      release(kernel, mapping, fd);
      throw error;
    }
    return new HostMemory(token, kvm, kernel, { kind, size, mapping, fd, alignment });
  }

  /** @internal */
  constructor(
    token: typeof internal,
    kvm: Kvm,
    kernel: Kernel,
    memory: { kind: HostMemoryKind; size: number; mapping: number; fd: number; alignment: number },
  ) {
    guardConstructor(token, 'kvm.createHostMemory()');
    const { mapping, fd } = memory;
    super(kvm, `host memory (${memory.kind}, ${formatBytes(memory.size)})`, releasing(kernel, mapping, fd));
    this.#kernel = kernel;
    this.#kvm = kvm;
    this.#mapping = mapping;
    this.#fd = fd;
    this.#alignment = memory.alignment;
    this.kind = memory.kind;
    this.size = memory.size;
    Object.freeze(this);
  }

  /** @internal */
  static is(value: unknown): value is HostMemory {
    return typeof value === 'object' && value !== null && #mapping in value;
  }

  /** Where it lies in this process; on the software kernel, in the address space that kernel keeps. */
  get address(): bigint {
    this.assertOpen();
    return this.#kernel.addressOf(this.#mapping);
  }

  /**
   * A live view: what is written here is in the guest's memory at once. It is detached (length 0) by close(), and, on the software kernel,
   * also when a `vm.memory.view()` of the same memory is. A memslot of a protected VM detaches this object's views, and there are none
   * from then on: a touch of what such a guest has is SIGSEGV, also through other objects over the same file. Use `vm.memory.read()` and
   * `write()`, which say `EFAULT`.
   *
   * @param range Bytes, at most 4 GiB; all of it when omitted.
   * @throws RangeError `ERR_OUT_OF_RANGE` · KvmError `EBUSY` a pager brings its pages, or a protected VM has had it · `EIO` the pager failed ·
   *   `ERR_CLOSED`
   */
  bytes(range?: FileRange): Uint8Array {
    const { offset, size } = fileRange('range', range, this.size);
    this.assertOpen();
    if (size > WINDOW_MAX) throw rangeError(`a view has at most ${formatBytes(WINDOW_MAX)}; ask for a part`);
    this.#assertViewable();
    const view = this.#kernel.window(this.#mapping, offset, size);
    keptAlive.set(view.buffer, this);
    return view;
  }

  /**
   * Gives pages back to the host, after memory users have heard of it (`discarding`); they read as zeros afterwards.
   *
   * @param range Bytes, aligned to the page size ('hugetlb': to its page size).
   * @throws RangeError `ERR_OUT_OF_RANGE` · KvmError `EOPNOTSUPP` (a file system without holes), `UNSUPPORTED` for secret memory, `EBUSY` a memslot
   *   that shows it is locked, `EPERM` while it is handed over, `ERR_CLOSED` · what a user threw
   * @see madvise(2) with MADV_DONTNEED; of a file ('memfd', 'hugetlb', 'file') with MADV_REMOVE
   */
  discard(range: FileRange): void {
    const { offset, size } = this.#pages(options('range', range));
    this.assertOpen();
    if (this.kind === 'secret') throw KvmError.unsupported('secret memory is given back as a whole, by close()');
    refuseIfLocked(this.#locked, offset, size, `host memory (${this.kind}, ${formatBytes(this.size)})`);
    tellOfDiscard(this.#shown.holders(offset, offset + size), 'hostOffset', { offset, size });
    this.assertOpen();
    assertThawed(this.#frozen);
    checked(this.#kernel, this.#kernel.madvise(this.#mapping, offset, size, this.#advice), 'madvise', { offset, size });
  }

  /**
   * Says which NUMA nodes the pages come from that are not there yet.
   *
   * @param range Bytes, aligned to the page size ('hugetlb': to its page size); all of it when omitted.
   * @throws RangeError `ERR_OUT_OF_RANGE` · KvmError `EINVAL` a node that the host does not have · `UNSUPPORTED` a kernel without NUMA · `ERR_CLOSED`
   * @see mbind(2)
   */
  setNumaPolicy(policy: NumaPolicy, range?: FileRange): void {
    const wanted = numaPolicy(policy);
    const pages = this.#pages(range);
    this.assertOpen();
    setPolicy(this.#kernel, this.#mapping, pages, wanted);
  }

  /**
   * The policy of the page at an offset, in bytes.
   *
   * @see get_mempolicy(2)
   */
  numaPolicyAt(offset: number): NumaMode {
    integer('offset', offset, 0, this.size - 1);
    this.assertOpen();
    return policyAt(this.#kernel, this.#mapping, offset);
  }

  /**
   * Bytes that really occupy memory.
   *
   * @param range Bytes; all of it when omitted.
   * @see mincore(2)
   */
  residentBytes(range?: FileRange): number {
    const wanted = fileRange('range', range, this.size);
    this.assertOpen();
    return residentBytes(this.#kernel, this.#mapping, wanted);
  }

  /**
   * Unmaps the memory and detaches its views. `Symbol.dispose` does the same, and removes the memslots that show it first.
   *
   * @throws KvmError `EBUSY` while a memslot shows it
   */
  override close(): void {
    refuseIfInUse(this.#slots, `host memory (${this.kind}, ${formatBytes(this.size)})`);
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
      kvm: this.#kvm,
      mapping: this.#mapping,
      /** -1 where it is no file's, or another thread's. */
      fd: this.#fd,
      freeze: (why: string | null) => {
        this.#frozen = why;
      },
      paging: () => this.#paging,
      setPaging: (paging: Paging | null) => {
        paged.count += Number(paging !== null) - Number(this.#paging !== null);
        this.#paging = paging;
      },
      /** For a protected VM: no view remains, and there will be none. */
      takeFromHost: () => {
        this.#isTaken = true;
        this.#kernel.releaseWindows(this.#mapping);
      },
      assertViewable: () => this.#assertViewable(),
      slots: this.#slots,
      shown: this.#shown,
      locked: this.#locked,
      leases: this.#leases,
      assertOpen: () => this.assertOpen(),
      advice: this.#advice,
      alignment: this.#alignment,
    };
  }

  #pages(range: FileRange | undefined): FileRange {
    const { offset, size } = fileRange('range', range, this.size);
    if (offset % this.#alignment !== 0 || size % this.#alignment !== 0)
      throw rangeError(`range must be made of whole pages of ${this.#alignment} bytes, got ${offset}, +${size}`);
    return { offset, size };
  }

  #assertViewable(): void {
    if (this.#isTaken)
      throw new KvmError({
        code: 'EBUSY',
        errno: -ERRNO.EBUSY,
        message:
          'a protected VM has had it, whose pages end a process that touches them in a view: read and write through vm.memory (EBUSY)',
      });
    if (!this.#paging) return;
    const failure = this.#paging.failure();
    if (failure) throw failure.error;
    const message =
      'not all of its pages have come, and a view could not wait for them: read and write through vm.memory';
    throw new KvmError({ code: 'EBUSY', errno: -ERRNO.EBUSY, message: `${message} (EBUSY)` });
  }

  get #advice(): number {
    return this.kind === 'anonymous' ? MADV_DONTNEED : MADV_REMOVE;
  }
}

/** A view keeps the memory it shows, although nobody else may refer to it any more. */
export const keptAlive = new WeakMap<ArrayBufferLike, object>();

/** @throws KvmError `EPERM` */
export function assertThawed(frozen: string | null): void {
  if (frozen !== null) throw new KvmError({ code: 'EPERM', errno: -ERRNO.EPERM, message: `${frozen} (EPERM)` });
}

/** @throws KvmError `EBUSY` */
export function refuseIfInUse(slots: ReadonlySet<Memslot>, what: string): void {
  if (slots.size === 0) return;
  const names = [...slots].map(({ slot }) => slot).join(', ');
  throw new KvmError({ code: 'EBUSY', message: `${what} is in use by memslot ${names}: remove the slot first` });
}

function map(
  kernel: Kernel,
  kind: HostMemoryKind,
  size: number,
  path: string,
  hugePageSize: number,
): { mapping: number; fd: number; alignment: number } {
  const alignment = kernel.pageSize;
  const mmap = (flags: number, fd: number): number =>
    kernel.mmap({ length: size, prot: PROT_READ | PROT_WRITE, flags, fd, offset: 0 });
  if (kind === 'anonymous') {
    const mapping = checked(kernel, mmap(MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1), 'mmap', { size });
    return { mapping, fd: -1, alignment };
  }
  const fd = open(kernel, kind, path, hugePageSize);
  try {
    const status: { size?: bigint } = {};
    checked(kernel, kernel.fstat(fd, status), 'fstat');
    const huge = kind === 'hugetlb' ? hugePageSize : kind === 'file' ? hugePageSizeOf(kernel, fd) : null;
    if (huge) assertPages(size, huge);
    if (Number(status.size) < size) {
      const resized = kernel.ftruncate(fd, size);
      const reason =
        resized === -ERRNO.EINVAL ? `${path} is not a regular file, or cannot be that large` : kernel.explain();
      if (resized < 0) throw systemError(resized, { syscall: 'ftruncate', args: { path, size } }, reason);
    }
    const mapping = mmap(MAP_SHARED, fd);
    if (kind === 'secret' && mapping === -ERRNO.EAGAIN) throw lockError(kernel, mapping, 'mmap', size);
    if (huge && mapping === -ERRNO.ENOMEM) throw tooFewHugePages(mapping, size, huge);
    return { mapping: checked(kernel, mapping, 'mmap', { size }), fd, alignment: huge ?? alignment };
  } catch (error) {
    kernel.close(fd);
    throw error;
  }
}

function assertPages(size: number, alignment: number): void {
  if (size % alignment !== 0) throw rangeError(`size must be a multiple of ${formatBytes(alignment)}, got ${size}`);
}

/** Bytes of a page of a file on hugetlbfs; null elsewhere. */
function hugePageSizeOf(kernel: Kernel, fd: number): number | null {
  const status: { type?: number; bsize?: number } = {};
  return kernel.fstatfs(fd, status) >= 0 && status.type === HUGETLBFS_MAGIC ? (status.bsize ?? null) : null;
}

function tooFewHugePages(result: number, size: number, hugePageSize: number): KvmError {
  const count = size / hugePageSize;
  const pool = `/sys/kernel/mm/hugepages/hugepages-${hugePageSize / 1024}kB/nr_hugepages`;
  const reason = `the host has no ${count} free huge pages of ${formatBytes(hugePageSize)}: echo ${count} > ${pool}`;
  return systemError(result, { syscall: 'mmap', args: { size, hugePageSize } }, reason);
}

/** Since Linux 7.3 a secret page counts as locked when it is first touched, and is SIGBUS where it may not be: so none is left to a view. */
function touchSecrets(kernel: Kernel, mapping: number, size: number): void {
  const { pageSize } = kernel;
  // Before, all of it counts as locked from the start.
  if (kernel.madvise(mapping, 0, pageSize, MADV_DONTNEED) === -ERRNO.EINVAL) return;
  const page = new Uint8Array(pageSize);
  for (let offset = 0; offset < size; offset += pageSize) {
    const touched = kernel.peek(mapping, offset, page);
    if (touched < 0) throw lockError(kernel, touched === -ERRNO.EFAULT ? -ERRNO.ENOMEM : touched, 'mmap', size);
  }
}

function open(kernel: Kernel, kind: HostMemoryKind, path: string, hugePageSize: number): number {
  if (kind === 'hugetlb') {
    const flags = MFD_CLOEXEC | MFD_HUGETLB | (Math.log2(hugePageSize) << HUGE_SHIFT);
    const fd = kernel.memfdCreate('guest-memory', flags >>> 0);
    const unknown: readonly number[] = [-ERRNO.EINVAL, -ERRNO.ENODEV, -ERRNO.ENOENT, -ERRNO.ENOSYS];
    if (unknown.includes(fd))
      throw KvmError.unsupported(
        `the host has no huge pages of ${formatBytes(hugePageSize)}: /sys/kernel/mm/hugepages lists its sizes`,
      );
    return checked(kernel, fd, 'memfd_create');
  }
  if (kind === 'memfd') return checked(kernel, kernel.memfdCreate('guest-memory', MFD_CLOEXEC), 'memfd_create');
  if (kind === 'file') return opened(kernel, kernel.open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0o600), path);
  const fd = kernel.memfdSecret(O_CLOEXEC);
  if (fd === -ERRNO.ENOSYS)
    throw KvmError.unsupported(
      'the host has no secret memory (memfd_secret): Linux 5.14 with CONFIG_SECRETMEM and secretmem.enable=1, the default since 6.5; on arm64 also rodata=full',
    );
  return checked(kernel, fd, 'memfd_secret');
}

function opened(kernel: Kernel, fd: Result, path: string): number {
  if (fd === -ERRNO.EOPNOTSUPP) throw KvmError.unsupported(kernel.explain() ?? `${path} has no memory to map`);
  if (fd < 0)
    throw systemError(fd, { syscall: 'open', args: { path } }, `${path} cannot be opened for reading and writing`);
  return fd;
}

function release(kernel: Kernel, mapping: number, fd: number): void {
  kernel.munmap(mapping);
  if (fd >= 0) kernel.close(fd);
}

function releasing(kernel: Kernel, mapping: number, fd: number): () => void {
  const weak = new WeakRef(kernel);
  return () => {
    const alive = weak.deref();
    if (alive) release(alive, mapping, fd);
  };
}
