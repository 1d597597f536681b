import type { CacheStatus, FileStatus, Kernel, Result, U64, UserMemoryRegion2 } from '../../lib/kernel/kernel.ts';
import {
  ERRNO,
  type ErrnoName,
  errnoName,
  GUEST_MEMFD_FLAG_INIT_SHARED,
  GUEST_MEMFD_FLAG_MMAP,
  KVM_CAP,
  KVM_MEM_GUEST_MEMFD,
  MAP_ANONYMOUS,
  MAP_PRIVATE,
  MAP_SHARED,
  PROT_READ,
  PROT_WRITE,
} from '../../lib/uapi.ts';
import type { ChildProgram } from './child_programs.ts';
import { exitReason, Guest } from './guest.ts';

/** Bytes of the address space and of the largest file, both plus one. */
export const U64_END = 2n ** 64n;
export const FILE_END = 2n ** 63n;

export const MMAP = GUEST_MEMFD_FLAG_MMAP;
export const INIT_SHARED = GUEST_MEMFD_FLAG_INIT_SHARED;

// ── what a case is made of

/** What came back: a system call's result, a value that was read, or several of them. */
export type Outcome = number | bigint | string | boolean | null | undefined | readonly Outcome[];

/** 'ok' stands for any result ≥ 0. */
export type Answer = ErrnoName | 'ok' | 'TypeError' | 'SIGBUS' | ExitName | number | bigint | boolean | null;

/** How a guest left, ahead of what its exit says. */
export type ExitName = 'MMIO read' | 'MMIO write' | 'port' | 'hypercall' | 'exit';

/** The answer since these versions; `before` is that of all older ones. */
export interface Versioned {
  readonly since: { readonly [version: string]: Expected };
  readonly before: Expected;
}
export interface PerArch {
  readonly x86_64: Expected;
  readonly aarch64: Expected;
}
export type Expected = Answer | readonly Expected[] | Versioned | PerArch;
/** What is expected of one kernel. */
export type Resolved = Answer | readonly Resolved[];

/** What a case needs. Answered by asking the kernel, so no backend is ever listed by hand. */
export interface Need {
  /** Completes 'not applicable: …'. */
  readonly missing: string;
  readonly met: (s: Scenario) => boolean;
}

export interface Case {
  readonly id: string;
  readonly sentence: string;
  readonly needs: readonly Need[];
  readonly run: (s: Scenario) => Promise<{ got: Outcome; expected: Expected }>;
}

interface ScenarioParts<Given> {
  readonly needs?: readonly Need[];
  readonly given?: (s: Scenario) => Given;
  readonly when: (s: Scenario, given: Given) => Outcome | Promise<Outcome>;
  readonly expect: Expected | ((s: Scenario) => Expected);
}

/** One case of the contract: its number there (its section, where it has none), a sentence, and data. */
export function scenario<Given = undefined>(
  id: number | string,
  sentence: string,
  { needs = [], given, when, expect }: ScenarioParts<Given>,
): Case {
  return {
    id: String(id),
    sentence,
    needs,
    run: async (s) => {
      const got = await when(s, given?.(s) as Given);
      return { got, expected: typeof expect === 'function' ? expect(s) : expect };
    },
  };
}

export interface Section {
  readonly title: string;
  readonly cases: readonly Case[];
}

export function section(title: string, cases: readonly Case[]): Section {
  return { title, cases };
}

// ── comparing

const answerNames: ReadonlySet<string> = new Set([...Object.keys(ERRNO), 'TypeError']);

/** Array.isArray, for readonly arrays too. */
function isList<T>(value: T | readonly T[]): value is readonly T[] {
  return Array.isArray(value);
}

/** The expectation with versions and architectures resolved. */
export function resolve(expected: Expected, kernel: Kernel): Resolved {
  if (typeof expected !== 'object' || expected === null) return expected;
  if (isList(expected)) return expected.map((e) => resolve(e, kernel));
  if ('since' in expected) {
    const newest = Object.keys(expected.since)
      .filter((version) => compareVersions(kernel.release, version) >= 0)
      .sort(compareVersions)
      .at(-1);
    return resolve(newest === undefined ? expected.before : (expected.since[newest] as Expected), kernel);
  }
  return resolve(expected[kernel.arch], kernel);
}

export function matches(got: Outcome, expected: Resolved): boolean {
  if (isList(expected)) {
    return isList(got) && got.length === expected.length && expected.every((e, i) => matches(got[i], e));
  }
  if (expected === 'ok') return typeof got === 'number' && got >= 0;
  if (typeof expected === 'string' && answerNames.has(expected)) return describe(got) === expected;
  if (typeof expected === 'number' && typeof got === 'bigint') return BigInt(expected) === got;
  if (typeof expected === 'bigint' && typeof got === 'number') return BigInt(got) === expected;
  return got === expected;
}

/** 'EINVAL' for a result of -22; lists in brackets. */
export function describe(got: unknown): string {
  if (Array.isArray(got)) return `[${got.map(describe).join(', ')}]`;
  return typeof got === 'number' && got < 0 ? errnoName(got) : String(got);
}

export function compareVersions(a: string, b: string): number {
  const parts = (version: string) => (/^\d+(\.\d+)*/.exec(version)?.[0] ?? '0').split('.').map(Number);
  const [x, y] = [parts(a), parts(b)];
  for (let i = 0; i < y.length; i++) {
    const difference = (x[i] ?? 0) - (y[i] ?? 0);
    if (difference !== 0) return difference;
  }
  return 0;
}

// ── the world of one case

/** A slot in pages; `gpa`, `size`, `hva` and `offset` are the same in bytes, for values that are no multiple of a page. */
export interface SlotOptions {
  slot?: number;
  /** Guest page number. */
  at?: number;
  pages?: number;
  gpa?: U64;
  size?: U64;
  hva?: U64;
  flags?: number;
  file?: number;
  /** Page of the file. */
  from?: number;
  offset?: U64;
}

export interface MapOptions {
  pages?: number;
  from?: number;
  prot?: number;
  flags?: number;
  length?: U64;
  offset?: U64;
}

export type FdKind = 'kvm' | 'vm' | 'vcpu' | 'gmem' | 'file';

/** Runs a program in another process that inherits these fds. How depends on the backend. */
export type InChild = (
  program: ChildProgram,
  fds: readonly { fd: number; kind: FdKind }[],
  options: { descriptors?: number },
) => Outcome;

/**
 * What a case works with: one kernel, and everything opened in it so far, which `close` gives back. Methods that build the setup throw
 * when they fail; those named after a system call return its result.
 */
export class Scenario {
  readonly kernel: Kernel;
  readonly #inChild: InChild;
  readonly #fds = new Map<number, FdKind>();
  readonly #mappings = new Set<number>();
  #kvm: number | undefined;

  constructor(kernel: Kernel, inChild: InChild) {
    this.kernel = kernel;
    this.#inChild = inChild;
  }

  /** Bytes of a page. */
  get P(): number {
    return this.kernel.pageSize;
  }
  since(version: string): boolean {
    return compareVersions(this.kernel.release, version) >= 0;
  }

  // ── setup
  get kvm(): number {
    this.#kvm ??= this.#built(this.#track('kvm', this.kernel.openKvm()), 'open /dev/kvm');
    return this.#kvm;
  }
  vm(type: U64 = 0): number {
    return this.#built(this.createVm(type), `create a VM of type ${type}`);
  }
  /** A VM whose slots may have a guest_memfd: before 6.18 only one with private memory. */
  gmemVm(): number {
    const vm = this.vm();
    return this.kernel.checkExtension(vm, KVM_CAP.GUEST_MEMFD) === 1 ? vm : this.vm(1);
  }
  gmem(vm: number, pages = 16, flags = 0): number {
    return this.#built(this.createGmem(vm, pages * this.P, flags), `create a guest_memfd with flags ${flags}`);
  }
  /** A guest_memfd that a slot accepts: arm64 wants it mappable. */
  bindable(vm: number, pages = 16): number {
    return this.gmem(vm, pages, this.kernel.arch === 'aarch64' ? MMAP : 0);
  }
  memfd(pages = 0, flags = 0): number {
    const fd = this.#built(this.#track('file', this.kernel.memfdCreate('conformance', flags)), 'create a memfd');
    if (pages > 0) this.#built(this.kernel.ftruncate(fd, pages * this.P), 'size a memfd');
    return fd;
  }
  map(fd: number, options: MapOptions = {}): number {
    return this.#built(this.mmap(fd, options), 'map');
  }
  anonymous(pages: number): number {
    return this.map(-1, { pages, flags: MAP_PRIVATE | MAP_ANONYMOUS });
  }
  /** For a setup step: throws unless it succeeded. */
  #built(result: Result, what: string): number {
    if (result < 0) throw new Error(`setup: cannot ${what}: ${errnoName(result)}`);
    return result;
  }

  // ── fds
  createVm(type: U64 = 0): Result {
    return this.#track('vm', this.kernel.createVm(this.kvm, type));
  }
  createGmem(vm: number, size: U64, flags: U64 = 0): Result {
    return this.#track('gmem', this.kernel.createGuestMemfd(vm, { size, flags }));
  }
  open(path: string, flags: number): Result {
    return this.#track('file', this.kernel.open(path, flags));
  }
  dup(fd: number): Result {
    return this.#track(this.#fds.get(fd) ?? 'file', this.kernel.dup(fd));
  }
  epoll(): Result {
    return this.#track('file', this.kernel.epollCreate1(0));
  }
  userfaultfd(flags = 0o2000000): Result {
    return this.#track('file', this.kernel.userfaultfd(flags));
  }
  closeFd(fd: number): Result {
    this.#fds.delete(fd);
    return this.kernel.close(fd);
  }
  #track(kind: FdKind, fd: Result): Result {
    if (fd >= 0) this.#fds.set(fd, kind);
    return fd;
  }
  /** Has F_GETFD's bit 0. */
  closesOnExec(fd: number): boolean {
    return this.kernel.fcntlGetFd(fd) === 1;
  }
  cap(fd: number, name: keyof typeof KVM_CAP): Result {
    return this.kernel.checkExtension(fd, KVM_CAP[name]);
  }
  enable(vm: number, cap: number, value: U64, flags = 0): Result {
    return this.kernel.enableCap(vm, { cap, flags, args: [value, 0, 0, 0] });
  }

  // ── slots
  /** KVM_SET_USER_MEMORY_REGION2: by default one page of slot 0 at 0, with nothing behind it. */
  slot(vm: number, options: SlotOptions = {}): Result {
    return this.kernel.setUserMemoryRegion2(vm, this.#region(options));
  }
  slotV1(vm: number, options: SlotOptions = {}): Result {
    return this.kernel.setUserMemoryRegion(vm, this.#region(options));
  }
  /** The same with the GUEST_MEMFD flag. */
  bind(vm: number, options: SlotOptions): Result {
    return this.slot(vm, { ...options, flags: (options.flags ?? 0) | KVM_MEM_GUEST_MEMFD });
  }
  /** A request of size 0. */
  remove(vm: number, slot: number, options: SlotOptions = {}): Result {
    return this.slot(vm, { ...options, slot, size: 0 });
  }
  #region(o: SlotOptions): UserMemoryRegion2 {
    return {
      slot: o.slot ?? 0,
      flags: o.flags ?? 0,
      guestPhysAddr: o.gpa ?? (o.at ?? 0) * this.P,
      memorySize: o.size ?? (o.pages ?? 1) * this.P,
      userspaceAddr: o.hva ?? 0,
      guestMemfdOffset: o.offset ?? (o.from ?? 0) * this.P,
      guestMemfd: o.file ?? -1,
    };
  }

  // ── attributes and the dirty log
  /** KVM_SET_MEMORY_ATTRIBUTES: PRIVATE unless told. */
  setAttributes(vm: number, address: U64, size: U64, attributes: U64 = 8, flags: U64 = 0): Result {
    return this.kernel.setMemoryAttributes(vm, { address, size, attributes, flags });
  }
  /** The private ranges, [first gfn, end gfn) each. */
  privateRanges(vm: number): Outcome {
    return [...(this.kernel.privateGfns(vm) ?? [])].map(({ start, end }) => [start, end]);
  }
  /** The slot's first bytes of dirty bitmap, or the refusal. */
  dirty(vm: number, slot: number, bytes = 8): Outcome {
    const bitmap = new Uint8Array(bytes).fill(0xee);
    const result = this.kernel.getDirtyLog(vm, { slot, dirtyBitmap: bitmap });
    return result < 0 ? result : [...bitmap];
  }
  clearDirty(vm: number, slot: number, firstPage: U64, numPages: number, bitmap: Uint8Array | null = null): Result {
    return this.kernel.clearDirtyLog(vm, { slot, firstPage, numPages, dirtyBitmap: bitmap });
  }

  // ── vCPUs
  vcpu(vm: number, id = 0): number {
    return this.#built(this.#track('vcpu', this.kernel.createVcpu(vm, id)), 'create a vCPU');
  }
  /** A vCPU that does what the case says, waiting for it; or one about to run this machine code. */
  guest(vm: number, code?: readonly number[]): Guest {
    return new Guest(this, vm, code);
  }
  /** KVM_PRE_FAULT_MEMORY: the result, what is left as its first page and their number, and the exit reason in kvm_run. */
  preFault(vcpu: number, page: number, pages: number): Outcome {
    const args = { gpa: BigInt(page * this.P), size: BigInt(pages * this.P), flags: 0 };
    const result = this.kernel.preFaultMemory(vcpu, args);
    const left = [args.gpa, args.size].map((bytes) => Number(bytes) / this.P);
    return [result, ...left, exitReason(this.kernel.runPage(vcpu))];
  }

  // ── files and mappings
  fallocate(fd: number, mode: number, from: number, pages: number): Result {
    return this.kernel.fallocate(fd, mode, from * this.P, pages * this.P);
  }
  stat(fd: number): FileStatus {
    const status: FileStatus = {};
    this.#built(this.kernel.fstat(fd, status), 'fstat');
    return status;
  }
  /** Pages of the file in memory. */
  cached(fd: number, from = 0, pages = 0): Outcome {
    const status: CacheStatus = {};
    const result = this.kernel.cachestat(fd, from * this.P, pages * this.P, status);
    return result < 0 ? result : status.cache;
  }
  /** Shared and writable unless told. */
  mmap(fd: number, o: MapOptions = {}): Result {
    const mapping = this.kernel.mmap({
      length: o.length ?? (o.pages ?? 16) * this.P,
      prot: o.prot ?? PROT_READ | PROT_WRITE,
      flags: o.flags ?? MAP_SHARED,
      fd,
      offset: o.offset ?? (o.from ?? 0) * this.P,
    });
    if (mapping >= 0) this.#mappings.add(mapping);
    return mapping;
  }
  munmap(mapping: number): Result {
    this.#mappings.delete(mapping);
    return this.kernel.munmap(mapping);
  }
  /** The first byte of a page, or the refusal. */
  get(mapping: number, page: number): Result {
    const byte = new Uint8Array(1);
    const result = this.kernel.peek(mapping, page * this.P, byte);
    return result < 0 ? result : (byte[0] as number);
  }
  /** Writes the first byte of a page: 1, or the refusal. */
  put(mapping: number, page: number, value: number): Result {
    return this.kernel.poke(mapping, page * this.P, Uint8Array.of(value));
  }
  advise(mapping: number, from: number, pages: number, advice: number): Result {
    return this.kernel.madvise(mapping, from * this.P, pages * this.P, advice);
  }
  protect(mapping: number, prot: number): Result {
    return this.kernel.mprotect(mapping, 0, this.P, prot);
  }

  // ── other processes
  /** Runs the program in another process that inherits these fds, optionally under a limit of descriptors. */
  inChild(program: ChildProgram, fds: readonly number[] = [], options: { descriptors?: number } = {}): Outcome {
    const kinds = fds.map((fd) => ({ fd, kind: this.#fds.get(fd) ?? 'file' }));
    return this.#inChild(program, kinds, options);
  }

  /** Gives everything back; the fds and mappings that could not be. */
  close(): string[] {
    const failed: string[] = [];
    for (const mapping of this.#mappings) if (this.kernel.munmap(mapping) < 0) failed.push(`mapping ${mapping}`);
    for (const [fd, kind] of this.#fds) if (this.kernel.close(fd) < 0) failed.push(`${kind} fd ${fd}`);
    this.#mappings.clear();
    this.#fds.clear();
    this.#kvm = undefined;
    return failed;
  }
}
