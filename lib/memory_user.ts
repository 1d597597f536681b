import { KvmError } from './errors.ts';
import { formatRange } from './format.ts';
import type { FileRange, GuestRange, Visibility } from './guest_range.ts';
import type { Hold, Holds } from './holds.ts';
import type { Memslot } from './memslot.ts';
import { guardConstructor, type internal } from './resource.ts';
import { guestRange, options, text, typeError } from './validate.ts';
import type { Vm } from './vm.ts';

/** A conversion, as those who use guest memory see it: one object from `converting` to `converted` or `kept`. */
export interface ConversionNotice {
  /** What changes sides: parts of the range that was asked for, in ascending order. */
  readonly ranges: readonly GuestRange[];
  readonly to: Visibility;
}

/**
 * What a user of guest memory wants to know of conversions. Every function may be left out. The order is that of the users' registration, and
 * the reverse for `kept`.
 */
export interface MemoryUserOptions {
  /** As messages name it: 'vfio 0000:01:00.0'. */
  readonly name: string;
  /**
   * Asked before the kernel is: the moment to take back what the device has of these ranges (`hold.release()`, unmap the DMA). A sentence in
   * return is a veto, and its reason. A promise is waited for by convert(); for convertSync() it is a veto.
   */
  readonly converting?: (notice: ConversionNotice) => undefined | string | Promise<undefined | string>;
  /** It is done: the moment to hold and map what is there now. What this throws is in the report's `complaints`; nothing is undone. */
  readonly converted?: (notice: ConversionNotice) => void;
  /** It was asked for and did not take place, so all is as before: the moment to map again. */
  readonly kept?: (notice: ConversionNotice) => void;
  /**
   * Pages that the guest sees at these addresses are about to go, by punchHole() or discard(), and are still there: the moment to let go of them.
   * What this throws is thrown there, and nothing has gone. Conversions have `converting`.
   */
  readonly discarding?: (ranges: readonly GuestRange[]) => void;
}

/** A part of guest memory in use outside the guest, as it is now, private or shared: while it is held, it stays so. */
export interface MemoryHold extends Disposable {
  readonly range: GuestRange;
  readonly visibility: Visibility;
  /** Lets go. A second call does nothing. */
  release(): void;
}

interface Registry {
  readonly vm: Vm;
  readonly users: Set<MemoryUser>;
  /** By guest physical address. */
  readonly holds: Holds<string>;
  assertOpen(): void;
  assertIdle(address: number, size: number): void;
}

type Listener = Omit<MemoryUserOptions, 'name'>;

/** @internal */
export function checkedListener(given: { readonly [K in keyof Listener]: Listener[K] | undefined }): Listener {
  const { converting, converted, kept, discarding } = given;
  for (const [key, value] of Object.entries({ converting, converted, kept, discarding }))
    if (value !== undefined && typeof value !== 'function') throw typeError(`options.${key} must be a function`);
  return {
    ...(converting && { converting }),
    ...(converted && { converted }),
    ...(kept && { kept }),
    ...(discarding && { discarding }),
  };
}

/**
 * A user of guest memory besides the guest: a device with DMA, a back end in another process, a migration. It is asked before memory changes
 * sides, may refuse, and is told the outcome.
 */
export class MemoryUser implements Disposable {
  readonly name: string;
  readonly #registry: Registry;
  readonly #listener: Listener;
  readonly #held = new Map<Hold<string>, MemoryHold>();

  /** @internal */
  static add(token: typeof internal, registry: Registry, given: MemoryUserOptions): MemoryUser {
    const { name, converting, converted, kept, discarding } = options('options', given);
    text('options.name', name);
    const listener = checkedListener({ converting, converted, kept, discarding });
    registry.assertOpen();
    return new MemoryUser(token, registry, name, listener);
  }

  /** @internal */
  constructor(token: typeof internal, registry: Registry, name: string, listener: Listener) {
    guardConstructor(token, 'vm.addMemoryUser()');
    this.name = name;
    this.#registry = registry;
    this.#listener = listener;
    registry.users.add(this);
    Object.freeze(this);
  }

  /** What it holds now. */
  get holds(): readonly MemoryHold[] {
    return [...this.#held.values()];
  }

  /**
   * Hands a range out to this user, whichever side it is on. Converting any part of it is `EAGAIN` until it is released.
   *
   * @param range Guest physical addresses in bytes, any alignment; within memslots, and all of it private or all of it shared.
   * @throws KvmError `EFAULT` no memslot is there · `EINVAL` private and shared parts · `EBUSY` a conversion is at work there · `ERR_CLOSED`
   */
  hold(range: GuestRange): MemoryHold {
    const { address, size } = guestRange('range', range);
    const { vm, holds } = this.#registry;
    this.#registry.assertOpen();
    if (this.removed) throw KvmError.closed(`the memory user '${this.name}'`);
    for (let at = address; at < address + size; ) {
      const slot = vm.memslotAt(at);
      if (!slot)
        throw new KvmError({
          code: 'EFAULT',
          message: `cannot hold ${formatRange(address, size)}: no memslot at ${at}`,
        });
      at = slot.address + slot.size;
    }
    this.#registry.assertIdle(address, size);
    const visibility = vm.attributes.state({ address, size });
    if (visibility === 'mixed')
      throw new KvmError({
        code: 'EINVAL',
        message: `${formatRange(address, size)} is private in parts: hold them one by one`,
      });
    const held = this.#held;
    const hold = holds.add(address, address + size, this.name);
    const release = (): void => {
      if (held.delete(hold)) holds.delete(hold);
    };
    const result = { range: { address, size }, visibility, release, [Symbol.dispose]: release };
    held.set(hold, result);
    return result;
  }

  /** Releases what it holds; it hears of no more conversions. A second call does nothing. */
  remove(): void {
    this.#registry.users.delete(this);
    for (const { release } of this.#held.values()) release();
  }

  [Symbol.dispose](): void {
    this.remove();
  }

  /** @internal */
  get removed(): boolean {
    return !this.#registry.users.has(this);
  }

  /** @internal */
  get listener(): Listener {
    return this.#listener;
  }
}

/** Tells the users of guest memory that bytes of a file or of host memory, which these slots show, are about to go. */
export function tellOfDiscard(
  slots: Iterable<Memslot>,
  side: 'guestMemfdOffset' | 'hostOffset',
  { offset, size }: FileRange,
): void {
  const told = new Map<MemoryUser, GuestRange[]>();
  for (const slot of slots) {
    const { vm, users } = slot.backing;
    if (users.size === 0) continue;
    const { pageSize } = vm.kvm;
    // The kernel refuses these.
    if (offset % pageSize !== 0 || size % pageSize !== 0) return;
    const from = Math.max(offset, slot[side]);
    const to = Math.min(offset + size, slot[side] + slot.size);
    if (from >= to) continue;
    const range = { address: slot.address + from - slot[side], size: to - from };
    const isFile = side === 'guestMemfdOffset';
    const gmemOnly = slot.guestMemfd?.backing.gmemOnly ?? false;
    // What the guest does not see there is nobody's to use.
    if (gmemOnly && !isFile) continue;
    const ranges = gmemOnly ? [range] : vm.attributes.rangesOf(isFile ? 'private' : 'shared', range);
    if (ranges.length > 0) for (const user of users) told.set(user, [...(told.get(user) ?? []), ...ranges]);
  }
  for (const [user, ranges] of told)
    if (!user.removed) user.listener.discarding?.(ranges.sort((a, b) => a.address - b.address));
}
