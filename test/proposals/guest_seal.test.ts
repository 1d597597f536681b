import t from 'tap';
import type { Proposal } from '../../lib/model_options.ts';
import { F_ADD_SEALS, F_GET_SEALS, MADV_REMOVE, MAP_PRIVATE, MFD_ALLOW_SEALING, PROT_NONE } from '../../lib/uapi.ts';
import { F_SEAL_GUEST } from '../../lib/uapi_proposed.ts';
import { describe, INIT_SHARED, MMAP } from '../conformance/scenario.ts';
import { onLinux, SW_PROTECTED, World } from './world.ts';

// F_SEAL_GUEST: a memfd becomes memory that only a guest can reach, and its VM is told before pages go.

const SEAL: readonly Proposal[] = ['guest-seal'];
const [ALLOCATE, PUNCH] = [1, 3];

function seal(w: World, file: number, seals = F_SEAL_GUEST): string {
  return describe(w.kernel.fcntl(file, F_ADD_SEALS, seals));
}

/** A memfd of some pages that is sealed for a guest. */
function sealed(w: World, pages: number): number {
  const file = w.memfd(pages, MFD_ALLOW_SEALING);
  if (seal(w, file) !== '0') throw new Error(`setup: ${w.kernel.explain()}`);
  return file;
}

t.test('seed 0.1: a file can be sealed for a guest only while it has no pages and no mapping', async (t) => {
  const w = new World(t, SEAL);
  t.equal(seal(w, w.memfd(0)), 'EPERM', 'a file that takes no seals, whatever else is wrong with it');
  const file = w.memfd(4, MFD_ALLOW_SEALING);
  w.kernel.pwrite(file, Uint8Array.of(1), w.P);
  t.equal(seal(w, file), 'EBUSY');
  t.match(w.kernel.explain(), /has 1 pages already/);
  t.equal(w.fallocate(file, PUNCH, 0, 4), 0);
  for (const flags of [undefined, MAP_PRIVATE]) {
    const mapping = w.map(file, { pages: 4, prot: PROT_NONE, ...(flags ? { flags } : {}) });
    t.equal(seal(w, file), 'EBUSY');
    t.match(w.kernel.explain(), /mapped/);
    w.munmap(mapping);
  }
  t.equal(w.kernel.fcntl(file, F_GET_SEALS, 0), 0, 'nothing changed');
  t.equal(seal(w, file, F_SEAL_GUEST | 0x80), 'EINVAL', 'all of the seals or none');
  t.equal(seal(w, file), '0');
  t.equal(w.kernel.fcntl(file, F_GET_SEALS, 0), F_SEAL_GUEST);
  t.equal(seal(w, file), '0', 'again is no change');
  const odd = w.memfd(0, MFD_ALLOW_SEALING);
  t.equal(seal(w, odd), 'EINVAL', 'a size is needed');
  w.kernel.ftruncate(odd, w.P + 1);
  t.equal(seal(w, odd), 'EINVAL', 'of whole pages');
  const off = new World(t, []);
  t.equal(seal(off, off.memfd(1, MFD_ALLOW_SEALING)), 'EINVAL', 'unknown without the proposal');
});

t.test('seed 0.1: afterwards read, write and mmap are refused, and the size is fixed', async (t) => {
  const w = new World(t, SEAL);
  const file = sealed(w, 4);
  const { kernel, P } = w;
  const buffer = new Uint8Array(8);
  const refused = {
    read: kernel.read(file, buffer),
    write: kernel.write(file, buffer),
    pread: kernel.pread(file, buffer, 0),
    pwrite: kernel.pwrite(file, buffer, 0),
    map: w.mmap(file, { pages: 1 }),
    mapPrivate: w.mmap(file, { pages: 1, flags: MAP_PRIVATE, prot: PROT_NONE }),
    shrink: kernel.ftruncate(file, P),
    grow: kernel.ftruncate(file, 8 * P),
    growByAllocating: kernel.fallocate(file, 0, 0, 8 * P),
  };
  for (const [what, result] of Object.entries(refused)) t.equal(describe(result), 'EPERM', what);
  t.equal(describe(kernel.fallocate(file, PUNCH, 0, P / 2)), 'EINVAL', 'a punch below a page');
  t.match(kernel.explain(), /whole pages/);
  t.equal(w.fallocate(file, ALLOCATE, 0, 4), 0);
  t.equal(w.cached(file), 4);
  t.equal(w.fallocate(file, PUNCH, 1, 2), 0);
  t.equal(w.cached(file), 2);
  t.equal(w.stat(file).size, BigInt(4 * P));
});

t.test('seed 0.1: it is private memory of a guest, and of one VM', async (t) => {
  const w = new World(t, SEAL);
  const vm = w.vm(SW_PROTECTED);
  const file = sealed(w, 4);
  const memory = w.anonymous(4);
  t.equal(describe(w.bind(vm, { pages: 5, file })), 'EINVAL', 'past its end');
  t.equal(w.bind(vm, { pages: 4, file, hva: w.kernel.addressOf(memory) }), 0);
  t.equal(describe(w.bind(vm, { slot: 1, at: 8, pages: 1, file })), 'EEXIST', 'bound already');
  t.equal(describe(w.bind(w.vm(SW_PROTECTED), { pages: 1, file })), 'EINVAL', 'the memory of another VM');
  t.equal(w.setAttributes(vm, 0, 2 * w.P), 0);
  const guest = w.guest(vm);
  t.same([guest.put(0, 9), guest.put(3, 8)], [0, 0]);
  t.same([w.get(memory, 0), w.get(memory, 3)], [0, 8], 'private in the file, shared in host memory');
  t.equal(w.cached(file), 1);
  t.equal(guest.get(0), 9);
  t.equal(w.fallocate(file, PUNCH, 0, 4), 0);
  t.equal(guest.get(0), 0, 'after a punch the guest reads zeros');
  w.closeFd(file);
  t.same(describe(guest.get(1)), describe([-14, 39, 8n, 1, 1]), 'and after the last close nothing');
});

t.test('seed 0.1: a memfd that is not sealed is no guest memory, and a refused slot binds nothing', async (t) => {
  const w = new World(t, SEAL);
  t.equal(describe(w.bind(w.vm(SW_PROTECTED), { file: w.memfd(1, MFD_ALLOW_SEALING) })), 'EINVAL');
  const file = sealed(w, 1);
  t.equal(describe(w.bind(w.vm(SW_PROTECTED), { pages: 2, file })), 'EINVAL');
  t.equal(w.bind(w.vm(SW_PROTECTED), { pages: 1, file }), 0, 'so it is still anybody’s');
});

t.test('seed 0.10: the VM is told of a punch or a truncation before pages go', async (t) => {
  const w = new World(t, SEAL);
  const told: string[] = [];
  const watch = (file: number) => {
    const stop = w.kernel.onInvalidate(file, ({ offset, size }) =>
      told.push(`${offset / w.P}+${size / w.P}, ${w.cached(file)} there`),
    );
    if (typeof stop === 'number') throw new Error(`setup: ${describe(stop)}`);
    return stop;
  };
  const news = () => told.splice(0);

  const gmem = w.gmem(w.vm(), 8, MMAP | INIT_SHARED);
  const stop = watch(gmem);
  w.fallocate(gmem, ALLOCATE, 0, 8);
  w.fallocate(gmem, PUNCH, 2, 3);
  t.same(news(), ['2+3, 8 there']);
  w.fallocate(gmem, PUNCH, 6, 100);
  t.same(news(), ['6+2, 5 there'], 'no further than the file');
  w.advise(w.map(gmem, { pages: 8 }), 0, 1, MADV_REMOVE);
  t.same(news(), ['0+1, 3 there']);
  stop();
  w.fallocate(gmem, PUNCH, 0, 8);
  t.same(news(), []);

  const secret = sealed(w, 4);
  watch(secret);
  w.fallocate(secret, ALLOCATE, 0, 4);
  w.fallocate(secret, PUNCH, 1, 1);
  t.same(news(), ['1+1, 4 there']);

  const memfd = w.memfd(4);
  watch(memfd);
  w.fallocate(memfd, 0, 0, 4);
  w.kernel.ftruncate(memfd, w.P);
  t.same(news(), ['1+3, 4 there']);

  t.equal(describe(w.kernel.onInvalidate(w.kvm, () => {}) as number), 'ENODEV');
  t.equal(describe(w.kernel.onInvalidate(99, () => {}) as number), 'EBADF');
  const off = new World(t, []);
  t.equal(describe(off.kernel.onInvalidate(off.memfd(1), () => {}) as number), 'EOPNOTSUPP');
});

t.test('a running kernel knows no such seal, like the model without the proposal', async (t) => {
  onLinux(t, (s) => {
    const file = s.memfd(1, MFD_ALLOW_SEALING);
    t.equal(describe(s.kernel.fcntl(file, F_ADD_SEALS, F_SEAL_GUEST)), 'EINVAL');
    t.equal(s.kernel.fcntl(file, F_GET_SEALS, 0), 0);
  });
});
