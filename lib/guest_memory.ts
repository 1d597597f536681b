import { constants } from 'node:buffer';
import { KvmError } from './errors.ts';
import { formatRange } from './format.ts';
import { HostMemory, keptAlive, WINDOW_MAX } from './host_memory.ts';
import { bytes } from './kernel/arguments.ts';
import type { Kernel } from './kernel/kernel.ts';
import type { Memslot } from './memslot.ts';
import { guardConstructor, type internal } from './resource.ts';
import { ERRNO, errnoName } from './uapi.ts';
import { integer, rangeError } from './validate.ts';
import type { Vm } from './vm.ts';

/** Bytes of one mapping that a guest address range shows. */
interface Piece {
  readonly mapping: number;
  readonly offset: number;
  readonly size: number;
  /** What a view of it must keep alive. */
  readonly owner: object;
}

/** A view that its user may have dropped; what it showed is known by its buffer, which parts of it share. */
class View {
  readonly address: number;
  readonly length: number;
  readonly #offset: number;
  readonly #buffer: WeakRef<ArrayBufferLike>;

  readonly #view: WeakRef<Uint8Array>;

  constructor(address: number, view: Uint8Array) {
    this.address = address;
    this.length = view.length;
    this.#offset = view.byteOffset;
    this.#buffer = new WeakRef(view.buffer);
    this.#view = new WeakRef(view);
  }

  /** Undefined when nobody has it any more, or it is detached. */
  bytes(): Uint8Array | undefined {
    const buffer = this.#buffer.deref();
    if (!buffer?.byteLength) return undefined;
    return this.#view.deref() ?? new Uint8Array(buffer, this.#offset, this.length);
  }
}

/** What GuestMemory needs of its VM. */
export interface MemoryOwner {
  readonly vm: Vm;
  readonly kernel: Kernel;
  assertOpen(): void;
}

/**
 * The guest's memory by guest physical address, as the host may see it: the shared side of every memslot of address space 0. Reads and writes
 * copy through a guarded path, so a page that is not there for the host is an error and never a signal that somebody sees: short copies are the
 * kernel's own, long ones are caught by a handler for SIGSEGV and SIGBUS that passes on everything else.
 */
export class GuestMemory {
  readonly #owner: MemoryOwner;
  readonly #views = new Map<string, View>();
  #sweepAt = 64;

  /** @internal */
  constructor(token: typeof internal, owner: MemoryOwner) {
    guardConstructor(token, 'vm.memory');
    this.#owner = owner;
    Object.freeze(this);
  }

  /**
   * Copies bytes out of the guest's memory.
   *
   * @param address Guest physical address in bytes; any alignment.
   * @param length Bytes.
   * @throws KvmError `EFAULT`, naming the range and why, if any byte is private, has no memslot, or is not for the host · `ERR_CLOSED`
   */
  read(address: number, length: number): Uint8Array {
    integer('address', address);
    if (integer('length', length) > constants.MAX_LENGTH)
      throw rangeError(`a read has at most ${constants.MAX_LENGTH} bytes`);
    this.#owner.assertOpen();
    const pieces = this.#plan(address, length, 'read');
    return this.#copyOut(address, pieces, new Uint8Array(length));
  }

  /** The same into a buffer of the caller's. @returns the bytes copied: all of `target`. */
  readInto(address: number, target: Uint8Array): number {
    const plain = bytes('target', target);
    this.#owner.assertOpen();
    return this.#copyOut(address, this.#plan(address, plain.length, 'read'), plain).length;
  }

  /**
   * Copies bytes into the guest's memory, read-only slots included. Nothing is written unless every byte has a slot, is shared and is for the
   * host; only a file behind host memory that somebody cut meanwhile can end it half-way.
   *
   * @param address Guest physical address in bytes; any alignment.
   * @throws KvmError `EFAULT` as for read() · `ERR_CLOSED`
   */
  write(address: number, data: Uint8Array): void {
    const plain = bytes('data', data);
    this.#owner.assertOpen();
    this.#owner.vm.assertThawed();
    let position = 0;
    for (const { mapping, offset, size } of this.#plan(address, plain.length, 'write')) {
      const copied = this.#owner.kernel.poke(mapping, offset, plain.subarray(position, position + size));
      const done = Math.max(0, copied);
      if (done < size) throw this.#fault('write', address + position + done, size - done, this.#absent());
      position += size;
    }
    this.#owner.vm.written(address, plain.length);
  }

  /**
   * The bytes themselves, without a copy: of one memslot, and only where a touch cannot fault. The view is detached (length 0) when that stops
   * being true: when a part of it becomes private, its slot is removed or moved, or its memory is closed.
   *
   * @param address Guest physical address in bytes; any alignment.
   * @param length Bytes, at most 4 GiB.
   * @throws KvmError `EFAULT` as for read(), or across a border of memslots · `EBUSY` a pager brings its pages, or the VM is a protected one ·
   *   `ERR_CLOSED`
   */
  view(address: number, length: number): Uint8Array {
    this.#owner.assertOpen();
    if (integer('length', length, 1) > WINDOW_MAX) throw rangeError('a view has at most 4 GiB; ask for a part');
    const [piece, next] = this.#plan(address, length, 'view');
    if (!piece || next)
      throw this.#fault('view', address, length, 'it lies in more than one memslot: read() copies across them');
    const key = `${address} ${length}`;
    const known = this.#views.get(key)?.bytes();
    if (known) return known;
    if (HostMemory.is(piece.owner)) piece.owner.backing.assertViewable();
    const view = this.#owner.kernel.window(piece.mapping, piece.offset, length, true);
    keptAlive.set(view.buffer, piece.owner);
    this.#sweep();
    this.#views.set(key, new View(address, view));
    return view;
  }

  /** Forgets the views that are gone, now and then, so that it costs little for each. */
  #sweep(): void {
    if (this.#views.size < this.#sweepAt) return;
    for (const [key, view] of this.#views) if (!view.bytes()) this.#views.delete(key);
    this.#sweepAt = Math.max(64, 2 * this.#views.size);
  }

  /** @internal */
  detachViews(address: number, size: number): void {
    for (const [key, view] of this.#views) {
      if (view.address >= address + size || address >= view.address + view.length) continue;
      const bytes = view.bytes();
      if (bytes) this.#owner.kernel.releaseWindow(bytes);
      this.#views.delete(key);
    }
  }

  #copyOut(address: number, pieces: readonly Piece[], target: Uint8Array): Uint8Array {
    let position = 0;
    for (const { mapping, offset, size } of pieces) {
      const copied = this.#owner.kernel.peek(mapping, offset, target.subarray(position, position + size));
      const done = Math.max(0, copied);
      if (done < size) throw this.#fault('read', address + position + done, size - done, this.#absent());
      position += size;
    }
    return target;
  }

  /** Every byte has a slot, is shared, and is memory the host may touch: or the first that does not is the error. */
  #plan(address: number, length: number, what: string): Piece[] {
    integer('address', address);
    integer('length', length);
    if (!Number.isSafeInteger(address + length)) throw rangeError('the range ends past 2^53-1');
    const { vm } = this.#owner;
    const pieces: Piece[] = [];
    for (let at = address; at < address + length; ) {
      const slot = vm.memslotAt(at);
      if (!slot) throw this.#fault(what, at, address + length - at, 'no memslot is there');
      const end = Math.min(address + length, slot.address + slot.size);
      const [secret] = vm.attributes.privateRanges({ address: at, size: end - at });
      if (secret) throw this.#fault(what, secret.address, secret.size, 'it is private');
      pieces.push(this.#piece(slot, at, end - at, what));
      at = end;
    }
    return pieces;
  }

  #piece(slot: Memslot, address: number, size: number, what: string): Piece {
    const { guestMemfd, hostMemory } = slot;
    const inSlot = address - slot.address;
    const { type, capabilities } = this.#owner.vm;
    // A protected guest has the host memory, also where there is a file.
    const ignoresFile = type === 'protected' && capabilities.conversion !== 'in-place' && hostMemory !== null;
    if (guestMemfd?.backing.gmemOnly && !ignoresFile) {
      const { hostAccessible, map } = guestMemfd.backing;
      if (!hostAccessible)
        throw this.#fault(what, address, size, `the guest_memfd of slot ${slot.slot} was created without initShared`);
      return { mapping: map(), offset: slot.guestMemfdOffset + inSlot, size, owner: guestMemfd };
    }
    if (!hostMemory) throw this.#fault(what, address, size, `slot ${slot.slot} has no host memory`);
    return { mapping: hostMemory.backing.mapping, offset: slot.hostOffset + inSlot, size, owner: hostMemory };
  }

  #absent(): string {
    return this.#owner.vm.type === 'protected'
      ? 'the guest has the page for itself, or the host has none there'
      : 'the host has no page there';
  }

  #fault(what: string, address: number, size: number, why: string): KvmError {
    return new KvmError({
      code: errnoName(ERRNO.EFAULT),
      errno: -ERRNO.EFAULT,
      message: `cannot ${what} guest memory ${formatRange(address, size)}: ${why} (EFAULT)`,
      args: { address, size },
      errorOffset: address,
    });
  }
}
