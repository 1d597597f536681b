import type { MemslotState, VmFile } from '../state.ts';
import type { GuestBus } from './executor.ts';
import { SoftwareGuestMemfd } from './software_files.ts';

/** Where things are in the page of the ring: 32-bit counters, which wrap, then entries of 64 bits. Little-endian. */
export const GRANT_RING = {
  /** Written by the guest: entries it has made so far. */
  head: 0,
  /** Written by the host: entries it has taken, or missed, so far. */
  tail: 4,
  /** Written by the host: entries it missed because newer ones were put over them. */
  lost: 8,
  entries: 64,
} as const;

/** The low bits of an entry, whose others are the address of a page. */
export const GRANT = {
  /** The page goes back to the guest; without it the guest grants the page to the host. */
  revoke: 1,
  /** Set by the host: it is done. */
  done: 2,
  /** Set by the host: the page is not to be granted, or is in use and was not revoked. */
  refused: 4,
} as const;

/** What came of the entries so far. */
export interface GrantCounts {
  granted: number;
  revoked: number;
  refused: number;
  lost: number;
  /** Exits at which page tables of the host had to be flushed, because a page was revoked. */
  flushes: number;
}

/**
 * A guest's grants of pages to the host, as an IOMMU has them: a bounded ring in the guest's memory that the host looks at when the guest exits
 * anyway. Whatever the guest writes there, an exit takes no more entries than the ring has.
 */
export class GrantRing {
  readonly counts: GrantCounts = { granted: 0, revoked: 0, refused: 0, lost: 0, flushes: 0 };
  readonly #vm: VmFile;
  readonly #address: number;
  readonly #entries: number;
  #tail = 0;

  /** @param address Guest physical, of the page. */
  constructor(vm: VmFile, address: number, entries: number) {
    this.#vm = vm;
    this.#address = address;
    this.#entries = entries;
  }

  /** Takes what the guest has written since the last exit. A page that cannot be reached holds nothing. */
  collect(bus: GuestBus): void {
    const head = this.#read(bus, GRANT_RING.head, 4)?.getUint32(0, true);
    if (head === undefined || head === this.#tail) return;
    const made = (head - this.#tail) >>> 0;
    const lost = Math.max(0, made - this.#entries);
    let flushed = false;
    for (let index = (this.#tail + lost) >>> 0; index !== head; index = (index + 1) >>> 0) {
      const at = GRANT_RING.entries + 8 * (index % this.#entries);
      const entry = this.#read(bus, at, 8)?.getBigUint64(0, true);
      if (entry === undefined) break;
      const revokes = (Number(entry & 7n) & GRANT.revoke) !== 0;
      const done = this.#carryOut(Number(entry >> 3n) * 8, revokes);
      flushed ||= revokes;
      this.counts[!done ? 'refused' : revokes ? 'revoked' : 'granted']++;
      this.#write(bus, at, 8, (view) => view.setBigUint64(0, entry | BigInt(done ? GRANT.done : GRANT.refused), true));
    }
    this.#tail = head;
    this.counts.lost += lost;
    if (flushed) this.counts.flushes++;
    this.#write(bus, GRANT_RING.tail, 8, (view) => {
      view.setUint32(0, head, true);
      view.setUint32(4, this.counts.lost, true);
    });
  }

  #carryOut(address: number, revokes: boolean): boolean {
    const { pageSize } = this.#vm.machine;
    const gfn = Math.floor(address / pageSize);
    const slot: MemslotState | undefined = this.#vm.slotOverlapping(0, gfn, gfn + 1);
    const file = slot?.guestMemfd;
    if (!slot?.gmemOnly || !(file instanceof SoftwareGuestMemfd)) return false;
    const page = slot.pgoff + gfn - slot.baseGfn;
    if ((file.privatePages.get(page) === true) === revokes) return true;
    // The host asked for no mapping to be kept: its page tables are flushed, and only who really holds the page is in the way.
    if (revokes) file.references.unmap(page, page + 1);
    if ((revokes && file.obstacle(page, page + 1)) || file.splitProblem(page, page + 1)) return false;
    file.applyConversion(page, page + 1, revokes);
    return true;
  }

  #read(bus: GuestBus, offset: number, size: number): DataView | undefined {
    const bytes = new Uint8Array(size);
    return bus.read(this.#address + offset, bytes).kind === 'ok' ? new DataView(bytes.buffer) : undefined;
  }

  #write(bus: GuestBus, offset: number, size: number, fill: (view: DataView) => void): void {
    const bytes = new Uint8Array(size);
    fill(new DataView(bytes.buffer));
    bus.write(this.#address + offset, bytes);
  }
}
