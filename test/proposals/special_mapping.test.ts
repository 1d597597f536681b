import t from 'tap';
import type { Proposal } from '../../lib/model_options.ts';
import { MAP_SHARED, MAP_SHARED_VALIDATE } from '../../lib/uapi.ts';
import { MAP_GUEST_SHARED } from '../../lib/uapi_proposed.ts';
import { describe, INIT_SHARED, MMAP } from '../conformance/scenario.ts';
import { onLinux, SW_PROTECTED, World } from './world.ts';

// A mapping of a guest_memfd that gives way to conversions.

const SPECIAL: readonly Proposal[] = ['in-place-conversion', 'special-mapping'];
const FLAGS = MAP_SHARED_VALIDATE | MAP_GUEST_SHARED;

t.test(
  'seed 2.8: access works exactly while the page is shared, with no call of the host for a transition',
  async (t) => {
    const w = new World(t, SPECIAL);
    const file = w.shared(w.vm(SW_PROTECTED), 4);
    const mapping = w.map(file, { pages: 4, flags: FLAGS });
    for (let round = 1; round <= 3; round++) {
      t.equal(w.put(mapping, 1, round), 1);
      t.equal(w.convert(file, 0, 2, 'private'), 0, 'it holds nothing that it touched');
      t.equal(describe(w.get(mapping, 1)), 'EFAULT');
      t.equal(w.get(mapping, 2), 0);
      t.equal(w.convert(file, 0, 2, 'shared'), 0);
      t.equal(w.get(mapping, 1), round, 'and it is the same mapping as before');
    }
  },
);

t.test('seed 2.8: a window on it is detached from pages that become private', async (t) => {
  const w = new World(t, SPECIAL);
  const file = w.shared(w.vm(SW_PROTECTED), 4);
  const mapping = w.map(file, { pages: 4, flags: FLAGS });
  const window = w.kernel.window(mapping, 0, w.P);
  window[0] = 7;
  t.equal(w.convert(file, 1, 1, 'private'), 0);
  t.equal(window.length, w.P);
  t.equal(w.convert(file, 0, 1, 'private'), 0);
  t.equal(window.length, 0);
  t.equal(w.convert(file, 0, 1, 'shared'), 0);
  t.equal(w.kernel.window(mapping, 0, w.P)[0], 7);
});

t.test('seed 2.8: pins and other mappings are in the way as ever', async (t) => {
  const w = new World(t, SPECIAL);
  const file = w.shared(w.vm(SW_PROTECTED), 4);
  const special = w.map(file, { pages: 4, flags: FLAGS });
  w.put(special, 0, 1);
  const release = w.pin(file, 0, 1);
  t.equal(w.convert(file, 0, 1, 'private'), 'EAGAIN at 0');
  release();
  const ordinary = w.map(file, { pages: 4 });
  w.get(ordinary, 0);
  w.kernel.window(special, 0, w.P);
  t.equal(w.convert(file, 0, 1, 'private'), 'EAGAIN at 0');
  w.munmap(ordinary);
  t.equal(w.convert(file, 0, 1, 'private'), 0);
});

t.test('it is asked for with MAP_SHARED_VALIDATE, so that a kernel without it says so', async (t) => {
  const w = new World(t, SPECIAL);
  const vm = w.vm(SW_PROTECTED);
  const file = w.shared(vm, 4);
  const ordinary = w.map(file, { pages: 4, flags: MAP_SHARED | MAP_GUEST_SHARED });
  w.get(ordinary, 0);
  t.equal(w.convert(file, 0, 4, 'private'), 'EAGAIN at 0', 'MAP_SHARED ignores flags it does not know');
  t.equal(describe(w.mmap(w.memfd(1), { pages: 1, flags: FLAGS })), 'EOPNOTSUPP', 'no other file has it');
  t.equal(describe(w.mmap(w.gmem(vm, 1), { pages: 1, flags: FLAGS })), 'ENODEV', 'nor one that cannot be mapped');
  const off = new World(t, ['in-place-conversion']);
  t.equal(describe(off.mmap(off.shared(off.vm(SW_PROTECTED), 1), { pages: 1, flags: FLAGS })), 'EOPNOTSUPP');
  onLinux(t, (s) => {
    if (s.cap(s.vm(), 'GUEST_MEMFD_FLAGS') !== 3) return;
    t.equal(describe(s.mmap(s.gmem(s.vm(), 1, MMAP | INIT_SHARED), { pages: 1, flags: FLAGS })), 'EOPNOTSUPP');
  });
});
