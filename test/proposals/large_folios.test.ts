import t from 'tap';
import type { ModelOptions, Proposal } from '../../lib/model_options.ts';
import { GiB, KiB, MADV_DONTNEED, MADV_REMOVE, MiB } from '../../lib/uapi.ts';
import { GUEST_MEMFD_FLAG_HUGETLB, GUEST_MEMFD_HUGE_SHIFT } from '../../lib/uapi_proposed.ts';
import { describe, INIT_SHARED, MMAP } from '../conformance/scenario.ts';
import { foliosAgainstOracle } from './folio_oracle.ts';
import { onLinux, SW_PROTECTED, World } from './world.ts';

// Folios of 2 MiB and 1 GiB in a guest_memfd.

const LARGE: readonly Proposal[] = ['in-place-conversion', 'large-folios'];
const [ALLOCATE, PUNCH] = [1, 3];
/** Pages of 4 KiB in a folio. */
const [IN_2M, IN_1G] = [512, 512 * 512];
const HUGE_2M = BigInt(GUEST_MEMFD_FLAG_HUGETLB) | (21n << GUEST_MEMFD_HUGE_SHIFT);
const HUGE_1G = BigInt(GUEST_MEMFD_FLAG_HUGETLB) | (30n << GUEST_MEMFD_HUGE_SHIFT);
const SHARED = BigInt(MMAP | INIT_SHARED);

/** A file with folios that host and guest share. */
function shared(w: World, bytes: number, huge: bigint): number {
  const file = w.createGmem(w.vm(SW_PROTECTED), bytes, SHARED | huge);
  if (file < 0) throw new Error(`setup: ${describe(file)}: ${w.kernel.explain()}`);
  return file;
}

/** Folios of 4 KiB, 2 MiB and, where there can be any, 1 GiB. */
function folios(w: World, file: number): number[] {
  const counts = w.kernel.folioStatistics(file);
  return typeof counts === 'number' ? [counts] : [...counts.values()];
}

t.test('a file is created with a size of folios, and is a multiple of it', async (t) => {
  const w = new World(t, LARGE);
  const vm = w.vm(SW_PROTECTED);
  const create = (size: number, flags: bigint) => describe(w.createGmem(vm, size, flags)).replace(/^\d+$/, 'fd');
  t.equal(create(2 * MiB, HUGE_2M), 'fd');
  t.equal(create(GiB, HUGE_1G), 'fd');
  t.equal(create(2 * MiB, BigInt(GUEST_MEMFD_FLAG_HUGETLB)), 'fd', '2 MiB unless told');
  t.equal(create(3 * MiB, HUGE_2M), 'EINVAL');
  t.match(w.kernel.explain(), /3 MiB is not a multiple of 2 MiB/);
  t.equal(create(2 * MiB, HUGE_1G), 'EINVAL');
  t.equal(create(GiB, BigInt(GUEST_MEMFD_FLAG_HUGETLB) | (25n << GUEST_MEMFD_HUGE_SHIFT)), 'EINVAL', 'no such size');
  t.equal(create(GiB, 21n << GUEST_MEMFD_HUGE_SHIFT), 'EINVAL', 'a size without the flag');
  const off = new World(t, ['in-place-conversion']);
  t.equal(describe(off.createGmem(off.vm(SW_PROTECTED), GiB, HUGE_1G)), 'EINVAL');
});

t.test('pages come as whole folios, where a whole one fits', async (t) => {
  const w = new World(t, LARGE);
  const file = shared(w, 2 * GiB, HUGE_1G);
  t.same(folios(w, file), [0, 0, 0]);
  const mapping = w.map(file, { pages: 2 * IN_1G });
  t.equal(w.put(mapping, 7, 1), 1);
  t.same(folios(w, file), [0, 0, 1]);
  t.equal(w.cached(file), IN_1G);
  t.equal(w.convert(file, IN_1G + IN_2M, 1, 'private'), 0);
  t.equal(w.fallocate(file, ALLOCATE, IN_1G, IN_1G), 0);
  t.same(folios(w, file), [IN_2M, 511, 1], 'around a page that is different: 2 MiB, and single pages');
  const small = w.shared(w.vm(SW_PROTECTED), 4);
  w.fallocate(small, ALLOCATE, 0, 4);
  t.same([...(w.kernel.folioStatistics(small) as Map<number, number>)], [[4 * KiB, 4]]);
  t.equal(describe(w.kernel.folioStatistics(w.memfd(1)) as number), 'ENOTTY');
});

t.test('seed 0.4: a punch that would have to split a folio may fail, and then nothing has changed', async (t) => {
  const w = new World(t, LARGE);
  const file = shared(w, 4 * MiB, HUGE_2M);
  const mapping = w.map(file, { pages: 2 * IN_2M });
  for (const page of [0, 1, 600]) w.put(mapping, page, 7);
  t.equal(w.kernel.setSplitFailure(file, true), 0);
  for (const punch of [
    () => w.fallocate(file, PUNCH, 0, 1),
    () => w.fallocate(file, PUNCH, 1, 2 * IN_2M - 1),
    () => w.fallocate(file, PUNCH, 0, IN_2M + 1),
    () => w.advise(mapping, 1, 1, MADV_REMOVE),
  ]) {
    t.equal(describe(punch()), 'ENOMEM');
    t.same(folios(w, file), [0, 2]);
    t.same(
      [0, 1, 600].map((page) => w.get(mapping, page)),
      [7, 7, 7],
    );
  }
  t.equal(w.fallocate(file, PUNCH, 0, IN_2M), 0, 'a whole folio needs no split');
  t.same(folios(w, file), [0, 1]);
  w.kernel.setSplitFailure(file, false);
  t.equal(w.fallocate(file, PUNCH, IN_2M, 2), 0);
  t.same(folios(w, file), [IN_2M - 2, 0]);
  t.same(
    [0, 1, 600].map((page) => w.get(mapping, page)),
    [0, 0, 7],
  );
});

t.test('a punch of a part of a pinned folio waits for the pin', async (t) => {
  const w = new World(t, LARGE);
  const file = shared(w, 2 * MiB, HUGE_2M);
  const release = w.pin(file, 500, 1);
  t.equal(describe(w.fallocate(file, PUNCH, 0, 1)), 'EAGAIN');
  t.match(w.kernel.explain(), /large folio that is pinned/);
  release();
  t.equal(w.fallocate(file, PUNCH, 0, 1), 0);
});

t.test('seed 1.9: a partial conversion splits, no further than it must; a uniform range merges again', async (t) => {
  const w = new World(t, LARGE);
  const file = shared(w, 2 * GiB, HUGE_1G);
  w.fallocate(file, ALLOCATE, 0, 2 * IN_1G);
  t.same(folios(w, file), [0, 0, 2]);
  t.equal(w.convert(file, IN_2M + 3, 2, 'private'), 0);
  t.same(folios(w, file), [IN_2M, 511, 1]);
  t.equal(w.convert(file, IN_2M, IN_2M, 'private'), 0);
  t.same(folios(w, file), [0, 512, 1], 'all of 2 MiB private is a folio again');
  t.equal(w.convert(file, IN_2M, IN_2M, 'shared'), 0);
  t.same(folios(w, file), [0, 0, 2]);
  t.equal(w.convert(file, 0, 2 * IN_1G, 'private'), 0, 'whole folios need no split');
  t.same(folios(w, file), [0, 0, 2]);
});

t.test('seed 1.9: a pin anywhere in a folio blocks the whole folio', async (t) => {
  const w = new World(t, LARGE);
  const file = shared(w, 6 * MiB, HUGE_2M);
  w.fallocate(file, ALLOCATE, 0, 3 * IN_2M);
  const release = w.pin(file, IN_2M + 77, 1);
  t.equal(w.convert(file, 0, 3 * IN_2M, 'private'), `EAGAIN at ${IN_2M}`);
  t.match(w.kernel.explain(), /in a large folio, of which a page is pinned/);
  t.equal(w.convert(file, IN_2M + 200, 1, 'private'), `EAGAIN at ${IN_2M + 200}`, 'within what was asked for');
  t.same(w.privatePages(file), []);
  t.equal(w.convert(file, 0, IN_2M, 'private'), 0, 'its neighbours are free to go');
  release();
  t.equal(w.convert(file, IN_2M + 200, 1, 'private'), 0);
  const mapping = w.map(file, { pages: 3 * IN_2M });
  w.get(mapping, 2 * IN_2M + 1);
  t.equal(w.convert(file, 2 * IN_2M + 9, 1, 'private'), `EAGAIN at ${2 * IN_2M + 9}`, 'and so does a mapped page');
  w.advise(mapping, 2 * IN_2M, IN_2M, MADV_DONTNEED);
  t.equal(w.convert(file, 2 * IN_2M + 9, 1, 'private'), 0);
});

t.test('seed 1.9: a pinned page keeps its folio from being merged', async (t) => {
  const w = new World(t, LARGE);
  const file = shared(w, 4 * MiB, HUGE_2M);
  w.fallocate(file, ALLOCATE, 0, 2 * IN_2M);
  w.convert(file, 0, 1, 'private');
  const release = w.pin(file, 100, 1);
  t.equal(w.convert(file, 0, 1, 'shared'), 0);
  t.same(folios(w, file), [IN_2M, 1]);
  release();
  t.equal(w.convert(file, 0, 1, 'private'), 0);
  t.equal(w.convert(file, 0, 1, 'shared'), 0);
  t.same(folios(w, file), [0, 2]);
});

t.test('seed 1.9: a conversion whose split fails changes nothing, in either direction', async (t) => {
  const w = new World(t, LARGE);
  const file = shared(w, 4 * MiB, HUGE_2M);
  w.fallocate(file, ALLOCATE, 0, 2 * IN_2M);
  w.convert(file, IN_2M, IN_2M, 'private');
  w.kernel.setSplitFailure(file, true);
  t.equal(w.convert(file, 3, 1, 'private'), 'ENOMEM');
  t.equal(w.convert(file, 3, 2 * IN_2M - 3, 'private'), 'ENOMEM');
  t.equal(w.convert(file, IN_2M + 3, 1, 'shared'), 'ENOMEM');
  t.match(w.kernel.explain(), /no memory is left to split it/);
  t.same(w.privatePages(file), [[IN_2M, 2 * IN_2M]]);
  t.same(folios(w, file), [0, 2]);
  t.equal(w.convert(file, IN_2M + 3, 1, 'private'), 0, 'a no-op splits nothing');
  t.equal(w.convert(file, 0, 2 * IN_2M, 'shared'), 0);
});

t.test('sizes of folios are the same with larger pages', async (t) => {
  const model: ModelOptions = { arch: 'aarch64', pageSize: 64 * KiB };
  const w = new World(t, ['large-folios'], model);
  const file = w.createGmem(w.vm(), 2 * GiB, SHARED | HUGE_1G);
  w.fallocate(file, ALLOCATE, 0, 1);
  t.same(
    [...(w.kernel.folioStatistics(file) as Map<number, number>)],
    [
      [64 * KiB, 0],
      [2 * MiB, 0],
      [GiB, 1],
    ],
  );
  w.fallocate(file, PUNCH, 0, 1);
  t.same(folios(w, file), [31, 511, 0]);
});

t.test(
  'seed 1.9: a block may be mapped as one while its pages are alike: of the attribute, and of the file',
  async (t) => {
    const w = new World(t, LARGE);
    const vm = w.vm(SW_PROTECTED);
    const at = (address: number) => w.kernel.largestMapping(vm, address);
    w.slot(vm, { slot: 1, gpa: GiB, size: 2 * GiB, hva: 4 * GiB });
    w.slot(vm, { slot: 2, gpa: 4 * GiB, size: 4 * MiB, hva: 8 * GiB + 4 * KiB });
    t.same([at(GiB), at(2 * GiB), at(3 * GiB - 1)], [GiB, GiB, GiB]);
    t.equal(at(4 * GiB), 4 * KiB, 'host memory out of step');
    t.equal(describe(at(0)), 'ENOENT');
    w.setAttributes(vm, GiB + 2 * MiB, 4 * KiB);
    t.same([at(GiB), at(GiB + 2 * MiB), at(2 * GiB)], [2 * MiB, 4 * KiB, GiB]);
    w.setAttributes(vm, GiB + 2 * MiB, 2 * MiB);
    t.equal(at(GiB + 2 * MiB), 4 * KiB, 'private, and no file there');
    w.setAttributes(vm, GiB + 2 * MiB, 2 * MiB, 0);
    t.equal(at(GiB), GiB);

    const file = w.createGmem(vm, GiB, SHARED | HUGE_1G);
    w.bind(vm, { slot: 3, gpa: 8 * GiB, size: GiB, file });
    t.equal(at(8 * GiB), 4 * KiB, 'no pages yet');
    w.fallocate(file, ALLOCATE, 0, IN_1G);
    t.equal(at(8 * GiB), GiB);
    w.convert(file, IN_2M, 1, 'private');
    t.same([at(8 * GiB), at(8 * GiB + 2 * MiB)], [2 * MiB, 4 * KiB]);
    w.convert(file, 0, IN_1G, 'private');
    t.equal(at(8 * GiB + 2 * MiB), GiB);
  },
);

t.test('random allocations, conversions and punches come to what a list of pages says', async () =>
  foliosAgainstOracle(),
);

t.test('folios cost by ranges, not by their number', async (t) => {
  const w = new World(t, LARGE);
  const file = shared(w, 2 ** 44, HUGE_2M);
  t.equal(w.fallocate(file, ALLOCATE, 0, 2 ** 32), 0);
  t.equal(w.convert(file, 1, 2 ** 32 - 2, 'private'), 0);
  t.same(folios(w, file), [2 * IN_2M, 2 ** 23 - 2]);
  t.equal(w.convert(file, 0, 2 ** 32, 'private'), 0);
  t.same(folios(w, file), [0, 2 ** 23]);
});

t.test('a running kernel refuses the flags, like the model without the proposal', async (t) => {
  onLinux(t, (s) => t.equal(describe(s.createGmem(s.vm(), GiB, SHARED | HUGE_1G)), 'EINVAL'));
});
