import { KvmError } from './errors.ts';
import { formatRange } from './format.ts';
import type { GuestMemfd } from './guest_memfd.ts';
import type { GuestRange } from './guest_range.ts';
import { linkGuestMemfd } from './handover/memory_image.ts';
import type { Hold } from './holds.ts';
import type { Memslot, MemslotOptions } from './memslot.ts';
import { guardConstructor, internal } from './resource.ts';
import { ERRNO } from './uapi.ts';
import { guestRange, integer, oneOf, options, typeError } from './validate.ts';
import { Vm } from './vm.ts';

export interface CarveOutOptions {
  /** The VM that gets the memory; of the same Kvm. */
  readonly to: Vm;
  /** Where it gets it: guest physical address in bytes, page-aligned. The same as in the donor when omitted. */
  readonly address?: number;
}

export interface ReturnOptions {
  /** What the donor finds: what the other VM left there (default), or zeros. */
  readonly content?: 'preserve' | 'zero';
}

/** One line of the ledger: who holds which part of a VM's memory. */
export interface LedgerEntry {
  /** Guest physical addresses of the donor. */
  readonly range: GuestRange;
  readonly holder: Vm;
  /** Where the holder has it. */
  readonly address: number;
  /** Null for what the donor holds itself. */
  readonly carveOut: CarveOut | null;
}

/** How a slot of the donor was, to make it again. */
interface Original {
  readonly options: MemslotOptions;
  /** What was left of it. */
  readonly pieces: readonly GuestRange[];
}

const carvedFrom = new WeakMap<Vm, Set<CarveOut>>();

/**
 * Part of a running VM's memory, while it is another VM's: the donor has no memslot there, the other has one on the same pages. Nothing is copied.
 * It comes back by return().
 *
 * @see KVM_SET_USER_MEMORY_REGION on both VMs; for a guest_memfd the proposed KVM_LINK_GUEST_MEMFD
 */
export class CarveOut implements Disposable {
  readonly donor: Vm;
  readonly holder: Vm;
  /** Guest physical addresses of the donor. */
  readonly range: GuestRange;
  /** Where the holder has it. */
  readonly address: number;
  readonly #original: Original;
  readonly #slot: Memslot;
  readonly #link: GuestMemfd | null;
  readonly #lease: Hold<string> | null;
  #returned = false;

  /**
   * Takes memory from a VM and gives it to another. The slot that has it is split: stop the donor's vCPUs, which would find no memory in it for a moment, and
   * none in the range until it is returned.
   *
   * @param range Guest physical addresses, page-aligned, within one memslot.
   * @throws KvmError `EFAULT` no memslot has all of it · `EINVAL` unaligned, the slot logs dirty pages, or VMs of two Kvms · `EEXIST` the other VM has
   *   something there · `EAGAIN` a user of the donor's memory holds a part · `EBUSY` a conversion is at work, or another memslot
   *   shows the same memory · `EPERM` a VM is frozen · `UNSUPPORTED` a
   *   guest_memfd, which serves one VM until KVM_LINK_GUEST_MEMFD exists · `ERR_CLOSED`
   */
  static create(donor: Vm, range: GuestRange, given: CarveOutOptions): CarveOut {
    if (!(donor instanceof Vm)) throw typeError('donor must be a Vm');
    const wanted = guestRange('range', range);
    const { to, address = wanted.address } = options('options', given);
    if (!(to instanceof Vm)) throw typeError('options.to must be a Vm');
    integer('options.address', address);
    for (const vm of [donor, to]) {
      vm.backing.assertOpen();
      vm.backing.assertOwn();
    }
    if (to === donor || to.kvm !== donor.kvm) throw invalid('memory is carved out for another VM of the same Kvm');
    const slot = donor.memslotAt(wanted.address);
    if (!slot || wanted.address + wanted.size > slot.address + slot.size)
      throw new KvmError({
        code: 'EFAULT',
        errno: -ERRNO.EFAULT,
        message: `no memslot has all of ${formatRange(wanted.address, wanted.size)} (EFAULT)`,
      });
    const { pageSize } = donor.kvm;
    if (wanted.address % pageSize || wanted.size % pageSize)
      throw invalid(`${formatRange(wanted.address, wanted.size)} is not made of whole pages of ${pageSize} bytes`);
    if (slot.logDirtyPages)
      throw invalid(`memslot ${slot.slot} logs dirty pages, which would be lost: stop that first`);
    const inMemory = slot.hostOffset + wanted.address - slot.address;
    const shown = slot.hostMemory?.backing.shown.holders(inMemory, inMemory + wanted.size) ?? new Set([slot]);
    if (shown.size > 1)
      throw new KvmError({
        code: 'EBUSY',
        errno: -ERRNO.EBUSY,
        message: 'another memslot shows a part of the same host memory: the range would not be one VM’s alone (EBUSY)',
      });
    donor.backing.assertIdle(wanted.address, wanted.size);
    donor.backing.assertUnheld(wanted);
    return new CarveOut(internal, donor, to, wanted, address, slot);
  }

  /** @internal */
  constructor(token: typeof internal, donor: Vm, holder: Vm, range: GuestRange, address: number, slot: Memslot) {
    guardConstructor(token, 'CarveOut.create()');
    this.donor = donor;
    this.holder = holder;
    this.range = Object.freeze({ address: range.address, size: range.size });
    this.address = address;
    const inSlot = range.address - slot.address;
    const { guestMemfd, hostMemory } = slot;
    const { kernel } = donor.backing;
    this.#link = guestMemfd && linkGuestMemfd(holder, kernel, guestMemfd.backing.fd, guestMemfd);
    try {
      this.#original = split(donor, slot, range);
    } catch (error) {
      this.#link?.close();
      throw error;
    }
    try {
      this.#slot = holder.createMemslot({
        address,
        size: range.size,
        ...(hostMemory && { hostMemory, hostOffset: slot.hostOffset + inSlot }),
        ...(this.#link && { guestMemfd: this.#link, guestMemfdOffset: slot.guestMemfdOffset + inSlot }),
        readonly: slot.readonly,
      });
    } catch (error) {
      join(donor, this.#original);
      this.#link?.close();
      throw error;
    }
    const start = slot.hostOffset + inSlot;
    this.#lease = hostMemory
      ? hostMemory.backing.leases.add(start, start + range.size, `memslot ${this.#slot.slot}`)
      : null;
    carvedFrom.set(donor, (carvedFrom.get(donor) ?? new Set()).add(this));
    Object.freeze(this);
  }

  /**
   * Who holds what of a VM's memory, by address: its own memslots and what was carved out of them.
   *
   * @throws KvmError `ERR_CLOSED`
   */
  static ledger(vm: Vm): LedgerEntry[] {
    if (!(vm instanceof Vm)) throw typeError('vm must be a Vm');
    vm.backing.assertOpen();
    const own = [...vm.memslots.values()].map(({ address, size }) => ({
      range: { address, size },
      holder: vm,
      address,
      carveOut: null,
    }));
    const out = [...(carvedFrom.get(vm) ?? [])].map((carveOut) => ({
      range: carveOut.range,
      holder: carveOut.holder,
      address: carveOut.address,
      carveOut,
    }));
    return [...own, ...out].sort((a, b) => a.range.address - b.range.address);
  }

  get returned(): boolean {
    return this.#returned;
  }

  /**
   * The memory is the donor's again, and the other VM has none there: stop its vCPUs first. The donor's memslot is as it was before it was split. If the
   * other VM is closed by now, that is its part of the return. A second call does nothing.
   *
   * @throws KvmError `EBUSY` a conversion is at work there, or other parts of the same memslot are still out · `EEXIST` the donor has something else there ·
   *   `EAGAIN` a user of the other VM's memory holds a part · `EPERM` a VM is frozen. The memory is where it was then · `ERR_CLOSED` the donor is closed
   */
  return(given: ReturnOptions = {}): void {
    const { content = 'preserve' } = options('options', given);
    oneOf('options.content', content, ['preserve', 'zero']);
    if (this.#returned) return;
    const { donor, holder, range } = this;
    donor.backing.assertOpen();
    donor.backing.assertOwn();
    if (!holder.closed) {
      holder.backing.assertOwn();
      holder.backing.assertIdle(this.address, range.size);
      holder.backing.assertUnheld({ address: this.address, size: range.size });
    }
    if (donor.memslotAt(range.address))
      throw new KvmError({
        code: 'EEXIST',
        errno: -ERRNO.EEXIST,
        message: 'the donor has another memslot there (EEXIST)',
      });
    if (!piecesOf(donor, this.#original))
      throw new KvmError({
        code: 'EBUSY',
        errno: -ERRNO.EBUSY,
        message: 'a part of the same memslot was carved out later, or is gone: return that first (EBUSY)',
      });
    this.#slot.remove();
    this.#link?.close();
    const { hostMemory, guestMemfd } = this.#original.options;
    if (this.#lease) hostMemory?.backing.leases.delete(this.#lease);
    const inSlot = range.address - this.#original.options.address;
    if (content === 'zero') {
      hostMemory?.discard({ offset: (this.#original.options.hostOffset ?? 0) + inSlot, size: range.size });
      guestMemfd?.punchHole({ offset: (this.#original.options.guestMemfdOffset ?? 0) + inSlot, size: range.size });
    }
    join(donor, this.#original);
    this.#returned = true;
    carvedFrom.get(donor)?.delete(this);
  }

  [Symbol.dispose](): void {
    if (!this.donor.closed) this.return();
  }
}

/** The slot without the range: nothing, one piece or two. */
function split(vm: Vm, slot: Memslot, range: GuestRange): Original {
  const { address, size, hostMemory, hostOffset, guestMemfd, guestMemfdOffset, readonly } = slot;
  const original: MemslotOptions = {
    slot: slot.slot,
    address,
    size,
    ...(hostMemory && { hostMemory, hostOffset }),
    ...(guestMemfd && { guestMemfd, guestMemfdOffset }),
    readonly,
  };
  const piece = (start: number, end: number, number?: number): Memslot[] => {
    if (start === end) return [];
    const { slot: _, ...rest } = original;
    return [
      vm.createMemslot({
        ...rest,
        ...(number !== undefined && { slot: number }),
        address: start,
        size: end - start,
        ...(hostMemory && { hostOffset: hostOffset + start - address }),
        ...(guestMemfd && { guestMemfdOffset: guestMemfdOffset + start - address }),
      }),
    ];
  };
  slot.remove();
  const pieces: GuestRange[] = [];
  try {
    for (const left of piece(address, range.address, slot.slot)) pieces.push({ address, size: left.size });
    for (const left of piece(range.address + range.size, address + size))
      pieces.push({ address: left.address, size: left.size });
    return { options: original, pieces };
  } catch (error) {
    join(vm, { options: original, pieces });
    throw error;
  }
}

/** The memslots that are the pieces, null unless all are there as they were left. */
function piecesOf(vm: Vm, { options: original, pieces }: Original): Memslot[] | null {
  const slots: Memslot[] = [];
  for (const { address, size } of pieces) {
    const slot = vm.memslotAt(address);
    const shift = address - original.address;
    const same =
      slot?.address === address &&
      slot.size === size &&
      (slot.hostMemory ?? undefined) === original.hostMemory &&
      (slot.guestMemfd ?? undefined) === original.guestMemfd &&
      (!slot.hostMemory || slot.hostOffset === (original.hostOffset ?? 0) + shift) &&
      (!slot.guestMemfd || slot.guestMemfdOffset === (original.guestMemfdOffset ?? 0) + shift);
    if (!same) return null;
    slots.push(slot);
  }
  return slots;
}

function join(vm: Vm, original: Original): void {
  for (const piece of piecesOf(vm, original) ?? []) piece.remove();
  // Its number may have found another use, where no piece kept it.
  const { slot, ...rest } = original.options;
  vm.createMemslot(vm.memslots.has(slot as number) ? rest : original.options);
}

function invalid(why: string): KvmError {
  return new KvmError({ code: 'EINVAL', errno: -ERRNO.EINVAL, message: `${why} (EINVAL)` });
}
