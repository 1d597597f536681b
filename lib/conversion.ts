import { setImmediate } from 'node:timers/promises';
import { KvmError, systemError } from './errors.ts';
import { formatRange } from './format.ts';
import type { GuestRange, Visibility } from './guest_range.ts';
import type { Kernel, Result } from './kernel/kernel.ts';
import type { Memslot } from './memslot.ts';
import { ERRNO, FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, KVM_MEMORY_ATTRIBUTE_PRIVATE, MiB } from './uapi.ts';
import { integer, oneOf, options, rangeError, typeError } from './validate.ts';
import type { Vm } from './vm.ts';

export interface ConvertOptions {
  /**
   * What the converted pages hold: 'unspecified' (default), 'zero', or 'preserve', which needs one memory for both sides
   * (memslots on a guest_memfd created with `mmap`).
   */
  readonly content?: 'unspecified' | 'zero' | 'preserve';
  /** Bytes the kernel is given at a time, page-aligned; 64 MiB by default. The kernel cannot be interrupted within a chunk. */
  readonly chunkSize?: number;
  /** Of convert(): checked before each chunk; what was done is undone. */
  readonly signal?: AbortSignal;
  /** Bytes of the range whose attribute is as wanted, and all of them. */
  readonly onProgress?: (done: number, total: number) => void;
}

export interface ConversionReport {
  readonly to: Visibility;
  /** What had the other visibility before. */
  readonly changed: readonly GuestRange[];
  /** What was as wanted already, and was left alone. */
  readonly unchanged: readonly GuestRange[];
  /** Bytes given back to the host by discarding the other side: resident before, gone after. */
  readonly freedBytes: number;
  /** Who saw to the content that was asked for. */
  readonly contentBy: 'kernel' | 'copied' | 'none';
}

/** What a conversion needs of its VM. */
export interface ConversionOwner {
  readonly vm: Vm;
  readonly kernel: Kernel;
  readonly fd: number;
  assertOpen(): void;
  detachViews(address: number, size: number): void;
}

/** Milliseconds that an asynchronous conversion may keep the event loop. */
const MAX_HOLD = 5;
const DEFAULT_CHUNK = 64 * MiB;
const PUNCH = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE;
const contents = ['unspecified', 'zero', 'preserve'] as const;

/** One side's memory behind a part of a slot. */
interface Backing {
  residentBytes(): number;
  /** A step that gives the memory back. */
  readonly discard: Step;
}

/** A call to a kernel that can be made here or on another thread. */
interface Step {
  readonly syscall: string;
  readonly request?: string;
  readonly args: Readonly<Record<string, unknown>>;
  sync(): Result;
  async(): Promise<Result>;
}

/** What comes out of a step when the driver has made the call. */
type Steps<T> = Generator<Step, T, Result>;

/**
 * A conversion with the VM-level attribute over two memories: set the attribute chunk by chunk, then discard the other side. Until
 * the last chunk is set nothing is lost, so everything before can be undone.
 */
export class Conversion {
  readonly range: GuestRange;
  readonly #owner: ConversionOwner;
  readonly #to: Visibility;
  readonly #content: (typeof contents)[number];
  readonly #chunkSize: number;
  readonly #signal: AbortSignal | undefined;
  readonly #onProgress: ((done: number, total: number) => void) | undefined;

  constructor(owner: ConversionOwner, range: GuestRange, to: Visibility, given: ConvertOptions = {}) {
    const { content = 'unspecified', chunkSize = DEFAULT_CHUNK, signal, onProgress } = options('options', given);
    const { pageSize } = owner.kernel;
    this.#owner = owner;
    this.range = range;
    this.#to = oneOf('to', to, ['private', 'shared'] as const);
    this.#content = oneOf('content', content, contents);
    this.#chunkSize = integer('chunkSize', chunkSize, pageSize);
    if (chunkSize % pageSize !== 0) throw rangeError(`chunkSize must be a multiple of ${pageSize}`);
    if (range.address % pageSize !== 0 || range.size % pageSize !== 0) {
      throw rangeError(
        `range must be made of whole pages of ${pageSize} bytes, got ${formatRange(range.address, range.size)}`,
      );
    }
    if (signal !== undefined && !(signal instanceof AbortSignal)) throw typeError('signal must be an AbortSignal');
    if (onProgress !== undefined && typeof onProgress !== 'function') throw typeError('onProgress must be a function');
    this.#signal = signal;
    this.#onProgress = onProgress;
  }

  runSync(): ConversionReport {
    const steps = this.#steps();
    let next = steps.next();
    while (!next.done) next = steps.next(next.value.sync());
    return next.value;
  }

  async run(): Promise<ConversionReport> {
    const steps = this.#steps();
    let rested = performance.now();
    let next = steps.next();
    while (!next.done) {
      const result = await next.value.async();
      // A kernel that answers at once must not keep timers and sockets waiting.
      if (performance.now() - rested > MAX_HOLD) {
        await setImmediate();
        rested = performance.now();
      }
      next = steps.next(result);
    }
    return next.value;
  }

  *#steps(): Steps<ConversionReport> {
    this.#signal?.throwIfAborted();
    this.#owner.assertOpen();
    const { changed, unchanged } = this.#split();
    const report = (freedBytes: number): ConversionReport => {
      const contentBy = this.#content === 'unspecified' || changed.length === 0 ? 'none' : 'kernel';
      return { to: this.#to, changed, unchanged, freedBytes, contentBy };
    };
    if (changed.length === 0) return report(0);
    this.#assertPossible();
    this.#assertBacked(changed);
    this.#assertNotPinned(changed);
    // The side that appears must not show what it held in an earlier life.
    if (this.#content === 'zero')
      for (const backing of this.#backings(changed, this.#to)) yield* this.#call(backing.discard);
    if (this.#to === 'private') for (const { address, size } of changed) this.#owner.detachViews(address, size);
    yield* this.#setAll(changed, unchanged);
    let freed = 0;
    for (const backing of this.#backings(changed, this.#to === 'private' ? 'shared' : 'private')) {
      const before = backing.residentBytes();
      if (before > 0) yield* this.#call(backing.discard);
      freed += before - (before > 0 ? backing.residentBytes() : 0);
    }
    if (this.#content === 'zero')
      for (const backing of this.#backings(changed, 'both')) yield* this.#call(backing.discard);
    return report(freed);
  }

  #split(): { changed: GuestRange[]; unchanged: GuestRange[] } {
    const { address, size } = this.range;
    const secret = this.#owner.vm.attributes.privateRanges(this.range);
    const open: GuestRange[] = [];
    let at = address;
    for (const range of [...secret, { address: address + size, size: 0 }]) {
      if (range.address > at) open.push({ address: at, size: range.address - at });
      at = range.address + range.size;
    }
    return this.#to === 'private' ? { changed: open, unchanged: secret } : { changed: secret, unchanged: open };
  }

  #assertPossible(): void {
    const { vm } = this.#owner;
    if (vm.capabilities.conversion === 'none') {
      const type = vm.kvm.vmTypes.has('sw-protected')
        ? "create the VM with { type: 'sw-protected' }"
        : 'this kernel has no VM type with private memory';
      throw KvmError.unsupported(
        `VMs of type '${vm.type}' have no private memory (KVM_CAP_MEMORY_ATTRIBUTES is 0): ${type}`,
      );
    }
    const pair = this.#pieces([this.range]).find(({ slot }) => !slot.guestMemfd?.backing.gmemOnly);
    if (this.#content === 'preserve' && pair) {
      throw KvmError.unsupported(
        `the content of slot ${pair.slot.slot} cannot be preserved: its private and its shared side are two memories, and the host cannot reach the private one`,
      );
    }
  }

  #assertBacked(changed: readonly GuestRange[]): void {
    const bare = this.#to === 'private' && this.#pieces(changed).find(({ slot }) => !slot.guestMemfd);
    if (!bare) return;
    throw new KvmError({
      code: 'EINVAL',
      message: `slot ${bare.slot.slot} ${formatRange(bare.slot.address, bare.slot.size)} has no guest_memfd, so nothing could hold its private pages`,
    });
  }

  #assertNotPinned(changed: readonly GuestRange[]): void {
    if (this.#to !== 'private') return;
    for (const { slot, offset, size } of this.#pieces(changed)) {
      const start = slot.guestMemfdOffset + offset;
      const errorOffset = slot.guestMemfd?.backing.firstPin(start, start + size);
      if (errorOffset === undefined) continue;
      const message = `guest memory ${formatRange(slot.address + offset, size)} is pinned at offset ${errorOffset} of guest_memfd fd ${slot.guestMemfd?.fd}: dispose of the pin and try again (EAGAIN)`;
      throw new KvmError({ code: 'EAGAIN', errno: -ERRNO.EAGAIN, message, errorOffset });
    }
  }

  *#setAll(changed: readonly GuestRange[], unchanged: readonly GuestRange[]): Steps<void> {
    const done: GuestRange[] = [];
    let bytes = unchanged.reduce((sum, { size }) => sum + size, 0);
    try {
      for (const chunk of this.#chunks(changed)) {
        this.#signal?.throwIfAborted();
        this.#assertNotPinned([chunk]);
        yield* this.#call(this.#set(chunk, this.#to));
        done.push(chunk);
        bytes += chunk.size;
        this.#onProgress?.(bytes, this.range.size);
        this.#owner.assertOpen();
      }
    } catch (error) {
      if (!this.#owner.vm.closed)
        for (const chunk of done.reverse())
          yield* this.#call(this.#set(chunk, this.#to === 'private' ? 'shared' : 'private'));
      throw error;
    }
  }

  *#chunks(ranges: readonly GuestRange[]): Generator<GuestRange> {
    for (const { address, size } of ranges) {
      for (let at = 0; at < size; at += this.#chunkSize)
        yield { address: address + at, size: Math.min(this.#chunkSize, size - at) };
    }
  }

  #set({ address, size }: GuestRange, to: Visibility): Step {
    const { kernel, fd } = this.#owner;
    const args = { address, size, attributes: to === 'private' ? KVM_MEMORY_ATTRIBUTE_PRIVATE : 0, flags: 0 };
    return {
      syscall: 'ioctl',
      request: 'KVM_SET_MEMORY_ATTRIBUTES',
      args,
      sync: () => kernel.setMemoryAttributes(fd, args),
      async: () => kernel.setMemoryAttributesAsync(fd, args),
    };
  }

  /** The parts of memslots in the ranges, chunk by chunk. */
  #pieces(ranges: readonly GuestRange[]): { slot: Memslot; offset: number; size: number }[] {
    const pieces: { slot: Memslot; offset: number; size: number }[] = [];
    for (const slot of this.#owner.vm.memslots.values()) {
      for (const { address, size } of ranges) {
        const start = Math.max(address, slot.address);
        const end = Math.min(address + size, slot.address + slot.size);
        if (start < end) pieces.push({ slot, offset: start - slot.address, size: end - start });
      }
    }
    return pieces;
  }

  /** The memory behind one side of the ranges; 'both' is memory that is both sides at once. */
  *#backings(ranges: readonly GuestRange[], side: Visibility | 'both'): Generator<Backing> {
    const { kernel } = this.#owner;
    for (const chunk of this.#chunks(ranges)) {
      for (const { slot, offset, size } of this.#pieces([chunk])) {
        const { guestMemfd, hostMemory } = slot;
        const gmemOnly = guestMemfd?.backing.gmemOnly ?? false;
        if (guestMemfd && gmemOnly === (side === 'both') && side !== 'shared') {
          const args = { fd: guestMemfd.fd, mode: PUNCH, offset: slot.guestMemfdOffset + offset, length: size };
          yield {
            residentBytes: () => guestMemfd.residentBytes({ offset: args.offset, size }),
            discard: {
              syscall: 'fallocate',
              args,
              sync: () => kernel.fallocate(args.fd, PUNCH, args.offset, size),
              async: () => kernel.fallocateAsync(args.fd, PUNCH, args.offset, size),
            },
          };
        }
        if (hostMemory && side === 'shared' && !gmemOnly) {
          const { mapping, advice, alignment } = hostMemory.backing;
          // Of huge pages only those that lie in the range altogether can go.
          const first = Math.ceil((slot.hostOffset + offset) / alignment) * alignment;
          const length = Math.floor((slot.hostOffset + offset + size) / alignment) * alignment - first;
          if (length <= 0) continue;
          yield {
            residentBytes: () => hostMemory.residentBytes({ offset: first, size: length }),
            discard: {
              syscall: 'madvise',
              args: { offset: first, length, advice },
              sync: () => kernel.madvise(mapping, first, length, advice),
              async: () => kernel.madviseAsync(mapping, first, length, advice),
            },
          };
        }
      }
    }
  }

  *#call(step: Step): Steps<void> {
    const result = yield step;
    // Meanwhile the VM may have been closed, and its fd may be another's.
    this.#owner.assertOpen();
    if (result < 0) throw systemError(result, step, this.#owner.kernel.explain());
  }
}
