import { setImmediate, setTimeout } from 'node:timers/promises';
import { types } from 'node:util';
import { KvmError, systemError } from './errors.ts';
import { formatRange, hex, list } from './format.ts';
import { type GuestMemfd, PUNCH_HOLE } from './guest_memfd.ts';
import type { GuestRange, Visibility } from './guest_range.ts';
import type { Holds } from './holds.ts';
import type { HostMemory } from './host_memory.ts';
import type { Kernel, MemoryAttributes2Args, MemoryAttributesArgs, Result } from './kernel/kernel.ts';
import type { ConversionNotice, MemoryUser } from './memory_user.ts';
import type { Memslot } from './memslot.ts';
import { fileInPlace } from './private_pages.ts';
import type { RangeMap } from './ranges.ts';
import { ERRNO, KVM_MEMORY_ATTRIBUTE_PRIVATE, MADV_DONTNEED, MiB } from './uapi.ts';
import { SET_MEMORY_ATTRIBUTES2_PRESERVE } from './uapi_proposed.ts';
import { abortSignal, integer, oneOf, options, rangeError, typeError } from './validate.ts';
import type { Vm } from './vm.ts';

export interface ConvertOptions {
  /**
   * What the converted pages hold: 'unspecified' (default), 'zero', or 'preserve', which needs one memory for both sides
   * (memslots on a guest_memfd created with `mmap`).
   */
  readonly content?: 'unspecified' | 'zero' | 'preserve';
  /**
   * Of convert(): how many times more to try while somebody holds memory (`EAGAIN`), after 10 ms, then twice as long each time, at most a second.
   * It keeps its place before conversions of the same memory. 0 unless given.
   */
  readonly retries?: number;
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
  /** Bytes given back to the host by discarding the other side: resident before, gone after. What the host may not count (no cachestat(2)) is left out. */
  readonly freedBytes: number;
  /** Where there is any: what the kernel would not give back, so that its bytes are held twice. */
  readonly undiscarded?: readonly GuestRange[];
  /** Who saw to the content that was asked for. */
  readonly contentBy: 'kernel' | 'copied' | 'none';
  /** How: with the VM's attribute over two memories, in place on the file, or not at all where nothing can be private. */
  readonly conversion: 'attributes' | 'in-place' | 'none';
  /** Where there is any: what memory users threw when they were told. */
  readonly complaints?: readonly { readonly user: string; readonly error: unknown }[];
}

/** What a conversion needs of its VM. */
export interface ConversionOwner {
  readonly vm: Vm;
  readonly kernel: Kernel;
  assertOpen(): void;
  detachViews(address: number, size: number): void;
  setAttributes(args: MemoryAttributesArgs): Result;
  setAttributesAsync(args: MemoryAttributesArgs): Promise<Result>;
  /** A range has changed sides in place. */
  converted(range: GuestRange, to: Visibility): void;
  /** Slots of address space 0 by guest physical address. */
  readonly byAddress: RangeMap<Memslot>;
  readonly users: ReadonlySet<MemoryUser>;
  /** By guest physical address. */
  readonly holds: Holds<string>;
}

/** Milliseconds that an asynchronous conversion may keep the event loop. */
const MAX_HOLD = 5;
const DEFAULT_CHUNK = 64 * MiB;
/** Milliseconds between tries. */
const FIRST_PAUSE = 10;
const LONGEST_PAUSE = 1000;
const contents = ['unspecified', 'zero', 'preserve'] as const;

/** One side's memory behind a part of a slot. */
interface Backing {
  readonly range: GuestRange;
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

/** Part of a chunk whose state one call sets. */
interface Part extends GuestRange {
  /** Which has the state; null where the VM has it. */
  readonly file: GuestMemfd | null;
  /** Of the file. */
  readonly offset: number;
}

/** What comes out of a step when the driver has made the call. */
type Steps<T> = Generator<Step, T, Answer>;

/** Bytes, or null where nobody may count them: a sandbox without cachestat(2) does not keep memory from being given back. */
function measured(backing: Backing): number | null {
  try {
    return backing.residentBytes();
  } catch (error) {
    if (error instanceof KvmError && error.code !== 'ERR_CLOSED') return null;
    throw error;
  }
}

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
  readonly #retries: number;
  /** Users that were asked, and have not heard how it ended. */
  readonly #asked: MemoryUser[] = [];
  #phase: 'waiting' | 'working' | 'settled' = 'waiting';

  constructor(owner: ConversionOwner, range: GuestRange, to: Visibility, given: ConvertOptions = {}) {
    const {
      content = 'unspecified',
      chunkSize = DEFAULT_CHUNK,
      signal,
      onProgress,
      retries = 0,
    } = options('options', given);
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
    this.#retries = integer('retries', retries);
  }

  /** Nothing is going to change any more, so others may work on the range. */
  get settled(): boolean {
    return this.#phase === 'settled';
  }

  /** Users are being asked, or it is being carried out: too late to hold any of it. Before, a hold is one more to be asked for. */
  get working(): boolean {
    return this.#phase === 'working';
  }

  runSync(): ConversionReport {
    const steps = this.#steps();
    let next = steps.next();
    while (!next.done) {
      let answer: Answer;
      try {
        answer = this.#answer(next.value.sync());
      } catch (error) {
        next = steps.throw(error);
        continue;
      }
      next = steps.next(answer);
    }
    return next.value;
  }

  /** Runs when those before it have ended; an abort does not wait for them. */
  async runAfter(others: Promise<unknown>): Promise<ConversionReport> {
    await this.#unlessAborted(others);
    for (let pause = FIRST_PAUSE, left = this.#retries; ; pause = Math.min(LONGEST_PAUSE, 2 * pause), left--) {
      try {
        return await this.#run();
      } catch (error) {
        if (left === 0 || !(error instanceof KvmError) || error.code !== 'EAGAIN') throw error;
        await this.#unlessAborted(setTimeout(pause));
      }
    }
  }

  async #unlessAborted(others: Promise<unknown>): Promise<void> {
    const signal = this.#signal;
    signal?.throwIfAborted();
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
  }

  async #run(): Promise<ConversionReport> {
    const steps = this.#steps();
    let rested = performance.now();
    let next = steps.next();
    while (!next.done) {
      let answer: Answer;
      try {
        answer = this.#answer(await next.value.async());
      } catch (error) {
        next = steps.throw(error);
        continue;
      }
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
    const { attributes } = this.#owner.vm;
    const changed = attributes.rangesOf(this.#to === 'private' ? 'shared' : 'private', this.range);
    const unchanged = attributes.rangesOf(this.#to, this.range);
    const report = { to: this.#to, changed, unchanged, freedBytes: 0 };
    const { conversion } = this.#owner.vm.capabilities;
    if (changed.length === 0) return { ...report, contentBy: 'none', conversion };
    this.#assertPossible();
    this.#assertBacked(changed);
    const notice: ConversionNotice = { ranges: changed, to: this.#to };
    this.#phase = 'working';
    let done: Pick<ConversionReport, 'freedBytes' | 'undiscarded'>;
    try {
      yield* this.#ask(notice);
      this.#assertFree(changed);
      done = yield* this.#apply(changed, unchanged);
    } catch (error) {
      this.#phase = 'settled';
      this.#tell((user) => user.listener.kept?.(notice));
      this.#phase = 'waiting';
      throw error;
    }
    this.#phase = 'settled';
    this.#asked.reverse();
    const complaints = this.#tell((user) => user.listener.converted?.(notice));
    return {
      ...report,
      ...done,
      ...(complaints.length > 0 && { complaints }),
      contentBy: this.#content === 'unspecified' ? 'none' : 'kernel',
      conversion,
    };
  }

  /** Every user may take back what it has, or veto. */
  *#ask(notice: ConversionNotice): Steps<void> {
    const { users } = this.#owner;
    for (const user of [...users]) {
      const { converting } = user.listener;
      if (!users.has(user)) continue;
      this.#asked.push(user);
      if (!converting) continue;
      let veto: unknown;
      yield {
        ...PAUSE,
        sync: () => {
          veto = converting(notice);
          if (!types.isPromise(veto)) return 0;
          veto.catch(() => {});
          veto = 'it answers later, which only convert() waits for';
          return 0;
        },
        async: async () => {
          veto = await converting(notice);
          return 0;
        },
      };
      this.#owner.assertOpen();
      this.#signal?.throwIfAborted();
      if (veto === undefined) continue;
      const message = `'${user.name}' does not let ${formatRange(this.range.address, this.range.size)} become ${this.#to}: ${veto} (EAGAIN)`;
      throw new KvmError({ code: 'EAGAIN', errno: -ERRNO.EAGAIN, message, args: { holders: [user.name] } });
    }
  }

  /** In reverse, and everybody, whoever throws. */
  #tell(tell: (user: MemoryUser) => void): { user: string; error: unknown }[] {
    const complaints: { user: string; error: unknown }[] = [];
    for (let user = this.#asked.pop(); user; user = this.#asked.pop()) {
      try {
        tell(user);
      } catch (error) {
        complaints.push({ user: user.name, error });
      }
    }
    return complaints;
  }

  *#apply(
    changed: readonly GuestRange[],
    unchanged: readonly GuestRange[],
  ): Steps<Pick<ConversionReport, 'freedBytes' | 'undiscarded'>> {
    // The side that appears must not show what it held in an earlier life.
    if (this.#content === 'zero')
      for (const backing of this.#backings(changed, this.#to)) yield* this.#call(backing.discard);
    if (this.#to === 'private') for (const { address, size } of changed) this.#owner.detachViews(address, size);
    yield* this.#setAll(changed, unchanged);
    return yield* this.#discardRest(changed);
  }

  /**
   * Empties memory that is both sides at once where that was asked for, and gives back the side that nobody sees any more. While nothing is lost
   * yet, a failure undoes the conversion; afterwards it is too late for that, and the conversion has taken place. Memory that was to be emptied
   * and is not undoes it in any case: somebody would see what was promised to be gone.
   */
  *#discardRest(changed: readonly GuestRange[]): Steps<Pick<ConversionReport, 'freedBytes' | 'undiscarded'>> {
    let freedBytes = 0;
    let lost = false;
    const undiscarded: GuestRange[] = [];
    const undo = (cause: unknown): Steps<void> =>
      this.#undo(
        [...this.#chunks(changed)].flatMap((chunk) => this.#parts(chunk)),
        cause,
      );
    try {
      if (this.#content === 'zero')
        for (const { discard } of this.#backings(changed, 'both')) {
          yield* this.#call(discard);
          lost = true;
        }
    } catch (error) {
      yield* undo(error);
      throw error;
    }
    for (const backing of this.#backings(changed, this.#to === 'private' ? 'shared' : 'private')) {
      try {
        yield* this.#call(PAUSE);
        const before = measured(backing);
        if (before === 0) continue;
        yield* this.#call(backing.discard);
        lost = true;
        freedBytes += (before ?? 0) - (measured(backing) ?? 0);
      } catch (error) {
        if (!lost || this.#owner.vm.closed) {
          yield* undo(error);
          throw error;
        }
        undiscarded.push(backing.range);
      }
    }
    return { freedBytes, ...(undiscarded.length > 0 && { undiscarded }) };
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
    const preserves = (vm.capabilities.conversionContent & BigInt(SET_MEMORY_ATTRIBUTES2_PRESERVE)) !== 0n;
    if (this.#content === 'preserve' && vm.capabilities.conversion === 'in-place' && !preserves)
      throw KvmError.unsupported('this kernel converts in place, and does not offer to preserve the content');
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
    const shown = hostMemory?.backing.shown.holders(start, start + size) ?? [];
    return [...shown].some((other) => other.slot !== number);
  }

  /** Nobody holds any of it; pins are for shared memory. */
  #assertFree(changed: readonly GuestRange[]): void {
    const { holds } = this.#owner;
    for (const { address, size } of changed) {
      const errorOffset = holds.first(address, address + size);
      if (errorOffset === undefined) continue;
      const holders = [...holds.holders(address, address + size)];
      const message = `guest memory ${formatRange(address, size)} is held from ${hex(errorOffset)} on by ${list(holders)}: release it and try again (EAGAIN)`;
      throw new KvmError({ code: 'EAGAIN', errno: -ERRNO.EAGAIN, message, errorOffset, args: { holders } });
    }
    if (this.#to === 'private') this.#assertNotPinned(changed);
  }

  #assertNotPinned(changed: readonly GuestRange[]): void {
    for (const { slot, offset, size } of this.#pieces(changed)) {
      const start = slot.guestMemfdOffset + offset;
      const pins = slot.guestMemfd?.backing.pins;
      const errorOffset = pins?.first(start, start + size);
      if (!pins || errorOffset === undefined) continue;
      const holders = [...pins.holders(start, start + size)];
      const message = `guest memory ${formatRange(slot.address + offset, size)} is pinned at offset ${errorOffset} of guest_memfd fd ${slot.guestMemfd?.fd} by ${list(holders)}: dispose of the pin and try again (EAGAIN)`;
      throw new KvmError({ code: 'EAGAIN', errno: -ERRNO.EAGAIN, message, errorOffset, args: { holders } });
    }
  }

  *#setAll(changed: readonly GuestRange[], unchanged: readonly GuestRange[]): Steps<void> {
    const done: Part[] = [];
    let bytes = unchanged.reduce((sum, { size }) => sum + size, 0);
    try {
      for (const chunk of this.#chunks(changed)) {
        this.#signal?.throwIfAborted();
        this.#assertFree([chunk]);
        for (const part of this.#parts(chunk)) {
          if (this.#to === 'private' && part.file) yield* this.#call(this.#letGo(part.file, part.offset, part.size));
          yield* this.#call(this.#set(part, this.#to));
          done.push(part);
        }
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
  *#undo(parts: Part[], cause: unknown): Steps<void> {
    const left: string[] = [];
    for (const part of parts.reverse()) {
      if (this.#owner.vm.closed) return;
      const { result } = yield this.#set(part, this.#to === 'private' ? 'shared' : 'private');
      if (result < 0) left.push(formatRange(part.address, part.size));
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

  /** A chunk by where its state is kept: files that are converted in place, and the VM for what lies between them. */
  #parts({ address, size }: GuestRange): Part[] {
    const parts: Part[] = [];
    let at = address;
    for (const { slot, offset, size: length } of this.#pieces([{ address, size }])) {
      const file = fileInPlace(slot);
      if (!file) continue;
      const start = slot.address + offset;
      if (start > at) parts.push({ address: at, size: start - at, file: null, offset: 0 });
      parts.push({ address: start, size: length, file, offset: slot.guestMemfdOffset + offset });
      at = start + length;
    }
    if (at < address + size) parts.push({ address: at, size: address + size - at, file: null, offset: 0 });
    return parts;
  }

  /** Our own page tables would be in the way of a page that is to become private in place. */
  #letGo(file: GuestMemfd, offset: number, length: number): Step {
    const { kernel } = this.#owner;
    const advise = (): Result => kernel.madvise(file.backing.map(), offset, length, MADV_DONTNEED);
    return { syscall: 'madvise', args: { offset, length }, sync: advise, async: async () => advise() };
  }

  #setInPlace({ address, size, file, offset }: Part & { readonly file: GuestMemfd }, to: Visibility): Step {
    const { kernel, converted } = this.#owner;
    const attributes = to === 'private' ? KVM_MEMORY_ATTRIBUTE_PRIVATE : 0;
    const flags = this.#content === 'preserve' ? SET_MEMORY_ATTRIBUTES2_PRESERVE : 0;
    const args: MemoryAttributes2Args = { offset, size, attributes, flags };
    const convert = (): Result => {
      const result = kernel.setMemoryAttributes2(file.fd, args);
      if (result >= 0) converted({ address, size }, to);
      return result;
    };
    return {
      syscall: 'ioctl',
      request: 'KVM_SET_MEMORY_ATTRIBUTES2',
      args: args as unknown as Record<string, unknown>,
      sync: convert,
      async: async () => convert(),
    };
  }

  #set(part: Part, to: Visibility): Step {
    const { address, size, file } = part;
    if (file) return this.#setInPlace({ ...part, file }, to);
    const owner = this.#owner;
    const args = { address, size, attributes: to === 'private' ? KVM_MEMORY_ATTRIBUTE_PRIVATE : 0, flags: 0 };
    return {
      syscall: 'ioctl',
      request: 'KVM_SET_MEMORY_ATTRIBUTES',
      args,
      sync: () => owner.setAttributes(args),
      async: () => owner.setAttributesAsync(args),
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
        yield* this.#spans(start, start + size, 1, (at, length) =>
          this.#fileBacking(guestMemfd, at, length, slot.address - slot.guestMemfdOffset),
        );
      }
      if (hostMemory && side === 'shared' && !gmemOnly && !this.#isShownElsewhere(slot, offset, size)) {
        const start = slot.hostOffset + offset;
        const { alignment } = hostMemory.backing;
        yield* this.#spans(start, start + size, alignment, (at, length) =>
          this.#hostBacking(hostMemory, at, length, slot.address - slot.hostOffset),
        );
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

  /** @param base The guest address of the file's first byte. */
  #fileBacking(file: GuestMemfd, offset: number, length: number, base: number): Backing {
    const { kernel } = this.#owner;
    const { fd } = file;
    return {
      range: { address: base + offset, size: length },
      residentBytes: () => file.residentBytes({ offset, size: length }),
      discard: {
        syscall: 'fallocate',
        args: { fd, mode: PUNCH_HOLE, offset, length },
        sync: () => kernel.fallocate(fd, PUNCH_HOLE, offset, length),
        async: () => kernel.fallocateAsync(fd, PUNCH_HOLE, offset, length),
      },
    };
  }

  #hostBacking(memory: HostMemory, offset: number, length: number, base: number): Backing {
    const { kernel } = this.#owner;
    const { mapping, advice } = memory.backing;
    return {
      range: { address: base + offset, size: length },
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
    if (result >= 0) return;
    const { errorOffset } = step.args as { errorOffset?: bigint };
    throw systemError(result, step, reason, errorOffset === undefined ? undefined : Number(errorOffset));
  }
}
