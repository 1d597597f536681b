import { Duplex } from 'node:stream';
import { KvmError } from '../errors.ts';
import type { FileRange } from '../guest_range.ts';
import { freeze } from '../handover/freeze.ts';
import { describeMemory } from '../handover/memory_image.ts';
import type { HostMemory } from '../host_memory.ts';
import { bytes } from '../kernel/arguments.ts';
import type { Kernel } from '../kernel/kernel.ts';
import type { Memslot } from '../memslot.ts';
import { RangeMap } from '../ranges.ts';
import { MiB } from '../uapi.ts';
import { abortSignal, boolean, integer, options, typeError } from '../validate.ts';
import { Vm } from '../vm.ts';
import { FRAME, frames, next, pagesHead, readPagesHead, send, wrong } from './frames.ts';
import { dataRanges, isZero, readMemory } from './memory_copy.ts';

export interface SendMemoryOptions {
  /**
   * Called when little enough is left: the moment to stop vCPUs. What it returns goes to the other side as `data`: registers, device states, whatever
   * the memory does not hold.
   */
  readonly prepare?: () => undefined | Uint8Array | Promise<undefined | Uint8Array>;
  /** Rounds after the first at the most; 8 unless given. 0 with `postCopy` sends nothing before the guest moves. */
  readonly rounds?: number;
  /** Bytes that may be left for the pause; 1 MiB unless given. */
  readonly enough?: number;
  /** What is left goes when the guest on the other side touches it, by servePages(), instead of in the pause. Default false. */
  readonly postCopy?: boolean;
  readonly onProgress?: (progress: MigrationProgress) => void;
  /** Cancels, and destroys the stream; the VM goes on as it was. */
  readonly signal?: AbortSignal;
}

export interface MigrationProgress {
  /** 0 is the one that sends everything. */
  readonly round: number;
  /** Bytes of guest memory sent so far; zeros are not. */
  readonly sentBytes: number;
  /** Bytes that this round has to send. */
  readonly roundBytes: number;
  /** The guest has stopped, and this is the rest. */
  readonly paused: boolean;
}

export interface MigrationReport {
  /** Bytes of each round, the last one in the pause. */
  readonly rounds: readonly number[];
  readonly sentBytes: number;
  /** Bytes left to post-copy. */
  readonly missingBytes: number;
  /** From when the guest had stopped to the other side's word that it has everything: milliseconds. */
  readonly pausedMilliseconds: number;
}

const PIECE = MiB / 4;
const ENOUGH = MiB;
const ROUNDS = 8;

/** Ranges of memories, by their index in the image. */
type Ranges = readonly RangeMap<true>[];

/**
 * Sends the memory of a running VM over a byte stream: all of it, then again and again what has been written meanwhile, and when that is little enough the
 * rest, in a pause. The dirty log says what the guest wrote, `vm.memory` what the host did; writes through views and by other processes are nobody's to know. When
 * the other side has everything the VM stays frozen, as after handOver(); if anything fails before, it goes on.
 *
 * @throws KvmError `UNSUPPORTED` a memslot that cannot log what is written: one with a guest_memfd · `EPIPE` the other side is lost · `EBUSY` a vCPU runs
 *   although `prepare` is over · `EPERM` the VM is frozen · `ERR_CLOSED` · the signal's reason · what `prepare` threw
 * @see KVM_GET_DIRTY_LOG
 */
export async function sendMemory(vm: Vm, stream: Duplex, given: SendMemoryOptions = {}): Promise<MigrationReport> {
  if (!(vm instanceof Vm)) throw typeError('vm must be a Vm');
  if (!(stream instanceof Duplex)) throw typeError('stream must be a Duplex');
  const { prepare, rounds = ROUNDS, enough = ENOUGH, postCopy = false, onProgress, signal } = options('options', given);
  if (prepare !== undefined && typeof prepare !== 'function') throw typeError('options.prepare must be a function');
  if (onProgress !== undefined && typeof onProgress !== 'function')
    throw typeError('options.onProgress must be a function');
  integer('options.rounds', rounds);
  integer('options.enough', enough);
  boolean('options.postCopy', postCopy);
  if (signal !== undefined) abortSignal('options.signal', signal);
  signal?.throwIfAborted();
  const { assertOpen, assertOwn } = vm.backing;
  assertOpen();
  assertOwn();
  const sender = new Sender(vm, stream, onProgress ?? null, signal);
  const ignore = (): void => {};
  const cancel = (): void => void stream.destroy();
  stream.on('error', ignore);
  signal?.addEventListener('abort', cancel, { once: true });
  let thaw: (() => void) | null = null;
  try {
    await sender.begin();
    if (rounds > 0 || !postCopy) await sender.round(sender.everything());
    let dirty = rounds > 0 || !postCopy ? sender.dirty() : sender.everything();
    for (let count = 1; count < rounds && lengthOf(dirty) > enough; count++) {
      await sender.round(dirty);
      dirty = sender.dirty();
    }
    const data = bytes('what prepare returned', (await prepare?.()) ?? new Uint8Array());
    signal?.throwIfAborted();
    assertOpen();
    const start = performance.now();
    const last = merged(dirty, sender.dirty());
    thaw = freeze(vm, 'the memory of this VM goes to another host: cancel that, or close the VM');
    if (postCopy) await sender.leave(last);
    else await sender.round(last);
    await sender.end(data);
    return {
      rounds: sender.rounds,
      sentBytes: sender.sentBytes,
      missingBytes: postCopy ? lengthOf(last) : 0,
      pausedMilliseconds: performance.now() - start,
    };
  } catch (error) {
    thaw?.();
    throw signal?.aborted ? signal.reason : error;
  } finally {
    sender.stop();
    signal?.removeEventListener('abort', cancel);
    stream.off('error', ignore);
  }
}

/**
 * Answers the pagers of the other side, until it ends the stream: pages of the frozen VM that sendMemory() left there.
 *
 * @throws KvmError `EPIPE` the other side is lost · `EINVAL` it asks for what is no page · `ERR_CLOSED`
 */
export async function servePages(vm: Vm, stream: Duplex): Promise<void> {
  if (!(vm instanceof Vm)) throw typeError('vm must be a Vm');
  if (!(stream instanceof Duplex)) throw typeError('stream must be a Duplex');
  const { kernel, assertOpen } = vm.backing;
  assertOpen();
  const { memories } = describeMemory(vm);
  const ignore = (): void => {};
  stream.on('error', ignore);
  try {
    for await (const { type, payload } of frames(stream)) {
      if (type !== FRAME.ask) throw wrong(`frame ${type} came where a question belongs`);
      const { memory: index, offset, size } = readPagesHead(payload);
      const memory = memories[index];
      if (!memory || size > memory.size || offset > memory.size - size) throw wrong('it asks for what is not there');
      assertOpen();
      memory.backing.assertOpen();
      const content = readMemory(kernel, memory, { offset, size });
      if (isZero(content)) await send(stream, FRAME.zeros);
      else await send(stream, FRAME.pages, pagesHead(index, offset, size), content);
    }
  } finally {
    stream.off('error', ignore);
  }
}

class Sender {
  readonly rounds: number[] = [];
  sentBytes = 0;
  readonly #vm: Vm;
  readonly #kernel: Kernel;
  readonly #stream: Duplex;
  readonly #onProgress: ((progress: MigrationProgress) => void) | null;
  readonly #signal: AbortSignal | undefined;
  readonly #memories: readonly HostMemory[];
  readonly #image: Uint8Array;
  /** Those whose log is on because of us. */
  readonly #logging: Memslot[] = [];
  readonly #written = new RangeMap<true>();
  #logs = false;

  constructor(
    vm: Vm,
    stream: Duplex,
    onProgress: ((progress: MigrationProgress) => void) | null,
    signal: AbortSignal | undefined,
  ) {
    const { image, memories, files } = describeMemory(vm);
    if (files.length > 0)
      throw KvmError.unsupported(
        'a memslot with a guest_memfd cannot log what is written (KVM_MEM_LOG_DIRTY_PAGES), so its memory cannot be sent while the guest runs',
      );
    this.#vm = vm;
    this.#kernel = vm.backing.kernel;
    this.#stream = stream;
    this.#onProgress = onProgress;
    this.#signal = signal;
    this.#memories = memories;
    this.#image = new TextEncoder().encode(JSON.stringify(image));
  }

  async begin(): Promise<void> {
    for (const slot of this.#vm.memslots.values()) {
      if (slot.logDirtyPages || slot.readonly) continue;
      slot.setLogDirtyPages(true);
      this.#logging.push(slot);
    }
    this.#logs = true;
    this.#vm.backing.noteWrites(this.#written);
    this.dirty();
    await send(this.#stream, FRAME.image, this.#image);
  }

  stop(): void {
    this.#vm.backing.noteWrites(null);
    if (this.#vm.closed || this.#vm.frozen) return;
    for (const slot of this.#logging) if (!slot.removed) slot.setLogDirtyPages(false);
  }

  everything(): Ranges {
    const ranges = this.#memories.map(() => new RangeMap<true>());
    for (const slot of this.#vm.memslots.values()) {
      const index = this.#memories.indexOf(slot.hostMemory as HostMemory);
      ranges[index]?.set(slot.hostOffset, slot.hostOffset + slot.size, true);
    }
    return ranges;
  }

  /** What has been written since it was asked last. */
  dirty(): Ranges {
    const ranges = this.#memories.map(() => new RangeMap<true>());
    const { pageSize } = this.#kernel;
    if (!this.#logs) return ranges;
    for (const slot of this.#vm.memslots.values()) {
      const of = ranges[this.#memories.indexOf(slot.hostMemory as HostMemory)] as RangeMap<true>;
      if (slot.logDirtyPages)
        for (const page of slot.dirtyPages())
          of.set(slot.hostOffset + page * pageSize, slot.hostOffset + (page + 1) * pageSize, true);
      for (const { start, end } of this.#written.within(slot.address, slot.address + slot.size)) {
        const first = Math.floor((start - slot.address) / pageSize) * pageSize;
        const last = Math.ceil((end - slot.address) / pageSize) * pageSize;
        of.set(slot.hostOffset + first, slot.hostOffset + Math.min(last, slot.size), true);
      }
    }
    this.#written.clear();
    return ranges;
  }

  async round(ranges: Ranges): Promise<void> {
    const round = this.rounds.length;
    const before = this.sentBytes;
    const roundBytes = lengthOf(ranges);
    for (const [index, memory] of this.#memories.entries()) {
      for (const { start, end } of ranges[index] as RangeMap<true>) {
        // Holes need not be sent the first time, since they are zeros there as well; later they may have been something else.
        const range = { offset: start, size: end - start };
        const parts = round === 0 ? dataRanges(this.#kernel, memory, range) : [range];
        for (const part of parts) await this.#pages(index, memory, part, round, roundBytes);
      }
    }
    this.rounds.push(this.sentBytes - before);
  }

  async leave(ranges: Ranges): Promise<void> {
    const missing = ranges.map((map) => Array.from(map, ({ start, end }) => [start, end - start]));
    await send(this.#stream, FRAME.missing, new TextEncoder().encode(JSON.stringify(missing)));
    this.rounds.push(0);
  }

  async end(data: Uint8Array): Promise<void> {
    await send(this.#stream, FRAME.state, data);
    await next(frames(this.#stream), FRAME.ready);
  }

  async #pages(
    index: number,
    memory: HostMemory,
    { offset, size }: FileRange,
    round: number,
    roundBytes: number,
  ): Promise<void> {
    for (let at = offset; at < offset + size; at += PIECE) {
      const part = { offset: at, size: Math.min(PIECE, offset + size - at) };
      this.#signal?.throwIfAborted();
      memory.backing.assertOpen();
      const content = readMemory(this.#kernel, memory, part);
      if (round === 0 && isZero(content)) continue;
      await send(this.#stream, FRAME.pages, pagesHead(index, at, part.size), content);
      this.sentBytes += part.size;
      const { frozen: paused } = this.#vm;
      this.#onProgress?.({ round, sentBytes: this.sentBytes, roundBytes, paused });
    }
  }
}

function lengthOf(ranges: Ranges): number {
  let sum = 0;
  for (const map of ranges) for (const { start, end } of map) sum += end - start;
  return sum;
}

function merged(ranges: Ranges, more: Ranges): Ranges {
  for (const [index, map] of more.entries())
    for (const { start, end } of map) (ranges[index] as RangeMap<true>).set(start, end, true);
  return ranges;
}
