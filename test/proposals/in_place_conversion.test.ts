import t from 'tap';
import { vmCapabilities } from '../../lib/capabilities.ts';
import { Kvm } from '../../lib/index.ts';
import { softwareKernel } from '../../lib/kernel/index.ts';
import type { Proposal } from '../../lib/model_options.ts';
import { KVM_CAP, MADV_DONTNEED, MADV_POPULATE_READ, MADV_REMOVE } from '../../lib/uapi.ts';
import { KVM_CAP_PROPOSED, KVM_SET_MEMORY_ATTRIBUTES2 } from '../../lib/uapi_proposed.ts';
import { openFiles } from '../backends.ts';
import { fault } from '../conformance/guest.ts';
import { describe, INIT_SHARED, MMAP, matches, type Outcome, type Resolved } from '../conformance/scenario.ts';
import { onSoftware } from '../pace.ts';
import { againstOracle, PAGES } from './conversion_oracle.ts';
import { onLinux, SW_PROTECTED, World } from './world.ts';

// KVM_SET_MEMORY_ATTRIBUTES2 on a guest_memfd: shared and private parts in one file.

const IN_PLACE: readonly Proposal[] = ['in-place-conversion'];
const [ZERO, PRESERVE] = [1, 2];
const PUNCH = 3;

t.test('a proposal is off unless it is named, and a name that is none is an error', async (t) => {
  const off = new World(t, []);
  const vm = off.vm(SW_PROTECTED);
  t.equal(off.convert(off.gmem(vm, 1, MMAP), 0, 1, 'shared'), 'ENOTTY');
  t.equal(describe(off.createGmem(vm, off.P, MMAP | INIT_SHARED)), 'EINVAL');
  t.equal(off.kernel.checkExtension(vm, KVM_CAP_PROPOSED.GUEST_MEMFD_MEMORY_ATTRIBUTES), 0);
  const wrong = { code: 'ERR_OUT_OF_RANGE', name: 'RangeError' };
  t.throws(() => softwareKernel({ proposals: ['teleport' as never] }), { ...wrong, message: /no proposal "teleport"/ });
  t.throws(() => softwareKernel({ proposals: IN_PLACE, kernel: '6.18' }), { ...wrong, message: /newest kernel, 7\.3/ });
  t.throws(() => softwareKernel({ proposals: 'all' as never }), { code: 'ERR_INVALID_ARG_TYPE' });
});

t.test('fields are checked before anything else', async (t) => {
  const w = new World(t, IN_PLACE);
  const vm = w.vm(SW_PROTECTED);
  const file = w.shared(vm, 4);
  const call = (offset: number | bigint, size: number | bigint, attributes = 8, flags = 0, fd = file) =>
    describe(w.kernel.setMemoryAttributes2(fd, { offset, size, attributes, flags }));
  const whole = 4 * w.P;
  t.equal(call(0, whole, 8, 4), 'EINVAL', 'an unknown flag');
  t.match(w.kernel.explain(), /0x4 are not content modes/);
  t.equal(call(0, whole, 8, ZERO | PRESERVE), 'EINVAL', 'two content modes');
  t.equal(call(0, whole, 1), 'EINVAL', 'an unknown attribute');
  t.equal(call(0, 0), 'EINVAL', 'no pages');
  t.equal(call(2n ** 64n - BigInt(w.P), w.P), 'EINVAL', 'a range that wraps');
  t.equal(call(1, w.P), 'EINVAL', 'an unaligned offset');
  t.equal(call(0, w.P - 1), 'EINVAL', 'an unaligned size');
  t.equal(call(w.P, whole), 'EINVAL', 'past the end');
  t.match(w.kernel.explain(), /ends past the end of the file, 16 KiB/);
  t.equal(call(0, w.P, 8, 0, 99), 'EBADF');
  t.equal(call(0, w.P, 8, 0, w.kvm), 'EINVAL', '/dev/kvm has no such request');
  t.equal(call(0, w.P, 8, 0, vm), 'ENOTTY', 'nor has a VM');
  t.equal(call(0, w.P, 8, 0, w.memfd(1)), 'ENOTTY', 'nor any other file');
  t.equal(call(0, w.P, 0, 0, w.gmem(vm, 1)), 'EOPNOTSUPP', 'a file nobody can map');
  t.throws(() => call('0' as never, w.P), { code: 'ERR_INVALID_ARG_TYPE' });
  t.same(w.privatePages(file), []);
  const plain = w.shared(w.vm(0), 1);
  t.equal(call(0, w.P, 8, 0, plain), 'EINVAL', 'a VM type without private memory');
  t.equal(call(0, w.P, 0, 0, plain), '0');
  t.equal(describe(w.kernel.ioctl(file, KVM_SET_MEMORY_ATTRIBUTES2, 0)), 'EFAULT', 'the request is known by number');
});

t.test('seed 1.1: shared and private parts in one file; how it begins is how it was created', async (t) => {
  const w = new World(t, IN_PLACE);
  const vm = w.vm(SW_PROTECTED);
  t.same(w.privatePages(w.gmem(vm, 8, MMAP)), [[0, 8]]);
  const file = w.shared(vm, 8);
  t.same(w.privatePages(file), []);
  t.equal(w.convert(file, 2, 3, 'private'), 0);
  t.equal(w.convert(file, 7, 1, 'private'), 0);
  t.equal(w.convert(file, 3, 1, 'shared'), 0);
  t.same(w.privatePages(file), [
    [2, 3],
    [4, 5],
    [7, 8],
  ]);
});

t.test('seed 1.1: a pair of memories goes on working, by the attribute of the VM', async (t) => {
  const w = new World(t, IN_PLACE);
  const vm = w.vm(SW_PROTECTED);
  const memory = w.anonymous(2);
  w.bind(vm, { pages: 2, file: w.gmem(vm, 2), hva: w.kernel.addressOf(memory) });
  const guest = w.guest(vm);
  t.equal(guest.put(0, 66), 0);
  t.equal(w.get(memory, 0), 66);
  t.equal(w.setAttributes(vm, 0, w.P), 0);
  t.equal(guest.get(0), 0);
});

t.test(
  'seed 1.2: a mapping of a file with private parts reaches the shared ones, and EFAULT at exactly the others',
  async (t) => {
    const w = new World(t, IN_PLACE);
    const file = w.shared(w.vm(SW_PROTECTED), 8);
    t.equal(w.convert(file, 2, 2, 'private'), 0);
    const mapping = w.map(file, { pages: 8 });
    t.same(
      [0, 1, 2, 3, 4].map((page) => describe(w.get(mapping, page))),
      ['0', '0', 'EFAULT', 'EFAULT', '0'],
    );
    t.same(
      [1, 2, 4].map((page) => describe(w.put(mapping, page, 7))),
      ['1', 'EFAULT', '1'],
    );
    const long = new Uint8Array(4 * w.P);
    t.equal(w.kernel.peek(mapping, w.P / 2, long), 1.5 * w.P, 'a copy ends where the private part begins');
    t.equal(describe(w.advise(mapping, 0, 8, MADV_POPULATE_READ)), 'EFAULT');
    t.equal(w.convert(file, 2, 2, 'shared'), 0);
    t.equal(w.get(mapping, 2), 0);
  },
);

t.test(
  'seed 1.3: EAGAIN with the first page that is in use, nothing changed, and the retry works once it is let go',
  async (t) => {
    const w = new World(t, IN_PLACE);
    const file = w.shared(w.vm(SW_PROTECTED), 16);
    const refused = (where: number) => {
      t.equal(w.convert(file, 0, 16, 'private'), `EAGAIN at ${where}`);
      t.same(w.privatePages(file), [], 'nothing changed');
    };
    const mapping = w.map(file);
    w.put(mapping, 9, 1);
    refused(9);
    t.match(w.kernel.explain(), /offset 0x9000 is mapped by the host/);
    const release = w.pin(file, 5, 2);
    refused(5);
    t.match(w.kernel.explain(), /offset 0x5000 is pinned/);
    const second = w.pin(file, 6, 1);
    release();
    refused(6);
    second();
    release();
    refused(9);
    t.equal(w.convert(file, 0, 9, 'private'), 0, 'pages that nobody holds can go');
    t.equal(w.convert(file, 0, 9, 'shared'), 0);
    w.advise(mapping, 9, 1, MADV_DONTNEED);
    t.equal(w.convert(file, 0, 16, 'private'), 0);
    t.equal(w.convert(file, 0, 16, 'shared'), 0);
    t.equal(w.get(mapping, 9), 1, 'and what it held is still there');
    w.munmap(mapping);
    t.equal(w.convert(file, 0, 16, 'private'), 0, 'unmapped is let go');
  },
);

t.test('seed 1.3: the mapping of another process holds pages too', async (t) => {
  const w = new World(t, IN_PLACE);
  const file = w.shared(w.vm(SW_PROTECTED), 2);
  const mapping = w.map(file, { pages: 2 });
  const child = w.kernel.fork();
  child.peek(mapping, 0, new Uint8Array(1));
  t.equal(w.convert(file, 0, 2, 'private'), 'EAGAIN at 0');
  child.munmap(mapping);
  t.equal(w.convert(file, 0, 2, 'private'), 0);
  child.close(file);
});

t.test('seed 1.3: windows hold the pages that exist, and are detached from those that do not', async (t) => {
  const w = new World(t, IN_PLACE);
  const file = w.shared(w.vm(SW_PROTECTED), 8);
  const mapping = w.map(file, { pages: 8 });
  const window = w.kernel.window(mapping, 0, 4 * w.P);
  window[w.P] = 1;
  t.equal(w.convert(file, 0, 8, 'private'), 'EAGAIN at 1');
  t.match(w.kernel.explain(), /window of the host/);
  t.equal(window.length, 4 * w.P);
  w.kernel.releaseWindow(window);
  t.equal(w.convert(file, 0, 8, 'private'), 0);
  t.equal(w.convert(file, 0, 8, 'shared'), 0);
  t.equal(w.get(mapping, 1), 1, 'what was written through it is kept');

  const untouched = w.shared(w.vm(SW_PROTECTED), 8);
  const other = w.map(untouched, { pages: 8 });
  const live = w.kernel.window(other, 0, 2 * w.P);
  t.equal(w.convert(untouched, 4, 4, 'private'), 0);
  t.equal(live.length, 2 * w.P, 'a window on other pages stays');
  t.equal(w.convert(untouched, 1, 1, 'private'), 0);
  t.equal(live.length, 0, 'detached');
});

t.test('seed 1.4: pages in a movable zone or a CMA area cannot become private until they are moved', async (t) => {
  const w = new World(t, IN_PLACE);
  const file = w.shared(w.vm(SW_PROTECTED), 8);
  t.equal(w.kernel.setPageZone(file, 4 * w.P, w.P, 'movable'), 0);
  t.equal(w.kernel.setPageZone(file, 6 * w.P, w.P, 'cma'), 0);
  t.equal(w.convert(file, 0, 8, 'private'), 'EBUSY at 4');
  t.match(w.kernel.explain(), /movable zone/);
  t.equal(w.convert(file, 5, 3, 'private'), 'EBUSY at 6');
  t.match(w.kernel.explain(), /CMA/);
  t.same(w.privatePages(file), []);
  t.equal(w.kernel.migratePages(file, 0, 8 * w.P), 0);
  t.equal(w.convert(file, 0, 8, 'private'), 0);
});

t.test('seed 1.5: private to shared always succeeds', async (t) => {
  const w = new World(t, IN_PLACE);
  const file = w.gmem(w.vm(SW_PROTECTED), 8, MMAP);
  w.kernel.setPageZone(file, 0, 8 * w.P, 'movable');
  w.map(file, { pages: 8 });
  t.equal(w.convert(file, 0, 8, 'shared'), 0);
  w.pin(file, 0, 1);
  t.equal(w.convert(file, 0, 8, 'shared'), 0);
});

t.test('seed 1.6: contents kept or zeroed as the caller asks, where the kernel offers it', async (t) => {
  const w = new World(t, IN_PLACE);
  const vm = w.vm(SW_PROTECTED);
  t.equal(w.kernel.checkExtension(vm, KVM_CAP_PROPOSED.MEMORY_ATTRIBUTES2_FLAGS), ZERO | PRESERVE);
  t.equal(w.kernel.checkExtension(w.vm(0), KVM_CAP_PROPOSED.MEMORY_ATTRIBUTES2_FLAGS), 0);
  const file = w.shared(vm, 4);
  const mapping = w.map(file, { pages: 4 });
  for (const page of [0, 1, 2]) w.put(mapping, page, 7);
  w.advise(mapping, 0, 4, MADV_DONTNEED);
  t.equal(w.convert(file, 0, 1, 'private', ZERO), 0);
  t.equal(w.convert(file, 1, 1, 'private', PRESERVE), 0);
  t.equal(w.convert(file, 0, 2, 'shared'), 0);
  t.same(
    [0, 1, 2].map((page) => w.get(mapping, page)),
    [0, 7, 7],
  );
  w.advise(mapping, 0, 4, MADV_DONTNEED);
  t.equal(w.convert(file, 1, 1, 'private'), 0);
  t.equal(w.convert(file, 0, 4, 'shared', ZERO), 0);
  t.same(
    [1, 2].map((page) => w.get(mapping, page)),
    [0, 7],
    'only what changes is zeroed',
  );
  t.equal(w.cached(file), 3, 'and nothing is allocated for it');
});

t.test('seed 1.7: a range that is as wanted is a successful no-op, even when it is pinned', async (t) => {
  const w = new World(t, IN_PLACE);
  const file = w.shared(w.vm(SW_PROTECTED), 4);
  w.pin(file, 0, 4);
  t.equal(w.convert(file, 0, 4, 'shared'), 0);
  const secret = w.gmem(w.vm(SW_PROTECTED), 4, MMAP);
  t.equal(w.convert(secret, 0, 1, 'shared'), 0);
  w.pin(secret, 0, 1);
  t.equal(w.convert(secret, 1, 3, 'private'), 0);
  t.equal(w.convert(secret, 0, 4, 'private'), 'EAGAIN at 0');
  t.equal(describe(w.kernel.pinPages(secret, w.P, w.P) as number), 'EFAULT', 'the host has nothing private to pin');
});

t.test('seed 1.8: pages that do not exist have a state, and a punch does not change it', async (t) => {
  const w = new World(t, IN_PLACE);
  const file = w.shared(w.vm(SW_PROTECTED), 8);
  const mapping = w.map(file, { pages: 8 });
  t.equal(w.convert(file, 0, 4, 'private'), 0);
  t.equal(w.cached(file), 0, 'a state costs no memory');
  t.equal(w.fallocate(file, 1, 0, 8), 0);
  t.equal(w.fallocate(file, PUNCH, 2, 4), 0);
  t.same(w.privatePages(file), [[0, 4]]);
  t.equal(w.advise(mapping, 3, 2, MADV_REMOVE), 0);
  t.same(w.privatePages(file), [[0, 4]]);
  t.equal(w.get(mapping, 5), 0);
  t.equal(w.fallocate(file, PUNCH, 5, 1), 0);
  t.equal(w.convert(file, 0, 8, 'private'), 0, 'a page that was punched is mapped by nobody');
});

t.test('seed 1.10: shared pages may migrate, private and pinned ones may not', async (t) => {
  const w = new World(t, IN_PLACE);
  const file = w.shared(w.vm(SW_PROTECTED), 4);
  const migrate = () => describe(w.kernel.migratePages(file, 0, 4 * w.P));
  t.equal(migrate(), '0');
  const release = w.pin(file, 3, 1);
  t.equal(migrate(), 'EAGAIN');
  release();
  t.equal(w.convert(file, 2, 1, 'private'), 0);
  t.equal(migrate(), 'EBUSY');
});

t.test('the guest reaches shared and private pages of its file alike, and its bytes stay where they are', async (t) => {
  const w = new World(t, IN_PLACE);
  const vm = w.vm(SW_PROTECTED);
  const file = w.shared(vm, 4);
  w.bind(vm, { at: 16, pages: 4, file });
  const mapping = w.map(file, { pages: 4 });
  const guest = w.guest(vm);
  t.equal(guest.put(16, 5), 0);
  t.equal(w.get(mapping, 0), 5);
  w.advise(mapping, 0, 4, MADV_DONTNEED);
  t.equal(w.convert(file, 0, 1, 'private'), 0);
  t.equal(describe(w.get(mapping, 0)), 'EFAULT');
  t.equal(guest.get(16), 5);
  t.equal(guest.put(16, 6), 0);
  t.equal(w.setAttributes(vm, 16 * w.P, w.P, 0), 0, 'the attribute of the VM has no say here');
  t.equal(guest.get(16), 6);
  t.equal(w.convert(file, 0, 1, 'shared'), 0);
  t.equal(w.get(mapping, 0), 6);
});

t.test('an access that contradicts the state of the page is a memory fault, until one of them gives way', async (t) => {
  const w = new World(t, IN_PLACE);
  const vm = w.vm(SW_PROTECTED);
  const file = w.shared(vm, 4);
  w.bind(vm, { at: 16, pages: 4, file });
  const guest = w.guest(vm);
  const is = (got: Outcome, expected: unknown) => t.ok(matches(got, expected as Resolved), describe(got));
  w.kernel.setGuestView(vm, { address: 17 * w.P, size: w.P, access: 'private' });
  is(guest.get(17), fault('private', 17));
  t.equal(w.convert(file, 1, 1, 'private'), 0);
  is(guest.again(), 0);
  w.kernel.setGuestView(vm, { address: 17 * w.P, size: w.P, access: 'shared' });
  is(guest.put(17, 1), fault('shared', 17));
  w.kernel.setGuestView(vm, { address: 17 * w.P, size: w.P, access: null });
  is(guest.again(), 0);
  t.equal(describe(w.kernel.setGuestView(vm, { address: 1, size: w.P, access: null })), 'EINVAL');
});

t.test('a protected VM of pKVM has its memory in the file, with shared and private parts', async (t) => {
  const w = new World(t, IN_PLACE, { arch: 'aarch64', pkvm: true, pageSize: 16384 });
  const vm = w.vm(0x8000_0000);
  const file = w.gmem(vm, 4, MMAP);
  w.bind(vm, { at: 4, pages: 4, file });
  t.equal(w.convert(file, 1, 1, 'shared'), 0);
  const mapping = w.map(file, { pages: 4 });
  const guest = w.guest(vm);
  t.same([guest.put(4, 3), guest.put(5, 4)], [0, 0]);
  t.same([w.get(mapping, 0), w.get(mapping, 1)].map(describe), ['EFAULT', '4']);
});

t.test('what a VM can do is found by trying it on a page of its own', async (t) => {
  using kvm = Kvm.open({ backend: 'software', model: { proposals: IN_PLACE } });
  const { capabilities } = kvm.createVm({ type: 'sw-protected' });
  t.match(capabilities, { conversion: 'in-place', conversionContent: 3n, guestMemfdInitShared: true });
  t.match(capabilities.evidence, { conversion: 'probed', conversionContent: 'probed' });
  t.match(kvm.createVm().capabilities, { conversion: 'none', conversionContent: 0n });
  using without = Kvm.open({ backend: 'software' });
  t.match(without.createVm({ type: 'sw-protected' }).capabilities, {
    conversion: 'attributes',
    conversionContent: 0n,
    evidence: { conversion: 'probed' },
  });
});

if (onSoftware)
  t.test('random calls come to what a list of pages says they come to', async (t) => {
    againstOracle(() => {
      const w = new World(t, IN_PLACE);
      return { w, file: w.shared(w.vm(SW_PROTECTED), PAGES) };
    });
  });

if (onSoftware)
  t.test('the state of a file costs by its ranges, however many pages they have', async (t) => {
    const w = new World(t, IN_PLACE);
    const huge = 2 ** 40;
    const file = w.shared(w.vm(SW_PROTECTED), huge);
    for (let at = 0; at < 1000; at++) t.equal(w.convert(file, at * 2 ** 30, 2 ** 29, 'private'), 0);
    t.equal(w.privatePages(file).length, 1000);
    t.equal(w.convert(file, 0, huge, 'private'), 0);
    t.same(w.privatePages(file), [[0, huge]]);
    t.equal(w.fallocate(file, 1, 0, huge), 0);
    t.equal(w.convert(file, 0, huge, 'shared', ZERO), 0);
  });

t.test('a running kernel says ENOTTY, like the model without the proposal', async (t) => {
  onLinux(t, (s) => {
    const vm = s.vm();
    const flags = Math.max(0, s.kernel.checkExtension(vm, KVM_CAP.GUEST_MEMFD_FLAGS));
    const args = { offset: 0, size: s.P, attributes: 0, flags: 0 };
    const answers = (fd: number) => describe(s.kernel.setMemoryAttributes2(fd, args));
    if (s.cap(vm, 'GUEST_MEMFD') > 0) {
      const file = s.gmem(vm, 1, flags & (MMAP | INIT_SHARED));
      t.equal(answers(file), 'ENOTTY');
      t.match(s.kernel.explain(), /cannot convert pages in place/);
      t.same([...(s.kernel.privatePages(file) ?? [])], flags & INIT_SHARED ? [] : [{ start: 0, end: 1, value: true }]);
    }
    t.same([s.kvm, vm, s.memfd(1), 9999].map(answers), [
      'EINVAL',
      s.kernel.arch === 'aarch64' ? 'EINVAL' : 'ENOTTY',
      'ENOTTY',
      'EBADF',
    ]);
    t.equal(s.kernel.privatePages(vm), undefined);
    const taken = s.kernel.takeFile(s.kernel.shareFile(vm), 'vm');
    const before = openFiles();
    t.not(vmCapabilities(s.kernel, taken).conversion, 'in-place');
    t.same(openFiles(), before, 'trying leaves nothing behind, also on a VM of another thread');
    s.kernel.close(taken);
  });
});
