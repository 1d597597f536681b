import { spawnSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, statSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import t from 'tap';
import { formatRange } from '../lib/format.ts';
import { GiB } from '../lib/index.ts';
import { ERRNO } from '../lib/uapi.ts';
import { type Backend, everywhere, refused, withPrivate } from './backends.ts';

// Guest memory that outlives its process.

const folder = mkdtempSync(join(tmpdir(), 'guest-memfd-'));
t.teardown(() => rmSync(folder, { recursive: true }));
let folders = 0;
const place = (): string => join(folder, `${folders++}`);
const text = (bytes: Uint8Array): string => Buffer.from(bytes).toString();

const child = fileURLToPath(new URL('store_child.js', import.meta.url));
function run(task: string, path: string, backend: Backend, type = 'default') {
  const args = [child, task, path, JSON.stringify(backend.model ?? null), type];
  return spawnSync(process.execPath, args, { encoding: 'utf8', timeout: 60_000 });
}

await everywhere(t, 'seed 3.1: a guest_memfd is reached by mapping only', (t, { vm, shared, P }) => {
  const file = shared(2);
  const { kernel } = vm.backing;
  const bytes = new Uint8Array(8);
  t.equal(kernel.read(file.fd, bytes), -ERRNO.EINVAL);
  t.equal(kernel.write(file.fd, bytes), -ERRNO.EINVAL);
  t.equal(kernel.pread(file.fd, bytes, 0), -ERRNO.ESPIPE);
  t.equal(kernel.pwrite(file.fd, bytes, 0), -ERRNO.ESPIPE);
  if (vm.capabilities.guestMemfdInitShared) {
    file.bytes({ offset: P, size: 4 }).set([1, 2, 3, 4]);
    t.same([...file.bytes({ offset: P, size: 4 })], [1, 2, 3, 4]);
  }
});

await everywhere(
  t,
  'seed 3.3: metadata do not grow with pages, and extents are as large as they can be',
  (t, { kvm, P }) => {
    const path = place();
    using store = kvm.openStore(path);
    const large = store.create('large', { size: 2 ** 28 * P });
    const small = store.create('small', { size: P });
    const bytesOf = (name: string): number => statSync(join(path, name, 'metadata.0')).size;
    t.equal(bytesOf('large'), bytesOf('small'));
    t.same([large.extents(), small.extents()], [[], []], 'nothing is taken before it is written');
    const vm = kvm.createVm();
    vm.createMemslot({ address: 0, size: 512 * P, hostMemory: large.hostMemory });
    vm.createMemslot({ address: 4 * GiB, size: 16 * P, hostMemory: large.hostMemory, hostOffset: 2 ** 27 * P });
    vm.memory.write(0, new Uint8Array(512 * P).fill(1));
    vm.memory.write(4 * GiB + P, new Uint8Array(P).fill(1));
    t.same(large.extents(), [
      { offset: 0, size: 512 * P },
      { offset: (2 ** 27 + 1) * P, size: P },
    ]);
    t.equal(statSync(join(path, 'large', 'data')).blocks * 512 < 1024 * P, true, 'the rest is a hole');
    large.hostMemory.discard({ offset: 0, size: 512 * P });
    t.same(large.extents(), [{ offset: (2 ** 27 + 1) * P, size: P }], 'a discard is one, too');
    vm.close();
  },
);

await everywhere(t, 'seed 3.4: memory survives a killed VMM: size, layout, bytes', (t, { backend, kvm, P }) => {
  const path = place();
  const { signal, stderr } = run('live', path, backend);
  t.same([signal, stderr], ['SIGKILL', '']);
  using store = kvm.openStore(path);
  t.same(store.list(), ['guest']);
  const vm = kvm.createVm();
  const { memory, lost, vcpus } = store.attach(vm, 'guest');
  t.match(memory, { name: 'guest', size: 64 * P });
  t.same([...(memory?.tags ?? [])], [['disk', 'sda']]);
  t.same(
    Array.from(vm.memslots.values(), ({ slot, address, size, hostOffset }) => [slot, address, size, hostOffset]),
    [
      [0, 0, 48 * P, 0],
      [7, 1024 * P, 16 * P, 48 * P],
    ],
  );
  t.equal(text(vm.memory.read(40 * P + 5, 11)), 'by the host');
  t.equal(text(vm.memory.read(1024 * P + 9, 12)), 'by the guest');
  t.same([lost, vcpus], [[], []]);
  refused(t, () => store.attach(vm, 'guest'), 'EEXIST', 'memslots');
  refused(t, () => memory?.close(), 'EBUSY', 'memslot');
  refused(t, () => store.close(), 'EBUSY', 'memslot');
  refused(t, () => store.remove('guest'), 'EBUSY', 'open');
  vm.close();
});

await withPrivate(t, 'seed 3.4: and the attribute map', (t, { backend, kvm, P }) => {
  const path = place();
  t.equal(run('live', path, backend, 'sw-protected').signal, 'SIGKILL');
  using store = kvm.openStore(path);
  const plain = kvm.createVm();
  refused(t, () => store.attach(plain, 'guest'), 'EINVAL', "of a VM of type 'sw-protected'");
  t.equal(plain.memslots.size, 0);
  const vm = kvm.createVm({ type: 'sw-protected' });
  const { lost } = store.attach(vm, 'guest');
  t.same(vm.attributes.privateRanges(), [{ address: 1026 * P, size: 2 * P }]);
  t.same(lost, [{ address: 1026 * P, size: 2 * P }], 'what nobody could read is named');
  t.equal(vm.memslots.get(7)?.guestMemfd?.size, 16 * P);
  t.equal(text(vm.memory.read(1024 * P + 9, 12)), 'by the guest');
  vm.close();
});

await everywhere(t, 'seed 3.7: the device ledger comes back, and listens again', (t, { backend, kvm, P }) => {
  const path = place();
  run('live', path, backend);
  using store = kvm.openStore(path);
  const vm = kvm.createVm();
  const { users } = store.attach(vm, 'guest', { users: { nic: { converting: () => 'busy' } } });
  t.same(
    users.map(({ name, holds }) => [name, holds.map(({ range }) => range)]),
    [
      ['nic', [{ address: 1025 * P + 3, size: 17 }]],
      ['idle', []],
    ],
  );
  t.equal(typeof users[0]?.listener.converting, 'function');
  t.same(store.open('guest').describe().users[0]?.name, 'nic');
  vm.close();
});

await everywhere(t, 'a snapshot is restored in another process, vCPUs included', (t, { backend, kvm, vm, P }) => {
  const path = place();
  const kept = run('snapshot', path, backend);
  t.same([kept.status, kept.stderr], [0, '']);
  using store = kvm.openStore(path);
  const before = readFileSync(join(path, 'still', 'data'));
  const { status, stdout, stderr } = run('restore', path, backend);
  t.same([status, stderr], [0, '']);
  t.same(JSON.parse(stdout), { id: 2, registers: [0x1234, 0x8000, 0x77], slot: [0, 1, 32, 16], text: 'kept' });
  refused(t, () => store.attach(vm, 'still'), 'EROFS', 'snapshot');
  store.restore(vm, 'still');
  vm.memory.write(3 * P, Buffer.from('gone'));
  t.ok(before.equals(readFileSync(join(path, 'still', 'data'))), 'a restored VM has a copy');
  refused(t, () => store.snapshot(vm, 'still'), 'EEXIST', 'remove it first');
  store.open('still').close();
  store.remove('still');
  t.same(store.list(), []);
});

await everywhere(t, 'a snapshot of a guest_memfd that the host may read', (t, { backend, kvm, vm, shared, P }) => {
  if (!vm.capabilities.guestMemfdInitShared) {
    t.ok(backend.model, 'only a model is that old');
    return;
  }
  using store = kvm.openStore(place());
  vm.createMemslot({ address: 0, size: 4 * P, guestMemfd: shared(8), guestMemfdOffset: 2 * P });
  vm.memory.write(P + 1, Buffer.from('in the file'));
  store.snapshot(vm, 'one');
  const copy = kvm.createVm();
  store.restore(copy, 'one');
  t.equal(text(copy.memory.read(P + 1, 11)), 'in the file');
  t.match(copy.memslots.get(0), { guestMemfdOffset: 2 * P, size: 4 * P });
  using other = store.create('other', { size: P });
  refused(t, () => other.record(vm), 'EINVAL', 'not in the store');
});

await withPrivate(t, 'private contents cannot be in a snapshot', (t, { kvm, vm, closed, host, P }) => {
  using store = kvm.openStore(place());
  vm.createMemslot({ address: 16 * P, size: 8 * P, hostMemory: host(8), guestMemfd: closed(8) });
  vm.setMemoryAttributes({ address: 18 * P, size: P }, { private: true });
  vm.setMemoryAttributes({ address: 20 * P, size: 2 * P }, { private: true });
  const named = [formatRange(18 * P, P), formatRange(20 * P, 2 * P)];
  refused(t, () => store.snapshot(vm, 'one'), 'UNSUPPORTED', 'private', ...named);
  t.same(store.list(), [], 'nothing of it is there');
  vm.setMemoryAttributes({ address: 16 * P, size: 8 * P }, { private: false });
  t.equal(store.snapshot(vm, 'one').describe().isSnapshot, true);
});
