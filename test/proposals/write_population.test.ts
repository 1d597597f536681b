import t from 'tap';
import type { Proposal } from '../../lib/model_options.ts';
import { SEEK_CUR, SEEK_END, SEEK_SET } from '../../lib/uapi.ts';
import { GUEST_MEMFD_FLAG_HUGETLB, GUEST_MEMFD_FLAG_WRITE } from '../../lib/uapi_proposed.ts';
import { describe, INIT_SHARED, MMAP } from '../conformance/scenario.ts';
import { onLinux, SW_PROTECTED, World } from './world.ts';

// read(2), write(2) and their relatives on a guest_memfd.

const WRITE: readonly Proposal[] = ['in-place-conversion', 'write-population'];
const BOTH = MMAP | INIT_SHARED;

/** A file of pages that are private and not there. */
function secret(w: World, pages: number, vm = w.vm(SW_PROTECTED)): number {
  return w.gmem(vm, pages, MMAP | GUEST_MEMFD_FLAG_WRITE);
}

function shared(w: World, pages: number, vm = w.vm(SW_PROTECTED)): number {
  return w.gmem(vm, pages, BOTH | GUEST_MEMFD_FLAG_WRITE);
}

const filled = (length: number, byte: number) => new Uint8Array(length).fill(byte);

t.test('seed 2.7: whole pages that are not there yet are populated by write', async (t) => {
  const w = new World(t, WRITE);
  const { kernel, P } = w;
  const vm = w.vm(SW_PROTECTED);
  const file = secret(w, 8, vm);
  t.equal(kernel.write(file, filled(2 * P, 5)), 2 * P);
  t.equal(kernel.lseek(file, 0, SEEK_CUR), 2 * P, 'the position moves on');
  t.equal(kernel.write(file, filled(P, 6)), P);
  t.equal(kernel.pwrite(file, filled(P, 7), 6 * P), P);
  t.same([w.cached(file), w.privatePages(file)], [4, [[0, 8]]], 'they are there, and still private');
  w.bind(vm, { at: 16, pages: 8, file });
  const guest = w.guest(vm);
  t.same(
    [16, 17, 18, 19, 22].map((page) => guest.get(page)),
    [5, 5, 6, 0, 7],
  );
});

t.test('seed 2.7: parts of pages, pages that are there and what is past the end are refused', async (t) => {
  const w = new World(t, WRITE);
  const { kernel, P } = w;
  const file = secret(w, 4);
  const write = (offset: number, length: number) => describe(kernel.pwrite(file, filled(length, 1), offset));
  t.equal(write(1, P), 'EINVAL');
  t.match(kernel.explain(), /populated as a whole/);
  t.equal(write(0, P - 1), 'EINVAL');
  t.equal(write(3 * P, 2 * P), 'EINVAL', 'past the end');
  t.equal(w.cached(file), 0);
  t.equal(write(0, P + P / 2), String(P), 'as far as whole pages go');
  t.equal(write(0, P), 'EFAULT', 'it is there: the guest may have been at it');
  t.match(kernel.explain(), /offset 0x0 is private/);
  kernel.pwrite(file, filled(P, 1), 2 * P);
  t.equal(write(P, 2 * P), String(P), 'up to one that is there');
  t.equal(write(0, 0), '0');
});

t.test('seed 2.6: shared pages can be read and written at any alignment; a private one is EFAULT', async (t) => {
  const w = new World(t, WRITE);
  const { kernel, P } = w;
  const file = shared(w, 8);
  t.equal(kernel.pwrite(file, Uint8Array.of(1, 2, 3), P - 1), 3);
  const buffer = new Uint8Array(4);
  t.equal(kernel.pread(file, buffer, P - 2), 4);
  t.same([...buffer], [0, 1, 2, 3]);
  t.equal(w.convert(file, 4, 2, 'private'), 0, 'such a transfer leaves no page in use');
  t.equal(w.convert(file, 0, 2, 'private'), 0);
  t.equal(describe(kernel.pread(file, buffer, P - 2)), 'EFAULT');
  t.match(kernel.explain(), /offset 0x0 is private/);
  t.equal(describe(kernel.pwrite(file, buffer, P)), 'EFAULT');
  t.equal(w.convert(file, 0, 2, 'shared'), 0);
  t.equal(kernel.pread(file, buffer, P - 2), 4);
  t.same([...buffer], [0, 1, 2, 3]);
});

t.test('seed 2.6: a range that crosses into private pages is served up to them', async (t) => {
  const w = new World(t, WRITE);
  const { kernel, P } = w;
  const file = shared(w, 8);
  const mapping = w.map(file, { pages: 8 });
  w.convert(file, 4, 2, 'private');
  t.equal(kernel.pwrite(file, filled(2 * P, 3), 4 * P), 2 * P);
  const long = new Uint8Array(8 * P);
  t.equal(kernel.pread(file, long, P / 2), 3.5 * P);
  t.equal(kernel.pwrite(file, filled(4 * P, 9), 2 * P + 1), 2 * P - 1);
  t.equal(w.get(mapping, 3), 9);
  t.equal(kernel.pread(file, long, 6 * P), 2 * P, 'and at the end of the file there is no more');
  t.equal(kernel.pread(file, long, 8 * P), 0);
  t.equal(kernel.lseek(file, -P, SEEK_END), 7 * P);
  t.equal(kernel.read(file, long), P);
  t.equal(kernel.read(file, long), 0);
  t.equal(kernel.lseek(file, 4 * P, SEEK_SET), 4 * P);
  t.equal(describe(kernel.read(file, long)), 'EFAULT');
  t.equal(describe(kernel.lseek(file, -1, SEEK_SET)), 'EINVAL');
  w.put(mapping, 7, 1);
  t.equal(
    describe(kernel.write(file, kernel.window(mapping, 4 * P, 16))),
    'EFAULT',
    'nor from a buffer that is private',
  );
});

t.test('pages that were only allocated can still be populated, also one by one in a large folio', async (t) => {
  const w = new World(t, [...WRITE, 'large-folios']);
  const { kernel, P } = w;
  const file = secret(w, 4);
  w.fallocate(file, 1, 0, 4);
  t.equal(kernel.write(file, filled(P, 1)), P);
  const vm = w.vm(SW_PROTECTED);
  const large = w.gmem(vm, 512, MMAP | GUEST_MEMFD_FLAG_WRITE | GUEST_MEMFD_FLAG_HUGETLB);
  t.equal(kernel.write(large, filled(P, 1)), P);
  t.equal(w.cached(large), 512);
  t.equal(kernel.write(large, filled(P, 2)), P);
  t.equal(describe(kernel.pwrite(large, filled(P, 2), P)), 'EFAULT');
});

t.test('only files that were created for it, and only with the proposal', async (t) => {
  const w = new World(t, WRITE);
  const plain = w.gmem(w.vm(), 1, BOTH);
  t.same([w.kernel.read(plain, filled(1, 0)), w.kernel.pread(plain, filled(1, 0), 0)].map(describe), [
    'EINVAL',
    'ESPIPE',
  ]);
  t.equal(describe(w.kernel.lseek(plain, 0, SEEK_SET)), 'ESPIPE');
  const off = new World(t, ['in-place-conversion']);
  t.equal(describe(off.createGmem(off.vm(), off.P, BOTH | GUEST_MEMFD_FLAG_WRITE)), 'EINVAL');
  onLinux(t, (s) => t.equal(describe(s.createGmem(s.vm(), s.P, BOTH | GUEST_MEMFD_FLAG_WRITE)), 'EINVAL'));
});
