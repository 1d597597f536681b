import t from 'tap';
import { GiB, KvmError } from '../lib/index.ts';
import { backends, errorOf, everywhere, refused, withPrivate } from './backends.ts';
import { onSoftware } from './pace.ts';

// The guest's memory by guest physical address, and what of it is private.

const bytes = (...values: number[]) => Uint8Array.from(values);

await everywhere(t, 'reads and writes across slots, at any alignment', (t, { vm, P, host, shared }) => {
  const [memory, file] = [host(2), shared(2)];
  vm.createMemslot({ address: 0, size: 2 * P, hostMemory: memory });
  vm.createMemslot({ address: 2 * P, size: P, guestMemfd: file, guestMemfdOffset: P });
  vm.createMemslot({ address: 3 * P, size: P, hostMemory: memory });
  const data = Uint8Array.from({ length: 2 * P + 7 }, (_, index) => (index * 7 + 1) & 0xff);
  vm.memory.write(P - 3, data.subarray(0, P + 7));
  t.same(vm.memory.read(P - 3, P + 7), data.subarray(0, P + 7));
  t.same(memory.bytes({ offset: P - 3, size: 3 }), data.subarray(0, 3));
  t.same(file.bytes({ offset: P, size: 4 }), data.subarray(P + 3, P + 7));
  vm.memory.write(2 * P - 2, data.subarray(0, P + 4));
  t.same(vm.memory.read(2 * P - 2, P + 4), data.subarray(0, P + 4), 'over three slots');
  t.same(vm.memory.read(0, 2), data.subarray(P + 2, P + 4), 'two slots may show the same memory');
  const target = new Uint8Array(10).fill(1);
  t.equal(vm.memory.readInto(2 * P - 2, target.subarray(3, 6)), 3, 'readInto() fills all of its target');
  t.same(target, bytes(1, 1, 1, ...data.subarray(0, 3), 1, 1, 1, 1));
  t.same(vm.memory.read(GiB, 0), new Uint8Array(0), 'nothing needs no memslot');
  t.equal(vm.memory.readInto(GiB, new Uint8Array(0)), 0);
  vm.memory.write(GiB, new Uint8Array(0));
});

await everywhere(t, 'the host writes read-only slots', (t, { vm, P, host }) => {
  vm.createMemslot({ address: 0, size: P, hostMemory: host(1), readonly: true });
  vm.memory.write(1, bytes(5));
  t.equal(vm.memory.read(1, 1)[0], 5);
});

await everywhere(t, 'where nothing is', (t, { vm, P, host }) => {
  vm.createMemslot({ address: P, size: P, hostMemory: host(1) });
  const attempts: [() => unknown, number, string][] = [
    [() => vm.memory.read(0, 1), 0, 'read'],
    [() => vm.memory.read(2 * P - 1, 2), 2 * P, 'read'],
    [() => vm.memory.readInto(P - 1, new Uint8Array(3)), P - 1, 'read'],
    [() => vm.memory.write(2 * P - 2, bytes(1, 2, 3)), 2 * P, 'write'],
    [() => vm.memory.view(2 * P - 2, 3), 2 * P, 'view'],
    [() => vm.memory.read(2 ** 52, 1), 2 ** 52, 'read'],
  ];
  for (const [call, errorOffset, what] of attempts) {
    const error = refused(t, call, 'EFAULT', `cannot ${what}`, 'no memslot is there');
    t.type(error, KvmError);
    t.match(error, { errno: -14, errorOffset });
  }
  t.same(vm.memory.read(2 * P - 2, 2), bytes(0, 0), 'a refused write wrote nothing');
  const target = new Uint8Array(4).fill(9);
  errorOf(() => vm.memory.readInto(2 * P - 2, target));
  t.same(target, bytes(9, 9, 9, 9), 'a refused read read nothing');
});

await everywhere(t, 'files that are not for the host', (t, { vm, P }) => {
  const file = vm.createGuestMemfd({ size: 4 * P, mmap: true });
  vm.createMemslot({ slot: 6, address: 0, size: 4 * P, guestMemfd: file });
  file.allocate({ offset: 0, size: P });
  for (const at of [0, 2 * P]) {
    for (const call of [() => vm.memory.read(at, 1), () => vm.memory.write(at, bytes(1)), () => vm.memory.view(at, 1)])
      refused(t, call, 'EFAULT', 'slot 6', 'initShared');
  }
});

await everywhere(t, 'pages that were punched or discarded read as zeros', (t, { vm, P, host, shared }) => {
  const [memory, file] = [host(2), shared(2)];
  vm.createMemslot({ address: 0, size: 2 * P, hostMemory: memory });
  vm.createMemslot({ address: 2 * P, size: 2 * P, guestMemfd: file });
  vm.memory.write(0, new Uint8Array(4 * P).fill(3));
  memory.discard({ offset: P, size: P });
  file.punchHole({ offset: 0, size: P });
  const all = vm.memory.read(0, 4 * P);
  t.same([all[0], all[P], all[2 * P], all[3 * P]], [3, 0, 0, 3]);
});

await everywhere(t, 'views', (t, { backend, vm, P, host, shared }) => {
  const [memory, file] = [host(4), shared(2)];
  vm.createMemslot({ address: 0, size: 2 * P, hostMemory: memory, hostOffset: P });
  const second = vm.createMemslot({ address: 2 * P, size: P, hostMemory: memory, hostOffset: 3 * P });
  const third = vm.createMemslot({ address: 4 * P, size: 2 * P, guestMemfd: file });
  const view = vm.memory.view(P + 1, 10);
  view[0] = 77;
  t.equal(vm.memory.read(P + 1, 1)[0], 77, 'live');
  vm.memory.write(P + 2, bytes(78));
  t.equal(view[1], 78);
  t.equal(vm.memory.view(P + 1, 10), view, 'the same range is the same view');
  t.not(vm.memory.view(P + 1, 9), view);
  const ofFile = vm.memory.view(4 * P, 2 * P);
  ofFile[P] = 5;
  t.equal(file.bytes()[P], 5);
  refused(t, () => vm.memory.view(P, 2 * P), 'EFAULT', 'more than one memslot', 'read()');
  refused(t, () => vm.memory.view(0, 0), 'ERR_OUT_OF_RANGE', 'length');
  refused(t, () => vm.memory.view(0, 2 ** 33), 'ERR_OUT_OF_RANGE', '4 GiB');
  const other = vm.memory.view(2 * P, P);
  second.remove();
  t.equal(other.length, 0, 'detached with its slot');
  if (backend.name === 'kvm') t.same([view.length, ofFile.length], [10, 2 * P], 'and no other');
  t.equal(ofFile.length, 2 * P, 'another memory is another matter');
  t.equal(vm.memory.view(P + 1, 10)[0], 77, 'and there is a new one to be had');
  third.remove();
  t.equal(ofFile.length, 0);
  vm.createMemslot({ address: 4 * P, size: 2 * P, guestMemfd: file });
  const again = vm.memory.view(4 * P, 2 * P);
  t.equal(again[P], 5);
  file[Symbol.dispose]();
  t.equal(again.length, 0, 'detached with its memory');
  const last = vm.memory.view(0, P);
  vm.close();
  t.equal(last.length, 0, 'detached with its VM');
  t.equal(memory.bytes()[P + P + 1], 77, 'the memory itself is still there');
});

await everywhere(t, 'arguments', (t, { vm, P, host }) => {
  vm.createMemslot({ address: 0, size: P, hostMemory: host(1) });
  refused(t, () => vm.memory.read(-1, 1), 'ERR_OUT_OF_RANGE', 'address');
  refused(t, () => vm.memory.read(0, -1), 'ERR_OUT_OF_RANGE', 'length');
  refused(t, () => vm.memory.read(2 ** 53 - 1, 1), 'ERR_OUT_OF_RANGE', '2^53-1');
  refused(t, () => vm.memory.read(0, '1' as never), 'ERR_INVALID_ARG_TYPE', 'length');
  refused(t, () => vm.memory.write(0, [1] as never), 'ERR_INVALID_ARG_TYPE', 'Uint8Array');
  refused(t, () => vm.memory.write(0, new Uint16Array(1) as never), 'ERR_INVALID_ARG_TYPE', 'Uint8Array');
  refused(t, () => vm.memory.readInto(0, new DataView(new ArrayBuffer(1)) as never), 'ERR_INVALID_ARG_TYPE');
  refused(t, () => vm.memslotAt(-1), 'ERR_OUT_OF_RANGE');
  vm.memory.write(0, Buffer.from('buffers are Uint8Arrays'));
  t.equal(Buffer.from(vm.memory.read(0, 7)).toString(), 'buffers');
  const own = vm.memory.view(0, 8);
  vm.memory.write(16, own);
  t.equal(vm.memory.readInto(4, own), 8, 'a view of the memory itself serves as well');
  t.equal(Buffer.from(vm.memory.read(0, 8)).toString(), 'ers are ');
});

await everywhere(t, 'attributes of a VM without private memory', (t, { vm, P }) => {
  const set = () => vm.setMemoryAttributes({ address: 0, size: P }, { private: true });
  refused(t, set, 'UNSUPPORTED', "'default'", 'KVM_CAP_MEMORY_ATTRIBUTES');
  t.equal(vm.attributes.at(0), 'shared');
  t.equal(vm.attributes.state({ address: 0, size: 2 ** 52 }), 'shared');
  t.same(vm.attributes.privateRanges(), []);
  t.equal(vm.attributes.privateBytes, 0);
  t.same([...vm.attributes], []);
});

await withPrivate(t, 'attributes are what was set', (t, { backend, vm, P }) => {
  const { attributes } = vm;
  const set = (page: number, pages: number, secret = true) =>
    vm.setMemoryAttributes({ address: page * P, size: pages * P }, { private: secret });
  set(4, 4);
  set(12, 2);
  set(5, 1, false);
  const range = (page: number, pages: number) => ({ address: page * P, size: pages * P });
  t.same(attributes.privateRanges(), [range(4, 1), range(6, 2), range(12, 2)]);
  t.same(attributes.privateRanges(range(7, 6)), [range(7, 1), range(12, 1)]);
  t.same(attributes.privateRanges(range(8, 4)), []);
  t.equal(attributes.privateBytes, 5 * P);
  t.same(
    [attributes.at(4 * P - 1), attributes.at(4 * P), attributes.at(5 * P - 1), attributes.at(5 * P)],
    ['shared', 'private', 'private', 'shared'],
  );
  t.same(
    [range(0, 4), range(6, 2), range(6, 3), range(3, 2), range(5, 1)].map((one) => attributes.state(one)),
    ['shared', 'private', 'mixed', 'mixed', 'shared'],
  );
  t.equal(attributes.state({ address: 4 * P + 1, size: P }), 'mixed', 'pages count as a whole');
  const shown = [...attributes];
  t.same(shown, [
    { ...range(0, 4), visibility: 'shared' },
    { ...range(4, 1), visibility: 'private' },
    { ...range(5, 1), visibility: 'shared' },
    { ...range(6, 2), visibility: 'private' },
    { ...range(8, 4), visibility: 'shared' },
    { ...range(12, 2), visibility: 'private' },
  ]);
  set(5, 1);
  t.same(attributes.privateRanges(), [range(4, 4), range(12, 2)], 'neighbours are one range');
  set(4, 4);
  // Real KVM looks at each page.
  set(0, backend.model ? 2 ** 30 : 64, false);
  t.same([...attributes], []);
  refused(
    t,
    () => vm.setMemoryAttributes({ address: 1, size: P }, { private: true }),
    'EINVAL',
    'KVM_SET_MEMORY_ATTRIBUTES',
    'whole pages',
  );
  refused(
    t,
    () => vm.setMemoryAttributes({ address: 0, size: 0 }, { private: true }),
    'ERR_OUT_OF_RANGE',
    'range.size',
  );
  refused(
    t,
    () => vm.setMemoryAttributes({ address: 0, size: P }, { private: 1 as never }),
    'ERR_INVALID_ARG_TYPE',
    'attributes.private',
  );
  refused(t, () => vm.setMemoryAttributes({ address: 2 ** 53 - P, size: P }, { private: true }), 'ERR_OUT_OF_RANGE');
  const size = backend.model ? 2 ** 51 : 2 ** 21;
  vm.setMemoryAttributes({ address: 2 ** 52, size }, { private: true });
  t.equal(attributes.privateBytes, size);
});

await withPrivate(t, 'private pages are not for the host', (t, { vm, P, host, closed }) => {
  const memory = host(4);
  vm.createMemslot({ address: 0, size: 4 * P, hostMemory: memory, guestMemfd: closed(4) });
  vm.memory.write(0, new Uint8Array(4 * P).fill(1));
  const [before, through, after] = [vm.memory.view(0, P), vm.memory.view(P - 1, 2), vm.memory.view(3 * P, P)];
  vm.setMemoryAttributes({ address: P, size: P }, { private: true });
  t.equal(through.length, 0, 'a view that reaches into a private page is detached');
  for (const call of [
    () => vm.memory.read(0, 2 * P),
    () => vm.memory.write(P - 1, bytes(1, 2)),
    () => vm.memory.view(P + 5, 1),
  ]) {
    const error = refused(t, call, 'EFAULT', 'it is private');
    t.ok([P, P + 5].includes(error.errorOffset as number));
  }
  t.equal(vm.memory.read(P - 1, 1)[0], 1);
  t.equal(vm.memory.read(2 * P, 2 * P)[P], 1);
  vm.setMemoryAttributes({ address: P, size: P }, { private: false });
  t.equal(vm.memory.read(P, 1)[0], 1, 'the attribute alone loses nothing');
  t.ok(before.length === 0 || before.length === P);
  t.ok(after.length === 0 || after.length === P);
  const bare = vm.createMemslot({ address: 8 * P, size: P, guestMemfd: closed(1) });
  refused(t, () => vm.memory.read(8 * P, 1), 'EFAULT', `slot ${bare.slot}`, 'no host memory');
});

t.test('every backend was there', (t) => {
  t.ok(backends.length >= (onSoftware ? 3 : 1));
  t.end();
});
