import { GuestMemfd } from './guest_memfd.ts';
import { HostMemory } from './host_memory.ts';
import { Memslot, type SlotOwner } from './memslot.ts';
import type { RangeMap } from './ranges.ts';
import { internal, type Resource } from './resource.ts';
import { type Change, type JournalReader, SLOT_LOGS, SLOT_READONLY } from './vm_journal.ts';

type SlotChange = Extract<Change, { kind: 'memslot' }>;
type MemoryChange = Extract<Change, { kind: 'host-memory' | 'guest-memfd' }>;

/** The memory of a VM as another thread made it: objects of this thread over the same memory, brought up to date when they are asked for. */
export class AttachedMemory {
  readonly #owner: SlotOwner;
  readonly #gfns: RangeMap<true>;
  readonly #reader: JournalReader;
  /** By share: what the journal names, and what of it is open here. */
  readonly #named = new Map<number, MemoryChange>();
  readonly #memories = new Map<number, HostMemory | GuestMemfd>();
  #wanted = new Map<number, SlotChange>();
  readonly #shown = new Map<number, SlotChange>();

  /** @param gfns What is private, as the VM's attributes show it. */
  constructor(owner: SlotOwner, gfns: RangeMap<true>, reader: JournalReader) {
    this.#owner = owner;
    this.#gfns = gfns;
    this.#reader = reader;
  }

  get ended(): boolean {
    return this.#reader.ended;
  }

  follow(): void {
    const news = this.#reader.changes();
    if (!news) return;
    if (news.anew) {
      this.#wanted = new Map();
      this.#gfns.clear();
    }
    for (const change of news.changes) this.#note(change);
    for (const [number, change] of this.#shown) if (!isSame(change, this.#wanted.get(number))) this.#hide(number);
    for (const [number, change] of this.#wanted) if (!this.#shown.has(number)) this.#show(number, change);
    this.#closeUnused();
  }

  #note(change: Change): void {
    switch (change.kind) {
      case 'memslot':
        this.#wanted.set(change.slot, change);
        break;
      case 'memslot-gone':
        this.#wanted.delete(change.slot);
        break;
      case 'attributes':
        this.#attributes(change);
        break;
      default:
        this.#named.set(change.share, change);
    }
  }

  #attributes({ start, end, isPrivate }: Extract<Change, { kind: 'attributes' }>): void {
    if (!(start >= 0 && start < end && Number.isSafeInteger(end))) return;
    if (!isPrivate) {
      this.#gfns.delete(start, end);
      return;
    }
    this.#gfns.set(start, end, true);
    const { pageSize } = this.#owner.kernel;
    this.#owner.detachViews(start * pageSize, (end - start) * pageSize);
  }

  #hide(number: number): void {
    this.#owner.slots.get(number)?.gone();
    this.#shown.delete(number);
  }

  /** Leaves a slot out whose memory is gone already: an entry that says so is on its way. */
  #show(number: number, change: SlotChange): void {
    const host = change.hostMemory ? this.#memory(change.hostMemory) : null;
    const file = change.guestMemfd ? this.#memory(change.guestMemfd) : null;
    if (host === undefined || file === undefined) return;
    const placement = {
      address: change.address,
      size: change.size,
      hostMemory: HostMemory.is(host) ? host : null,
      hostOffset: change.hostOffset,
      guestMemfd: GuestMemfd.is(file) ? file : null,
      guestMemfdOffset: change.guestMemfdOffset,
      readonly: (change.flags & SLOT_READONLY) !== 0,
      logDirtyPages: (change.flags & SLOT_LOGS) !== 0,
    };
    new Memslot(internal, this.#owner, number, placement, false);
    this.#shown.set(number, change);
  }

  #memory(share: number): HostMemory | GuestMemfd | undefined {
    const open = this.#memories.get(share);
    if (open && !open.closed) return open;
    const change = this.#named.get(share);
    const { kernel, vm } = this.#owner;
    if (change?.kind === 'host-memory') {
      const mapping = kernel.takeMapping(share);
      if (mapping < 0) return undefined;
      const { size, alignment, memory: kind } = change;
      return this.#opened(share, new HostMemory(internal, vm.kvm, kernel, { kind, size, mapping, fd: -1, alignment }));
    }
    if (change?.kind === 'guest-memfd') {
      const fd = kernel.takeFile(share, 'gmem');
      if (fd < 0) return undefined;
      const { size, flags } = change;
      return this.#opened(share, new GuestMemfd(internal, vm, kernel, { fd, size, flags: BigInt(flags) }));
    }
    return undefined;
  }

  #opened<M extends HostMemory | GuestMemfd>(share: number, memory: M): M {
    this.#memories.set(share, memory);
    return memory;
  }

  #closeUnused(): void {
    for (const [share, memory] of this.#memories) {
      if (memory.backing.slots.size > 0) continue;
      this.#memories.delete(share);
      (memory as Resource).close();
    }
  }
}

function isSame(a: SlotChange, b: SlotChange | undefined): boolean {
  return b !== undefined && (Object.keys(a) as (keyof SlotChange)[]).every((key) => a[key] === b[key]);
}
