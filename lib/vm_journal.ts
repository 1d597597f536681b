import type { GuestMemfd } from './guest_memfd.ts';
import { type HostMemory, type HostMemoryKind, hostMemoryKinds } from './host_memory.ts';
import type { Memslot } from './memslot.ts';
import type { ReadonlyRangeMap } from './ranges.ts';

/**
 * What other threads need to know of a VM's memory: an entry for each memory, slot and attribute as it changes, in memory that all of them
 * see. One thread writes, the one that created the VM; the others read on from where they were, whenever they want to know.
 */

export type Change =
  | {
      readonly kind: 'host-memory';
      readonly share: number;
      readonly size: number;
      readonly alignment: number;
      readonly memory: HostMemoryKind;
    }
  | { readonly kind: 'guest-memfd'; readonly share: number; readonly size: number; readonly flags: number }
  | {
      readonly kind: 'memslot';
      readonly slot: number;
      readonly address: number;
      readonly size: number;
      /** Shares of the memories, named before; 0 for none. */
      readonly hostMemory: number;
      readonly hostOffset: number;
      readonly guestMemfd: number;
      readonly guestMemfdOffset: number;
      readonly flags: number;
    }
  | { readonly kind: 'memslot-gone'; readonly slot: number }
  | { readonly kind: 'attributes'; readonly start: number; readonly end: number; readonly isPrivate: boolean };

export const SLOT_READONLY = 1;
export const SLOT_LOGS = 2;

const kinds = ['host-memory', 'guest-memfd', 'memslot', 'memslot-gone', 'attributes'] as const;

/** Words of an entry: the kind and at most eight numbers. */
const STRIDE = 9;
const WORD = 8;
const HEADER = 16;
const FIRST_BYTES = 1 << 12;
/** 14 million changes that cannot be told in fewer; the pages come when they are needed. */
const MAX_BYTES = 2 ** 30;

/** A thread that ended while it wrote never ends. */
const MAX_TRIES = 1e7;

/** Indices of the header's 32-bit words. */
const VERSION = 0;
const COUNT = 1;
const ENDED = 2;

function encode(change: Change): readonly number[] {
  const kind = kinds.indexOf(change.kind);
  switch (change.kind) {
    case 'host-memory':
      return [kind, change.share, change.size, change.alignment, hostMemoryKinds.indexOf(change.memory)];
    case 'guest-memfd':
      return [kind, change.share, change.size, change.flags];
    case 'memslot': {
      const { slot, address, size, hostMemory, hostOffset, guestMemfd, guestMemfdOffset, flags } = change;
      return [kind, slot, address, size, hostMemory, hostOffset, guestMemfd, guestMemfdOffset, flags];
    }
    case 'memslot-gone':
      return [kind, change.slot];
    case 'attributes':
      return [kind, change.start, change.end, change.isPrivate ? 1 : 0];
  }
}

function decode([kind = 0, a = 0, b = 0, c = 0, d = 0, e = 0, f = 0, g = 0, flags = 0]: readonly number[]): Change {
  switch (kinds[kind]) {
    case 'host-memory':
      return { kind: 'host-memory', share: a, size: b, alignment: c, memory: hostMemoryKinds[d] ?? 'anonymous' };
    case 'guest-memfd':
      return { kind: 'guest-memfd', share: a, size: b, flags: c };
    case 'memslot':
      return {
        kind: 'memslot',
        slot: a,
        address: b,
        size: c,
        hostMemory: d,
        hostOffset: e,
        guestMemfd: f,
        guestMemfdOffset: g,
        flags,
      };
    case 'memslot-gone':
      return { kind: 'memslot-gone', slot: a };
    default:
      return { kind: 'attributes', start: a, end: b, isPrivate: c !== 0 };
  }
}

/** What a journal tells about from its beginning. */
export interface JournalSource {
  readonly slots: ReadonlyMap<number, Memslot>;
  privateGfns(): ReadonlyRangeMap<true>;
  /** The shares of memories. */
  shareOf(memory: HostMemory | GuestMemfd): number;
}

export class JournalWriter {
  readonly buffer = new SharedArrayBuffer(FIRST_BYTES, { maxByteLength: MAX_BYTES });
  readonly #source: JournalSource;
  readonly #header = new Int32Array(this.buffer, 0, HEADER / 4);
  readonly #words = new Float64Array(this.buffer, HEADER);
  /** Memories that the entries have named. */
  readonly #named = new Set<number>();
  /** Entries after which to begin anew: so the journal is never much longer than what there is to tell. */
  #limit = 0;

  constructor(source: JournalSource) {
    this.#source = source;
    this.rewrite();
  }

  memslot(slot: Memslot): void {
    for (const change of this.#slot(slot)) this.#append(change);
    this.#tidy();
  }

  memslotGone(slot: number): void {
    this.#append({ kind: 'memslot-gone', slot });
    this.#tidy();
  }

  /** gfns. */
  attributes(start: number, end: number, isPrivate: boolean): void {
    this.#append({ kind: 'attributes', start, end, isPrivate });
    this.#tidy();
  }

  /** The VM is closed. */
  end(): void {
    Atomics.store(this.#header, ENDED, 1);
  }

  *#slot(slot: Memslot): Generator<Change> {
    const { hostMemory, guestMemfd, hostOffset, guestMemfdOffset, address, size } = slot;
    const [host, file] = [hostMemory, guestMemfd].map((memory) => (memory ? this.#source.shareOf(memory) : 0));
    if (hostMemory && host && !this.#named.has(host))
      yield {
        kind: 'host-memory',
        share: host,
        size: hostMemory.size,
        alignment: hostMemory.backing.alignment,
        memory: hostMemory.kind,
      };
    if (guestMemfd && file && !this.#named.has(file))
      yield { kind: 'guest-memfd', share: file, size: guestMemfd.size, flags: Number(guestMemfd.flags) };
    yield {
      kind: 'memslot',
      slot: slot.slot,
      address,
      size,
      hostMemory: host ?? 0,
      hostOffset,
      guestMemfd: file ?? 0,
      guestMemfdOffset,
      flags: (slot.readonly ? SLOT_READONLY : 0) | (slot.logDirtyPages ? SLOT_LOGS : 0),
    };
  }

  #append(change: Change): void {
    const count = this.#header[COUNT] as number;
    const end = HEADER + (count + 1) * STRIDE * WORD;
    if (end > this.buffer.byteLength) this.buffer.grow(Math.min(MAX_BYTES, 2 * end));
    if (change.kind === 'host-memory' || change.kind === 'guest-memfd') this.#named.add(change.share);
    this.#words.set(encode(change), count * STRIDE);
    Atomics.store(this.#header, COUNT, count + 1);
  }

  #tidy(): void {
    if ((this.#header[COUNT] as number) > this.#limit) this.rewrite();
  }

  /** Tells everything from the beginning. Readers see an odd version, or another one, and begin anew too. */
  rewrite(): void {
    Atomics.add(this.#header, VERSION, 1);
    Atomics.store(this.#header, COUNT, 0);
    this.#named.clear();
    for (const slot of this.#source.slots.values()) for (const change of this.#slot(slot)) this.#append(change);
    for (const { start, end } of this.#source.privateGfns())
      this.#append({ kind: 'attributes', start, end, isPrivate: true });
    this.#limit = 2 * (this.#header[COUNT] as number) + 1024;
    Atomics.add(this.#header, VERSION, 1);
  }
}

export class JournalReader {
  readonly #header: Int32Array;
  readonly #words: Float64Array;
  #version = -1;
  #read = 0;

  /** Whether it has the shape of a journal. */
  static canRead({ byteLength }: SharedArrayBuffer): boolean {
    return byteLength >= HEADER && byteLength % WORD === 0;
  }

  constructor(buffer: SharedArrayBuffer) {
    this.#header = new Int32Array(buffer, 0, HEADER / 4);
    this.#words = new Float64Array(buffer, HEADER);
  }

  get ended(): boolean {
    return Atomics.load(this.#header, ENDED) !== 0;
  }

  /** What has changed since the last call; `anew` when it tells everything from the beginning. Null when nothing has. */
  changes(): { readonly anew: boolean; readonly changes: readonly Change[] } | null {
    for (let tries = 0; tries < MAX_TRIES; tries++) {
      const version = Atomics.load(this.#header, VERSION);
      const count = Math.min(Atomics.load(this.#header, COUNT), Math.floor(this.#words.length / STRIDE));
      const anew = version !== this.#version;
      if (!anew && count === this.#read) return null;
      // Odd: the other thread is at it, for as long as the VM has ranges.
      if (version & 1) continue;
      const changes: Change[] = [];
      for (let index = anew ? 0 : this.#read; index < count; index++)
        changes.push(decode([...this.#words.subarray(index * STRIDE, (index + 1) * STRIDE)]));
      if (Atomics.load(this.#header, VERSION) !== version) continue;
      this.#version = version;
      this.#read = count;
      return { anew, changes };
    }
    return null;
  }
}
