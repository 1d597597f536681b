import type { Kernel, MemoryAttributes2Args } from '../lib/kernel/kernel.ts';
import { FALLOC_FL_PUNCH_HOLE, KVM_MEMORY_ATTRIBUTE_PRIVATE } from '../lib/uapi.ts';

/** What one request took. */
export interface Cost {
  /** The guest stopped and the host ran. */
  readonly exits: number;
  /** Exits that asked for a conversion. */
  readonly hypercalls: number;
  readonly systemCalls: number;
  readonly flushes: number;
  readonly copiedBytes: number;
  /** The system calls by name. */
  readonly calls: Readonly<Record<string, number>>;
}

type Call = (...args: unknown[]) => unknown;
type Args<Name extends 'fallocate' | 'madvise' | 'mmap' | 'munmap' | 'setMemoryAttributes2' | 'window'> = Parameters<
  Kernel[Name]
>;

/** Methods of the boundary that stand for no system call of a VMM: reads and writes of memory it has mapped, and questions to the library. */
const NO_CALLS: ReadonlySet<string> = new Set([
  'addressOf',
  'deadlinePassed',
  'explain',
  'grantCounts',
  'isShared',
  'peek',
  'poke',
  'privateGfns',
  'privatePages',
  'releaseWindow',
  'runPage',
  'window',
]);

const NAMES: Readonly<Record<string, string>> = {
  run: 'KVM_RUN',
  setMemoryAttributes: 'KVM_SET_MEMORY_ATTRIBUTES',
  setMemoryAttributes2: 'KVM_SET_MEMORY_ATTRIBUTES2',
};

/** Counts what goes through the boundary of a kernel while a request is carried out. */
export class Meter {
  readonly #calls = new Map<string, number>();
  /** Mappings the host has touched since it made them, or since they were flushed; and files that are mapped. */
  readonly #touched = new Set<number>();
  readonly #files = new Map<number, number>();
  #counting = false;
  #hypercalls = 0;
  #scripted = 0;
  #flushes = 0;
  #copied = 0;

  /** The same kernel, watched. */
  watch<K extends Kernel>(kernel: K): K {
    return new Proxy(kernel, {
      get: (target, name) => {
        const value = Reflect.get(target, name);
        if (typeof value !== 'function' || typeof name !== 'string') return value;
        return (...args: unknown[]) => this.#call(target, name, value as Call, args);
      },
    });
  }

  measure(request: () => void): Cost {
    this.#calls.clear();
    this.#hypercalls = this.#scripted = this.#flushes = this.#copied = 0;
    this.#counting = true;
    try {
      request();
    } finally {
      this.#counting = false;
    }
    const runs = (this.#calls.get('KVM_RUN') ?? 0) - this.#scripted;
    this.#calls.set('KVM_RUN', runs);
    const calls = Object.fromEntries([...this.#calls].sort());
    return {
      exits: runs,
      hypercalls: this.#hypercalls,
      systemCalls: Object.values(calls).reduce((sum, count) => sum + count, 0),
      flushes: this.#flushes,
      copiedBytes: this.#copied,
      calls,
    };
  }

  hypercall(): void {
    this.#hypercalls++;
  }

  copied(bytes: number): void {
    this.#copied += bytes;
  }

  flushed(times: number): void {
    this.#flushes += times;
  }

  /** A run of the scripted guest that ended only to fetch its next command: a guest with a program of its own would have gone on. */
  scripted(): void {
    this.#scripted++;
  }

  #call(kernel: Kernel, name: string, call: Call, args: unknown[]): unknown {
    const flushes = this.#counting && this.#takesMapped(kernel, name, args);
    const result = call.apply(kernel, args);
    if (typeof result !== 'number' || result >= 0) this.#note(name, args, Number(result));
    if (!this.#counting || NO_CALLS.has(name)) return result;
    const title = NAMES[name] ?? name;
    this.#calls.set(title, (this.#calls.get(title) ?? 0) + 1);
    if (flushes && result === 0) this.#flushes++;
    return result;
  }

  /** Who has touched what, also between requests. */
  #note(name: string, args: unknown[], result: number): void {
    switch (name) {
      case 'mmap':
        this.#files.set(result, (args as Args<'mmap'>)[0].fd);
        break;
      case 'window':
        this.#touched.add((args as Args<'window'>)[0]);
        break;
      case 'munmap':
        this.#touched.delete((args as Args<'munmap'>)[0]);
        this.#files.delete((args as Args<'munmap'>)[0]);
        break;
      case 'setMemoryAttributes2': {
        const [fd, request] = args as Args<'setMemoryAttributes2'>;
        if (isToPrivate(request)) for (const mapping of this.#touchedOf(fd)) this.#touched.delete(mapping);
      }
    }
  }

  /** Whether a call, if it succeeds, takes pages away that somebody's page tables have. */
  #takesMapped(kernel: Kernel, name: string, args: unknown[]): boolean {
    switch (name) {
      case 'munmap':
        return this.#touched.has((args as Args<'munmap'>)[0]);
      case 'setMemoryAttributes2': {
        const [fd, request] = args as Args<'setMemoryAttributes2'>;
        return isToPrivate(request) && this.#touchedOf(fd).length > 0;
      }
      case 'fallocate': {
        const [fd, mode, offset, length] = args as Args<'fallocate'>;
        const status: { cache?: number } = {};
        if (!(mode & FALLOC_FL_PUNCH_HOLE)) return false;
        return kernel.cachestat(fd, offset, length, status) === 0 && (status.cache ?? 0) > 0;
      }
      case 'madvise': {
        const [mapping, offset, length] = args as Args<'madvise'>;
        const residency = new Uint8Array(Number(length) / kernel.pageSize);
        return kernel.mincore(mapping, offset, length, residency) === 0 && residency.some((page) => page & 1);
      }
      default:
        return false;
    }
  }

  #touchedOf(fd: number): number[] {
    return [...this.#touched].filter((mapping) => this.#files.get(mapping) === fd);
  }
}

function isToPrivate({ attributes }: MemoryAttributes2Args): boolean {
  return BigInt(attributes) === BigInt(KVM_MEMORY_ATTRIBUTE_PRIVATE);
}
