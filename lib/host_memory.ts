import { KvmError, systemError } from './errors.ts';
import { formatBytes } from './format.ts';
import type { FileRange } from './guest_range.ts';
import { Holds } from './holds.ts';
import type { Kernel, Result } from './kernel/kernel.ts';
import type { Kvm } from './kvm.ts';
import type { Memslot } from './memslot.ts';
import { guardConstructor, type internal, Resource } from './resource.ts';
import {
  ERRNO,
  HUGE_SHIFT,
  MADV_DONTNEED,
  MADV_REMOVE,
  MAP_ANONYMOUS,
  MAP_HUGETLB,
  MAP_NORESERVE,
  MAP_PRIVATE,
  MAP_SHARED,
  MFD_CLOEXEC,
  MiB,
  MPOL_BIND,
  O_CLOEXEC,
  O_CREAT,
  O_RDWR,
  PROT_READ,
  PROT_WRITE,
} from './uapi.ts';
import { fileRange, integer, oneOf, options, rangeError, text } from './validate.ts';

export const hostMemoryKinds = ['anonymous', 'memfd', 'hugetlb', 'file'] as const;
export type HostMemoryKind = (typeof hostMemoryKinds)[number];

export interface HostMemoryOptions {
  /** Bytes: a multiple of the page size, or of `hugePageSize`. */
  readonly size: number;
  /**
   * 'anonymous' (default) is memory of this process only; 'memfd' and 'file' can be shared with others. Touching a view of a 'file' that
   * another process has cut meanwhile is SIGBUS, as with every mapped file; copies through `vm.memory` are not.
   */
  readonly kind?: HostMemoryKind;
  /** Of a 'file', which is created when missing and made larger when shorter than `size`. */
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
  readonly #slots = new Set<Memslot>();
  /** The slots that show its bytes. */
  readonly #shown = new Holds<Memslot>();

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
    const alignment = kind === 'hugetlb' ? hugePageSize : kernel.pageSize;
    if (size % alignment !== 0) throw rangeError(`size must be a multiple of ${formatBytes(alignment)}, got ${size}`);
    const file = kind === 'file' ? text('path', path) : '';
    assertOpen();
    const [mapping, fd] = map(kernel, kind, size, file, hugePageSize);
    if (numaNode !== undefined) {
      const bound = kernel.mbind(mapping, 0, size, MPOL_BIND, [numaNode]);
      if (bound < 0) {
        release(kernel, mapping, fd);
        throw systemError(
          bound,
          { syscall: 'mbind', args: { numaNode } },
          bound === -ERRNO.EINVAL ? `the host has no NUMA node ${numaNode}` : null,
        );
      }
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
   * also when a `vm.memory.view()` of the same memory is.
   *
   * @param range Bytes, at most 4 GiB; all of it when omitted.
   * @throws RangeError `ERR_OUT_OF_RANGE` · KvmError `ERR_CLOSED`
   */
  bytes(range?: FileRange): Uint8Array {
    const { offset, size } = fileRange('range', range, this.size);
    this.assertOpen();
    if (size > WINDOW_MAX) throw rangeError(`a view has at most ${formatBytes(WINDOW_MAX)}; ask for a part`);
    const view = this.#kernel.window(this.#mapping, offset, size);
    keptAlive.set(view.buffer, this);
    return view;
  }

  /**
   * Gives pages back to the host; they read as zeros afterwards.
   *
   * @param range Bytes, aligned to the page size ('hugetlb': to its page size).
   * @throws RangeError `ERR_OUT_OF_RANGE` · KvmError `EOPNOTSUPP` (a file system without holes), `ERR_CLOSED`
   * @see madvise(2) with MADV_DONTNEED; for a 'memfd' or 'file' with MADV_REMOVE
   */
  discard(range: FileRange): void {
    const { offset, size } = fileRange('range', options('range', range), this.size);
    if (offset % this.#alignment !== 0 || size % this.#alignment !== 0) {
      throw rangeError(`range must be made of whole pages of ${this.#alignment} bytes, got ${offset}, +${size}`);
    }
    this.assertOpen();
    checked(this.#kernel, this.#kernel.madvise(this.#mapping, offset, size, this.#advice), 'madvise', { offset, size });
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
      /** Of the file behind it; -1 without. */
      fd: this.#fd,
      slots: this.#slots,
      shown: this.#shown,
      assertOpen: () => this.assertOpen(),
      advice: this.#advice,
      alignment: this.#alignment,
    };
  }

  get #advice(): number {
    return this.kind === 'memfd' || this.kind === 'file' ? MADV_REMOVE : MADV_DONTNEED;
  }
}

/** A view keeps the memory it shows, although nobody else may refer to it any more. */
export const keptAlive = new WeakMap<ArrayBufferLike, object>();

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
): [mapping: number, fd: number] {
  const mmap = (flags: number, fd: number): number =>
    kernel.mmap({ length: size, prot: PROT_READ | PROT_WRITE, flags, fd, offset: 0 });
  if (kind === 'anonymous') {
    return [checked(kernel, mmap(MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1), 'mmap', { size }), -1];
  }
  if (kind === 'hugetlb') {
    const mapping = mmap(MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | (Math.log2(hugePageSize) << HUGE_SHIFT), -1);
    const count = size / hugePageSize;
    const pool = `/sys/kernel/mm/hugepages/hugepages-${hugePageSize / 1024}kB/nr_hugepages`;
    if (mapping < 0) {
      const reason =
        mapping === -ERRNO.ENOMEM
          ? `the host has no ${count} free huge pages of ${formatBytes(hugePageSize)}: echo ${count} > ${pool}`
          : `the host has no huge pages of ${formatBytes(hugePageSize)}`;
      throw systemError(mapping, { syscall: 'mmap', args: { size, hugePageSize } }, reason);
    }
    return [mapping, -1];
  }
  const fd =
    kind === 'memfd'
      ? checked(kernel, kernel.memfdCreate('guest-memory', MFD_CLOEXEC), 'memfd_create')
      : opened(kernel.open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0o600), path);
  try {
    const status: { size?: bigint } = {};
    checked(kernel, kernel.fstat(fd, status), 'fstat');
    if (Number(status.size) < size) {
      const resized = kernel.ftruncate(fd, size);
      const reason =
        resized === -ERRNO.EINVAL ? `${path} is not a regular file, or cannot be that large` : kernel.explain();
      if (resized < 0) throw systemError(resized, { syscall: 'ftruncate', args: { path, size } }, reason);
    }
    return [checked(kernel, mmap(MAP_SHARED, fd), 'mmap', { size }), fd];
  } catch (error) {
    kernel.close(fd);
    throw error;
  }
}

function opened(fd: Result, path: string): number {
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
