import { setImmediate } from 'node:timers/promises';
import { KvmError, systemError } from './errors.ts';
import { formatRange, list } from './format.ts';
import { type GuestMemfd, PUNCH_HOLE } from './guest_memfd.ts';
import type { GuestRange, Visibility } from './guest_range.ts';
import type { HostMemory } from './host_memory.ts';
import type { Kernel, Result } from './kernel/kernel.ts';
import type { Memslot } from './memslot.ts';
import type { RangeMap } from './ranges.ts';
import { ERRNO, KVM_MEMORY_ATTRIBUTE_PRIVATE, MiB } from './uapi.ts';
import { abortSignal, integer, oneOf, options, rangeError, typeError } from './validate.ts';
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
  /** Slots of address space 0 by guest physical address. */
  readonly byAddress: RangeMap<Memslot>;
}

/** Milliseconds that an asynchronous conversion may keep the event loop. */
const MAX_HOLD = 5;
const DEFAULT_CHUNK = 64 * MiB;
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

/** A call's result, and the broken rule where it was refused: asked at once, because the next call has a reason of its own. */
interface Answer {
  readonly result: Result;
  readonly reason: string | null;
}

/** What comes out of a step when the driver has made the call. */
type Steps<T> = Generator<Step, T, Answer>;

/** Lets the driver rest between pieces that need no call. */
const PAUSE: Step = { syscall: '', args: {}, sync: () => 0, async: async () => 0 };

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
    if (signal !== undefined) abortSignal('signal', signal);
    if (onProgress !== undefined && typeof onProgress !== 'function') throw typeError('onProgress must be a function');
    this.#signal = signal;
    this.#onProgress = onProgress;
  }

  runSync(): ConversionReport {
    const steps = this.#steps();
    let next = steps.next();
    while (!next.done) next = steps.next(this.#answer(next.value.sync()));
    return next.value;
  }

  /** Runs when those before it have ended; an abort does not wait for them. */
  async runAfter(others: Promise<unknown>): Promise<ConversionReport> {
    const signal = this.#signal;
    let abort = (): void => {};
    const aborted = new Promise<never>((_resolve, reject) => {
      abort = () => reject(signal?.reason);
    });
    signal?.addEventListener('abort', abort);
    try {
      await Promise.race([others, aborted]);
    } finally {
      signal?.removeEventListener('abort', abort);
    }
    return this.#run();
  }

  async #run(): Promise<ConversionReport> {
    const steps = this.#steps();
    let rested = performance.now();
    let next = steps.next();
    while (!next.done) {
      const answer = this.#answer(await next.value.async());
      // A kernel that answers at once must not keep timers and sockets waiting.
      if (performance.now() - rested > MAX_HOLD) {
        await setImmediate();
        rested = performance.now();
      }
      next = steps.next(answer);
    }
    return next.value;
  }

  #answer(result: Result): Answer {
    return { result, reason: result < 0 ? this.#owner.kernel.explain() : null };
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
    const freed = yield* this.#discardHidden(changed);
    if (this.#content === 'zero')
      for (const backing of this.#backings(changed, 'both')) yield* this.#call(backing.discard);
    return report(freed);
  }

  /** Gives back the side that nobody sees any more. While nothing is lost yet, a failure undoes the conversion. */
  *#discardHidden(changed: readonly GuestRange[]): Steps<number> {
    let freed = 0;
    for (const backing of this.#backings(changed, this.#to === 'private' ? 'shared' : 'private')) {
      yield* this.#call(PAUSE);
      const before = backing.residentBytes();
      if (before === 0) continue;
      try {
        yield* this.#call(backing.discard);
      } catch (error) {
        if (freed === 0) yield* this.#undo([...this.#chunks(changed)], error);
        throw error;
      }
      freed += before - backing.residentBytes();
    }
    return freed;
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

  /** Each slot must have the memory that is about to appear. */
  #assertBacked(changed: readonly GuestRange[]): void {
    for (const { slot, offset, size } of this.#pieces(changed)) {
      const { guestMemfd, hostMemory } = slot;
      const lacks =
        this.#to === 'private'
          ? !guestMemfd && 'guest_memfd'
          : !guestMemfd?.backing.gmemOnly && !hostMemory && 'host memory';
      const where = `slot ${slot.slot} ${formatRange(slot.address, slot.size)}`;
      if (lacks)
        throw new KvmError({
          code: 'EINVAL',
          message: `${where} has no ${lacks}, so nothing could hold its ${this.#to} pages`,
        });
      if (this.#content === 'zero' && this.#isShownElsewhere(slot, offset, size)) {
        throw new KvmError({
          code: 'EBUSY',
          message: `the host memory of ${where} is shown by another slot too, and cannot be zeroed`,
        });
      }
    }
  }

  /** Whether another slot shows some of the same host memory: it is not ours to give back then. */
  #isShownElsewhere({ hostMemory, hostOffset, slot: number }: Memslot, offset: number, size: number): boolean {
    const start = hostOffset + offset;
    const others = hostMemory ? [...hostMemory.backing.slots] : [];
    return others.some(
      (other) => other.slot !== number && other.hostOffset < start + size && start < other.hostOffset + other.size,
    );
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
        // Whoever looked meanwhile may have made another.
        if (this.#to === 'private') this.#owner.detachViews(chunk.address, chunk.size);
        bytes += chunk.size;
        this.#onProgress?.(bytes, this.range.size);
        this.#owner.assertOpen();
      }
    } catch (error) {
      yield* this.#undo(done, error);
      throw error;
    }
  }

  /** Sets the attribute of chunks back, as many as can be. */
  *#undo(chunks: GuestRange[], cause: unknown): Steps<void> {
    const left: string[] = [];
    for (const chunk of chunks.reverse()) {
      if (this.#owner.vm.closed) return;
      const { result } = yield this.#set(chunk, this.#to === 'private' ? 'shared' : 'private');
      if (result < 0) left.push(formatRange(chunk.address, chunk.size));
    }
    if (left.length === 0) return;
    const message = `a conversion failed (${cause instanceof Error ? cause.message : cause}), and these parts of it could not be undone: ${list(left)}`;
    throw new KvmError({ code: 'EIO', message, cause });
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

  /** The parts of memslots in the ranges. */
  #pieces(ranges: readonly GuestRange[]): { slot: Memslot; offset: number; size: number }[] {
    const { byAddress } = this.#owner;
    return ranges.flatMap(({ address, size }) =>
      Array.from(byAddress.within(address, address + size), ({ start, end, value }) => {
        return { slot: value, offset: start - value.address, size: end - start };
      }),
    );
  }

  /** The memory behind one side of the ranges, chunk by chunk; 'both' is memory that is both sides at once. */
  *#backings(ranges: readonly GuestRange[], side: Visibility | 'both'): Generator<Backing> {
    for (const { slot, offset, size } of this.#pieces(ranges)) {
      const { guestMemfd, hostMemory } = slot;
      const gmemOnly = guestMemfd?.backing.gmemOnly ?? false;
      if (guestMemfd && gmemOnly === (side === 'both') && side !== 'shared') {
        const start = slot.guestMemfdOffset + offset;
        yield* this.#spans(start, start + size, 1, (at, length) => this.#fileBacking(guestMemfd, at, length));
      }
      if (hostMemory && side === 'shared' && !gmemOnly && !this.#isShownElsewhere(slot, offset, size)) {
        const start = slot.hostOffset + offset;
        const { alignment } = hostMemory.backing;
        yield* this.#spans(start, start + size, alignment, (at, length) => this.#hostBacking(hostMemory, at, length));
      }
    }
  }

  /** The whole huge pages of a range, in chunks. */
  *#spans(
    start: number,
    end: number,
    alignment: number,
    make: (at: number, length: number) => Backing,
  ): Generator<Backing> {
    const last = Math.floor(end / alignment) * alignment;
    const step = Math.max(alignment, Math.floor(this.#chunkSize / alignment) * alignment);
    for (let at = Math.ceil(start / alignment) * alignment; at < last; at += step)
      yield make(at, Math.min(step, last - at));
  }

  #fileBacking(file: GuestMemfd, offset: number, length: number): Backing {
    const { kernel } = this.#owner;
    const { fd } = file;
    return {
      residentBytes: () => file.residentBytes({ offset, size: length }),
      discard: {
        syscall: 'fallocate',
        args: { fd, mode: PUNCH_HOLE, offset, length },
        sync: () => kernel.fallocate(fd, PUNCH_HOLE, offset, length),
        async: () => kernel.fallocateAsync(fd, PUNCH_HOLE, offset, length),
      },
    };
  }

  #hostBacking(memory: HostMemory, offset: number, length: number): Backing {
    const { kernel } = this.#owner;
    const { mapping, advice } = memory.backing;
    return {
      residentBytes: () => memory.residentBytes({ offset, size: length }),
      discard: {
        syscall: 'madvise',
        args: { offset, length, advice },
        sync: () => kernel.madvise(mapping, offset, length, advice),
        async: () => kernel.madviseAsync(mapping, offset, length, advice),
      },
    };
  }

  *#call(step: Step): Steps<void> {
    const { result, reason } = yield step;
    // Meanwhile the VM may have been closed, and its fd may be another's.
    this.#owner.assertOpen();
    if (result < 0) throw systemError(result, step, reason);
  }
}
