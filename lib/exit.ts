import type { KvmError } from './errors.ts';
import type { GuestRange, Visibility } from './guest_range.ts';
import { KVM_EXIT } from './uapi.ts';

const KVM_HC_MAP_GPA_RANGE = 12n;
const MEMORY_FAULT_PRIVATE = 8n;
const ENCRYPTED = 0x10n;

/** Port I/O (x86). `data` is live: for 'in', write the answer into it before the next run. */
export interface IoExit {
  readonly reason: 'io';
  readonly direction: 'in' | 'out';
  readonly port: number;
  readonly size: 1 | 2 | 4;
  readonly count: number;
  readonly data: Uint8Array;
}

/** An access where no memslot is, or a write to a read-only one. `data` is live: for a read, write the answer into it before the next run. */
export interface MmioExit {
  readonly reason: 'mmio';
  readonly address: number;
  readonly isWrite: boolean;
  readonly data: Uint8Array;
}

/** An access whose page is not there. Repair the cause and run again: the same instruction is retried. */
export interface MemoryFaultExit {
  readonly reason: 'memory-fault';
  /** Start of the page, in bytes. */
  readonly address: number;
  readonly size: number;
  /** The side the guest wanted. */
  readonly visibility: Visibility;
  /** In words: no memslot, a slot without guest_memfd, a closed file, a poisoned page, no memory. */
  readonly cause: string;
  /** 'EFAULT', 'EHWPOISON', 'ENOMEM'. */
  readonly code: string;
  /** How often in a row this very fault came, with nothing changed in between: 1 the first time. */
  readonly repeats: number;
}

/** The guest asks for a conversion (x86). Answer before the next run: 0n, or a negative errno the guest expects. */
export interface MapGpaRangeExit {
  readonly reason: 'map-gpa-range';
  readonly address: number;
  readonly size: number;
  readonly to: Visibility;
  reply(value: bigint): void;
}

export interface HypercallExit {
  readonly reason: 'hypercall';
  readonly number: bigint;
  readonly args: readonly bigint[];
  reply(value: bigint): void;
}

/** The guest touched a page whose source has failed: it will never come. See Pager. */
export interface PageSourceFailedExit {
  readonly reason: 'page-source-failed';
  /** Guest physical address where the source failed, in bytes; what has not come is gone from there and everywhere. */
  readonly address: number;
  readonly size: number;
  /** `EIO`, with what the source threw as its cause; `ERR_CLOSED` when the pager was closed. */
  readonly error: KvmError;
}

export type Exit =
  | PageSourceFailedExit
  | IoExit
  | MmioExit
  | MemoryFaultExit
  | MapGpaRangeExit
  | HypercallExit
  | { readonly reason: 'hlt' | 'shutdown' | 'interrupted' | 'timeout' | 'dirty-ring-full' }
  | { readonly reason: 'system-event'; readonly type: number; readonly data: readonly bigint[] }
  | { readonly reason: 'internal-error'; readonly suberror: number; readonly data: readonly bigint[] }
  | { readonly reason: 'unknown'; readonly number: number };

type Mutable<T> = { -readonly [K in keyof T]: T[K] };

/**
 * Reads exits out of a kvm_run page. The objects for port I/O and MMIO are used again, so that a device loop allocates nothing: an exit is
 * good until the next run.
 */
export class ExitDecoder {
  readonly #page: Uint8Array;
  readonly #view: DataView;
  readonly #io: Mutable<IoExit>;
  readonly #mmio: Mutable<MmioExit>;
  readonly #mmioData: readonly Uint8Array[];
  /** Where `#io.data` lies. */
  #ioOffset = 0;

  constructor(page: Uint8Array) {
    this.#page = page;
    this.#view = new DataView(page.buffer, page.byteOffset, page.byteLength);
    this.#io = { reason: 'io', direction: 'in', port: 0, size: 1, count: 0, data: page.subarray(0, 0) };
    this.#mmioData = Array.from({ length: 9 }, (_, length) => page.subarray(40, 40 + length));
    this.#mmio = { reason: 'mmio', address: 0, isWrite: false, data: page.subarray(40, 40) };
  }

  get reason(): number {
    return this.#view.getUint32(8, true);
  }

  /** The exit of a run that returned 0. */
  decode(): Exit {
    const view = this.#view;
    switch (this.reason) {
      case KVM_EXIT.IO:
        return this.#decodeIo();
      case KVM_EXIT.MMIO:
        this.#mmio.address = this.#number(32);
        this.#mmio.isWrite = view.getUint8(52) !== 0;
        this.#mmio.data = this.#mmioData[Math.min(8, view.getUint32(48, true))] as Uint8Array;
        return this.#mmio;
      case KVM_EXIT.HYPERCALL:
        return this.#decodeHypercall();
      case KVM_EXIT.HLT:
        return { reason: 'hlt' };
      case KVM_EXIT.SHUTDOWN:
        return { reason: 'shutdown' };
      case KVM_EXIT.DIRTY_RING_FULL:
        return { reason: 'dirty-ring-full' };
      case KVM_EXIT.SYSTEM_EVENT:
        return {
          reason: 'system-event',
          type: view.getUint32(32, true),
          data: this.#words(40, view.getUint32(36, true)),
        };
      case KVM_EXIT.INTERNAL_ERROR:
        return {
          reason: 'internal-error',
          suberror: view.getUint32(32, true),
          data: this.#words(40, view.getUint32(36, true)),
        };
      default:
        return { reason: 'unknown', number: this.reason };
    }
  }

  /** The range and side of a memory fault: to be asked only when KVM_RUN failed and the reason says so. */
  memoryFault(): GuestRange & { readonly visibility: Visibility } {
    const secret = (this.#view.getBigUint64(32, true) & MEMORY_FAULT_PRIVATE) !== 0n;
    return { address: this.#number(40), size: this.#number(48), visibility: secret ? 'private' : 'shared' };
  }

  #decodeIo(): IoExit {
    const view = this.#view;
    const io = this.#io;
    io.direction = view.getUint8(32) ? 'out' : 'in';
    io.size = view.getUint8(33) as 1 | 2 | 4;
    io.port = view.getUint16(34, true);
    io.count = view.getUint32(36, true);
    const offset = this.#number(40);
    const length = io.size * io.count;
    if (offset !== this.#ioOffset || io.data.length !== length) {
      this.#ioOffset = offset;
      io.data = this.#page.subarray(offset, offset + length);
    }
    return io;
  }

  #decodeHypercall(): Exit {
    const view = this.#view;
    const number = view.getBigUint64(32, true);
    const reply = (value: bigint): void => view.setBigInt64(88, BigInt.asIntN(64, value), true);
    // Before about Linux 6.14 it still is what the last one was answered.
    reply(0n);
    const args = this.#words(40, 6);
    if (number !== KVM_HC_MAP_GPA_RANGE) return { reason: 'hypercall', number, args, reply };
    const [gpa = 0n, pages = 0n, attributes = 0n] = args;
    const to = attributes & ENCRYPTED ? 'private' : 'shared';
    return { reason: 'map-gpa-range', address: Number(gpa), size: Number(pages) * 4096, to, reply };
  }

  #number(offset: number): number {
    return this.#view.getUint32(offset, true) + this.#view.getUint32(offset + 4, true) * 0x1_0000_0000;
  }

  #words(offset: number, count: number): bigint[] {
    return Array.from({ length: Math.min(16, count) }, (_, index) => this.#view.getBigUint64(offset + 8 * index, true));
  }
}
