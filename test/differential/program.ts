import type { U64 } from '../../lib/kernel/kernel.ts';

// A program of calls at the boundary, as data: it names objects by what they are and in which order they came, and numbers by what they
// are near to, so that it means the same on every kernel, page size and address layout, and can be kept as text.

/** What a number is measured from, besides 0. */
export type Base =
  | '2^31'
  | '2^32'
  | '2^52'
  | '2^63'
  | '2^64'
  /** The end of the guest physical addresses that a slot may use. */
  | 'limit'
  /** The end of the process's addresses. */
  | 'task'
  /** 2^31 pages: one more than a slot has. */
  | 'slot'
  /** The size of the file that the step names. */
  | 'file';

/** Pages; or pages, and perhaps bytes, from a base. */
export type Num = number | readonly [base: Base | '0', pages: number, bytes?: number];

export type FdKind = 'kvm' | 'vm' | 'file' | 'vcpu';
/** The fd that was the nth of its kind to be opened, counted around, open or closed by now; or 'none': -1. */
export type Fd = 'kvm' | 'none' | `${'vm' | 'file' | 'vcpu'}${number}`;

/** A page of the nth mapping, or an address. */
export type Host = MappedPage | Num;
export interface MappedPage {
  readonly mapping: number;
  readonly page: number;
}

export function isMappedPage(host: Host): host is MappedPage {
  return typeof host === 'object' && 'mapping' in host;
}

interface Region {
  readonly vm: Fd;
  readonly slot: number;
  readonly space?: number;
  readonly flags: number;
  readonly gpa: Num;
  readonly size: Num;
  readonly hva: Host;
}

interface Range {
  readonly map: number;
  readonly from: Num;
  readonly length: Num;
}

export type Step =
  | { readonly call: 'createVm'; readonly fd: Fd; readonly type: Num }
  | { readonly call: 'checkExtension'; readonly fd: Fd; readonly cap: number }
  | { readonly call: 'createGuestMemfd'; readonly vm: Fd; readonly size: Num; readonly flags: number }
  | ({ readonly call: 'setUserMemoryRegion' } & Region)
  | ({ readonly call: 'setUserMemoryRegion2'; readonly file: Fd; readonly offset: Num } & Region)
  | {
      readonly call: 'setMemoryAttributes';
      readonly vm: Fd;
      readonly address: Num;
      readonly size: Num;
      readonly attributes: number;
      readonly flags: number;
    }
  | { readonly call: 'enableCap'; readonly fd: Fd; readonly cap: number; readonly flags: number; readonly value: Num }
  | { readonly call: 'getDirtyLog'; readonly vm: Fd; readonly slot: number; readonly bytes: number | null }
  | {
      readonly call: 'clearDirtyLog';
      readonly vm: Fd;
      readonly slot: number;
      readonly first: number;
      readonly pages: number;
      readonly bytes: number | null;
    }
  | { readonly call: 'createVcpu'; readonly vm: Fd; readonly id: number }
  | {
      readonly call: 'preFaultMemory';
      readonly vcpu: Fd;
      readonly gpa: Num;
      readonly size: Num;
      readonly flags: number;
    }
  | { readonly call: 'memfdCreate'; readonly flags: number }
  | { readonly call: 'fallocate'; readonly fd: Fd; readonly mode: number; readonly offset: Num; readonly length: Num }
  | { readonly call: 'ftruncate'; readonly fd: Fd; readonly length: Num }
  | { readonly call: 'fstat' | 'fstatfs' | 'fsync' | 'dup' | 'close'; readonly fd: Fd }
  | { readonly call: 'fcntl'; readonly fd: Fd; readonly command: number; readonly argument: number }
  | { readonly call: 'pread' | 'pwrite'; readonly fd: Fd; readonly offset: Num; readonly bytes: number }
  | { readonly call: 'read' | 'write'; readonly fd: Fd; readonly bytes: number }
  | { readonly call: 'lseek'; readonly fd: Fd; readonly offset: Num; readonly whence: number }
  | { readonly call: 'cachestat'; readonly fd: Fd; readonly offset: Num; readonly length: Num }
  | {
      readonly call: 'mmap';
      readonly fd: Fd;
      readonly length: Num;
      readonly offset: Num;
      readonly prot: number;
      readonly flags: number;
    }
  | { readonly call: 'munmap'; readonly map: number }
  | ({ readonly call: 'mprotect'; readonly prot: number } & Range)
  | ({ readonly call: 'madvise'; readonly advice: number } & Range)
  | ({ readonly call: 'msync'; readonly flags: number } & Range)
  | ({ readonly call: 'mlock' | 'munlock' | 'mincore' } & Range)
  | ({ readonly call: 'peek' } & Range)
  | ({ readonly call: 'poke'; readonly value: number } & Range)
  /** The guest agent's CPU reads, or writes, a byte of this page. */
  | { readonly call: 'guestRead'; readonly vm: Fd; readonly page: number }
  | { readonly call: 'guestWrite'; readonly vm: Fd; readonly page: number; readonly value: number }
  /** arm64: it asks to share the page with the host, or to take it back. */
  | { readonly call: 'guestShare' | 'guestUnshare'; readonly vm: Fd; readonly page: number };

/** What the guest's CPU does. */
export type ByGuest = Extract<Step, { readonly call: `guest${string}` }>;

export function isByGuest(step: Step): step is ByGuest {
  return step.call.startsWith('guest');
}

export type Call = Step['call'];
export type Program = readonly Step[];

/** What the kernels under test are measured with. Units: bytes. */
export interface Facts {
  readonly page: number;
  readonly limit: bigint;
  readonly task: bigint;
}

const TWO_64 = 1n << 64n;

/** A number as the call gets it: unsigned, 64 bits. */
export function resolveNum(num: Num, facts: Facts, fileSize: U64 = 0): U64 {
  if (typeof num === 'number' && num >= 0) return num * facts.page;
  const [base, pages, bytes = 0] = typeof num === 'number' ? (['0', num] as const) : num;
  const value = baseOf(base, facts, fileSize) + BigInt(pages) * BigInt(facts.page) + BigInt(bytes);
  const unsigned = ((value % TWO_64) + TWO_64) % TWO_64;
  return unsigned <= BigInt(Number.MAX_SAFE_INTEGER) ? Number(unsigned) : unsigned;
}

function baseOf(base: Base | '0', facts: Facts, fileSize: U64): bigint {
  switch (base) {
    case 'limit':
    case 'task':
      return facts[base];
    case 'slot':
      return BigInt(facts.page) << 31n;
    case 'file':
      return BigInt(fileSize);
    case '0':
      return 0n;
    default:
      return 1n << BigInt(base.slice(2));
  }
}

/** A program as a TypeScript literal, to be pasted into counterexamples.ts. */
export function literal(program: Program): string {
  return `[\n${program.map((step) => `  ${inline(step)},`).join('\n')}\n]`;
}

function inline(value: unknown): string {
  if (Array.isArray(value)) return `[${value.map(inline).join(', ')}]`;
  if (typeof value === 'string') return `'${value}'`;
  if (typeof value !== 'object' || value === null) return String(value);
  const fields = Object.entries(value).filter(([, field]) => field !== undefined);
  return `{ ${fields.map(([name, field]) => `${name}: ${inline(field)}`).join(', ')} }`;
}
