import t from 'tap';
import type { Proposal } from '../../lib/model_options.ts';
import { ERRNO, KVM_CAP, KVM_EXIT, MADV_DONTNEED } from '../../lib/uapi.ts';
import { SET_MEMORY_ATTRIBUTES2_PRESERVE } from '../../lib/uapi_proposed.ts';
import type { Guest } from '../conformance/guest.ts';
import { describe } from '../conformance/scenario.ts';
import { SW_PROTECTED, World } from './world.ts';

// What a guest and its VMM say to each other about pages that change sides in place.

const IN_PLACE: readonly Proposal[] = ['in-place-conversion'];
const MAP_GPA_RANGE = 12n;
const [ENCRYPTED, DECRYPTED] = [0x10n, 0n];
/** Guest page number of the file's first page. */
const FIRST = 16;

/** A VM whose guest asks for conversions by hypercall, and the VMM that answers. */
class Place {
  readonly w: World;
  readonly file: number;
  readonly mapping: number;
  readonly guest: Guest;

  constructor(w: World) {
    this.w = w;
    const vm = w.vm(SW_PROTECTED);
    w.enable(vm, KVM_CAP.EXIT_HYPERCALL, 1 << Number(MAP_GPA_RANGE));
    this.file = w.shared(vm, 8);
    this.mapping = w.map(this.file, { pages: 8 });
    w.bind(vm, { at: FIRST, pages: 8, file: this.file });
    this.guest = w.guest(vm);
  }

  /** The guest asks; the VMM does what `answer` does; the guest goes on with its result in a register. */
  ask(page: number, attributes: bigint, answer: () => number): unknown {
    const exit = this.guest.hypercall(MAP_GPA_RANGE, BigInt((FIRST + page) * this.w.P), 1n, attributes);
    if (this.guest.exitReason !== KVM_EXIT.HYPERCALL) return exit;
    this.guest.reply(BigInt(answer()));
    return this.guest.again();
  }

  convert(page: number, to: 'private' | 'shared'): number {
    return this.w.convert(this.file, page, 1, to) === 0 ? 0 : -ERRNO.EAGAIN;
  }
}

t.test('seed 2.1: a page has one holder, and the second taker is refused', async (t) => {
  const { w, file, mapping } = new Place(new World(t, IN_PLACE));
  w.put(mapping, 0, 1);
  t.equal(w.convert(file, 0, 1, 'private'), 'EAGAIN at 0', 'the host has it');
  t.equal(w.convert(file, 1, 1, 'private'), 0);
  t.equal(describe(w.get(mapping, 1)), 'EFAULT', 'the guest has it');
  t.equal(describe(w.kernel.pinPages(file, w.P, w.P) as number), 'EFAULT');
});

t.test('seed 2.2: share: the guest asks by hypercall, the VMM converts, and the host maps', async (t) => {
  const place = new Place(new World(t, IN_PLACE));
  const { w, guest, mapping } = place;
  place.convert(2, 'private');
  guest.put(FIRST + 2, 42);
  t.equal(describe(w.get(mapping, 2)), 'EFAULT');
  t.equal(
    place.ask(2, DECRYPTED, () => place.convert(2, 'shared')),
    0n,
  );
  t.equal(w.get(mapping, 2), 42);
});

t.test('seed 2.3: unshare: the host lets go, the page is taken, and the guest is told and goes on', async (t) => {
  const place = new Place(new World(t, IN_PLACE));
  const { w, guest, mapping } = place;
  w.put(mapping, 3, 7);
  const answer = () => {
    w.advise(mapping, 3, 1, MADV_DONTNEED);
    return place.convert(3, 'private');
  };
  t.equal(place.ask(3, ENCRYPTED, answer), 0n);
  t.equal(guest.get(FIRST + 3), 7);
  t.equal(describe(w.get(mapping, 3)), 'EFAULT');
});

t.test('seed 2.4: unshare while the host still maps the page fails for the guest, which goes on', async (t) => {
  const place = new Place(new World(t, IN_PLACE));
  const { w, guest, mapping } = place;
  w.put(mapping, 3, 7);
  t.equal(
    place.ask(3, ENCRYPTED, () => place.convert(3, 'private')),
    BigInt(-ERRNO.EAGAIN),
  );
  t.same([guest.get(FIRST + 3), w.get(mapping, 3)], [7, 7], 'it is still shared');
});

t.test(
  'seed 2.5: the host puts a payload into the file before the first run, and gives it to the guest as it is',
  async (t) => {
    const { w, file, guest, mapping } = new Place(new World(t, IN_PLACE));
    const payload = Uint8Array.from({ length: 2 * w.P }, (_, at) => at % 251);
    t.equal(w.kernel.poke(mapping, 0, payload), payload.length);
    w.munmap(mapping);
    t.equal(w.convert(file, 0, 8, 'private', SET_MEMORY_ATTRIBUTES2_PRESERVE), 0);
    const at = w.P + 7;
    t.equal(guest.get(FIRST + 1, 7), payload[at]);
    t.same(w.privatePages(file), [[0, 8]]);
  },
);
