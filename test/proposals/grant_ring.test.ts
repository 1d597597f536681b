import t from 'tap';
import { softwareKernel } from '../../lib/kernel/index.ts';
import { GRANT, GRANT_RING } from '../../lib/kernel/software/grant_ring.ts';
import type { Proposal } from '../../lib/model_options.ts';
import { MAP_PRIVATE } from '../../lib/uapi.ts';
import { KVM_CAP_PROPOSED } from '../../lib/uapi_proposed.ts';
import type { Guest } from '../conformance/guest.ts';
import { describe, MMAP } from '../conformance/scenario.ts';
import { SW_PROTECTED, World } from './world.ts';

// A guest grants pages to the host in a ring of recent entries, which the host looks at when the guest exits anyway.

const RING: readonly Proposal[] = ['in-place-conversion', 'grant-ring'];
/** Guest page numbers: of the ring, and of the file's first page. */
const [RING_PAGE, FILE_PAGE] = [8, 16];
const ENTRIES = 4;

/** A guest with a ring, private memory in a file, and the host's mapping of it. */
class Place {
  readonly w: World;
  readonly vm: number;
  readonly file: number;
  readonly guest: Guest;
  readonly mapping: number;
  #head = 0;

  constructor(w: World, entries = ENTRIES) {
    this.w = w;
    this.vm = w.vm(SW_PROTECTED);
    this.file = w.gmem(this.vm, 16, MMAP);
    const ring = w.anonymous(1);
    w.slot(this.vm, { slot: 1, at: RING_PAGE, pages: 1, hva: w.kernel.addressOf(ring) });
    w.bind(this.vm, { slot: 2, at: FILE_PAGE, pages: 16, file: this.file });
    this.guest = w.guest(this.vm);
    this.mapping = w.map(this.file);
    const enabled = enable(w, this.vm, RING_PAGE * w.P, entries);
    if (enabled !== '0') throw new Error(`setup: ${enabled}: ${w.kernel.explain()}`);
  }

  /** The guest makes entries, and shows them to the host by one write. Pages of the file, or guest addresses where no page is there. */
  entries(pages: readonly number[], revoke = false): void {
    for (const page of pages) {
      const address = (FILE_PAGE + page) * this.w.P + (revoke ? GRANT.revoke : 0);
      const at = GRANT_RING.entries + 8 * (this.#head++ % ENTRIES);
      for (let byte = 0; byte < 8; byte++)
        this.guest.put(RING_PAGE, Math.floor(address / 2 ** (8 * byte)) % 256, at + byte);
    }
    this.guest.put(RING_PAGE, this.#head % 256, GRANT_RING.head);
  }

  /** What the guest reads of the ring. */
  word(at: number): number {
    return this.guest.get(RING_PAGE, at) as number;
  }

  counts(): unknown {
    return this.w.kernel.grantCounts(this.vm);
  }
}

function enable(w: World, vm: number, address: number, entries: number, flags = 0): string {
  const args = [address, entries, 0, 0];
  return describe(w.kernel.enableCap(vm, { cap: KVM_CAP_PROPOSED.GRANT_RING, flags, args }));
}

t.test('seed 2.9: what the guest grants is the host’s after the next exit', async (t) => {
  const place = new Place(new World(t, RING));
  const { w, file, guest, mapping } = place;
  t.equal(guest.put(FILE_PAGE + 3, 42), 0);
  t.equal(describe(w.get(mapping, 3)), 'EFAULT');
  place.entries([3, 5]);
  t.same([w.get(mapping, 3), w.get(mapping, 5)], [42, 0]);
  t.same(w.privatePages(file), [
    [0, 3],
    [4, 5],
    [6, 16],
  ]);
  t.equal(w.put(mapping, 3, 43), 1);
  t.equal(guest.get(FILE_PAGE + 3), 43);
  t.equal(place.word(GRANT_RING.tail), 2, 'the guest sees what was taken');
  t.equal(place.word(GRANT_RING.entries) & 7, GRANT.done);
});

t.test(
  'seed 2.9: a revoke flushes: the host’s page tables let go, and only what really holds the page is in the way',
  async (t) => {
    const place = new Place(new World(t, RING));
    const { w, file, guest, mapping } = place;
    place.entries([0, 1]);
    w.put(mapping, 0, 1);
    w.put(mapping, 1, 1);
    const release = w.pin(file, 1, 1);
    place.entries([0, 1], true);
    t.same(
      [0, 1].map((page) => describe(w.get(mapping, page))),
      ['EFAULT', '1'],
    );
    t.equal(place.word(GRANT_RING.entries + 16) & 7, GRANT.revoke | GRANT.done);
    t.equal(place.word(GRANT_RING.entries + 24) & 7, GRANT.revoke | GRANT.refused, 'the guest is told');
    t.match(place.counts(), { granted: 2, revoked: 1, refused: 1, flushes: 1, lost: 0 });
    release();
    place.entries([1], true);
    t.same(w.privatePages(file), [[0, 16]]);
    t.equal(guest.get(FILE_PAGE), 1, 'the guest has its bytes back');
  },
);

t.test(
  'seed 2.9: the ring is bounded: the host takes the most recent entries, and says how many it missed',
  async (t) => {
    const place = new Place(new World(t, RING));
    const { w, file } = place;
    place.entries([0, 1, 2, 3, 4, 5]);
    t.same(w.privatePages(file), [
      [0, 2],
      [6, 16],
    ]);
    t.equal(place.word(GRANT_RING.tail), 6);
    t.equal(place.word(GRANT_RING.lost), 2);
    t.match(place.counts(), { granted: ENTRIES, lost: 2, flushes: 0 });
  },
);

t.test('seed 2.9: whatever a guest writes there, an exit costs no more than the ring has entries', async (t) => {
  const place = new Place(new World(t, RING));
  const { w, guest } = place;
  for (const at of [3, 2, 1, 0]) guest.put(RING_PAGE, 255, GRANT_RING.head + at);
  const counts = place.counts() as { granted: number; refused: number; lost: number };
  t.ok(counts.granted + counts.refused <= 4 * ENTRIES);
  t.ok(counts.lost > 2 ** 31);
  place.entries([2 ** 38, -8]);
  t.match(place.counts(), { granted: 0 }, 'an address without such memory is refused');
  t.equal(w.put(place.mapping, 0, 1) < 0, true);
});

t.test('a ring is enabled once, for a VM that has something to grant', async (t) => {
  const w = new World(t, RING);
  const vm = w.vm(SW_PROTECTED);
  t.equal(w.kernel.checkExtension(vm, KVM_CAP_PROPOSED.GRANT_RING), 256);
  t.equal(describe(w.kernel.grantCounts(vm) as number), 'EINVAL');
  t.equal(enable(w, w.vm(0), 0, 4), 'EINVAL', 'nothing to grant');
  t.equal(enable(w, vm, 0, 4, 1), 'EINVAL', 'flags');
  t.equal(enable(w, vm, 1, 4), 'EINVAL', 'no page');
  t.equal(enable(w, vm, 0, 0), 'EINVAL', 'no entries');
  t.equal(enable(w, vm, 0, 6), 'EINVAL', 'no power of two');
  t.equal(enable(w, vm, 0, 512), 'EINVAL', 'more than fit in a page');
  t.equal(enable(w, vm, 2 ** 50, 4), 'EINVAL', 'beyond the VM');
  t.equal(enable(w, vm, 0, 256), '0');
  t.equal(enable(w, vm, 0, 256), 'EEXIST');
  const off = new World(t, ['in-place-conversion']);
  t.equal(off.kernel.checkExtension(off.vm(SW_PROTECTED), KVM_CAP_PROPOSED.GRANT_RING), 0);
  t.equal(enable(off, off.vm(SW_PROTECTED), 0, 4), 'EINVAL');
  t.throws(() => softwareKernel({ proposals: ['grant-ring'] }), { message: /needs 'in-place-conversion'/ });
});

t.test('a ring in a place where no memory is holds nothing', async (t) => {
  const w = new World(t, RING);
  const vm = w.vm(SW_PROTECTED);
  const guest = w.guest(vm);
  t.equal(enable(w, vm, 64 * w.P, 4), '0');
  const memory = w.map(w.memfd(1), { pages: 1, flags: MAP_PRIVATE });
  w.slot(vm, { slot: 1, at: 2, pages: 1, hva: w.kernel.addressOf(memory) });
  t.equal(guest.put(2, 1), 0);
  t.match(w.kernel.grantCounts(vm), { granted: 0, lost: 0 });
});
