import { mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import t from 'tap';
import { GiB, KvmError, MiB } from '../lib/index.ts';
import { backends, everywhere, openFiles, refused } from './backends.ts';

// Memory itself: HostMemory of every kind, and guest_memfds.

const folder = mkdtempSync(join(tmpdir(), 'guest-memfd-'));
t.teardown(() => rmSync(folder, { recursive: true }));

for (const kind of ['anonymous', 'memfd', 'file'] as const) {
  await everywhere(t, `seed 2.11: host memory: ${kind}`, (t, { backend, kvm, P }) => {
    const path = join(folder, `${kind} ${backend.name}`);
    const memory = kvm.createHostMemory({ size: 8 * P, kind, ...(kind === 'file' ? { path } : {}) });
    t.match(memory, { size: 8 * P, kind, closed: false });
    t.equal(typeof memory.address, 'bigint');
    t.equal(memory.address % BigInt(P), 0n);
    t.equal(memory.residentBytes(), 0, 'nothing is there before it is touched');
    const all = memory.bytes();
    t.equal(all.length, 8 * P);
    t.equal(all[7 * P], 0);
    const part = memory.bytes({ offset: 2 * P, size: 2 * P });
    part.fill(9);
    t.same([all[2 * P - 1], all[2 * P], all[4 * P - 1], all[4 * P]], [0, 9, 9, 0], 'views show the same memory');
    t.ok(memory.residentBytes({ offset: 2 * P, size: 2 * P }) === 2 * P, 'resident once written');
    t.equal(memory.residentBytes({ offset: 2 * P + 1, size: 1 }), P, 'whole pages count');
    all[7 * P] = 1;
    memory.discard({ offset: 2 * P, size: P });
    t.same([all[2 * P], all[3 * P]], [0, 9], 'the discarded page is zero in every view, the next is not');
    memory.discard({ offset: 0, size: 8 * P });
    t.equal(memory.residentBytes(), 0);
    t.equal(
      all.some((byte) => byte !== 0),
      false,
    );
    refused(t, () => memory.discard({ offset: 1, size: P }), 'ERR_OUT_OF_RANGE', 'whole pages');
    refused(t, () => memory.discard({ offset: 0, size: P + 1 }), 'ERR_OUT_OF_RANGE', 'whole pages');
    refused(t, () => memory.discard({ offset: 8 * P, size: P }), 'ERR_OUT_OF_RANGE', 'past the end');
    refused(t, () => memory.discard(undefined as never), 'ERR_INVALID_ARG_TYPE', 'range');
    for (const call of [
      () => memory.bytes({ offset: 0, size: 9 * P }),
      () => memory.residentBytes({ offset: 8 * P, size: 1 }),
    ])
      refused(t, call, 'ERR_OUT_OF_RANGE', 'past the end');
    refused(t, () => memory.bytes({ offset: 0, size: 0 }), 'ERR_OUT_OF_RANGE', 'size');
    all[0] = 42;
    memory.close();
    t.same([memory.closed, all.length, part.length], [true, 0, 0], 'close() detaches the views');
    memory.close();
  });
}

await everywhere(t, 'a file persists, and is as large as asked for', (t, { backend, kvm, P }) => {
  const path = join(folder, `persistent ${backend.name}`);
  const open = (pages: number) => kvm.createHostMemory({ size: pages * P, kind: 'file', path });
  const vm = kvm.createVm();
  {
    using memory = open(4);
    vm.createMemslot({ address: 0, size: 4 * P, hostMemory: memory });
    vm.memory.write(3 * P + 1, new TextEncoder().encode('still here'));
  }
  t.equal(statSync(path).size, 4 * P);
  t.equal(statSync(path).mode & 0o777, 0o600, 'nobody else reads it');
  t.equal(
    readFileSync(path)
      .subarray(3 * P + 1, 3 * P + 11)
      .toString(),
    'still here',
  );
  {
    using smaller = open(1);
    t.equal(smaller.size, P);
  }
  t.equal(statSync(path).size, 4 * P, 'a larger file is not cut');
  {
    using larger = open(6);
    t.equal(Buffer.from(larger.bytes({ offset: 3 * P + 1, size: 10 })).toString(), 'still here');
    t.equal(statSync(path).size, 6 * P, 'a shorter one grows');
  }
  const existing = join(folder, `existing ${backend.name}`);
  writeFileSync(existing, 'abc');
  using memory = kvm.createHostMemory({ size: P, kind: 'file', path: existing });
  t.equal(Buffer.from(memory.bytes({ offset: 0, size: 4 })).toString(), 'abc\0');
  memory.close();
  t.match(readFileSync(existing).subarray(0, 3).toString(), 'abc');
});

await everywhere(t, 'files that cannot be memory', (t, { kvm, P }) => {
  const open = (path: string) => () => kvm.createHostMemory({ size: P, kind: 'file', path });
  const missing = refused(t, open(join(folder, 'no/such/folder')), 'ENOENT', 'open');
  t.type(missing, KvmError);
  t.match(missing, { syscall: 'open', args: { path: join(folder, 'no/such/folder') } });
  refused(t, open(folder), 'EISDIR');
  refused(t, () => kvm.createHostMemory({ size: P, kind: 'file' }), 'ERR_INVALID_ARG_TYPE', 'path');
  refused(t, open('a\0b'), 'ERR_INVALID_ARG_TYPE', 'path');
});

await everywhere(t, 'huge pages that are not there', (t, { backend, kvm }) => {
  const create = () => kvm.createHostMemory({ size: 4 * MiB, kind: 'hugetlb' });
  refused(t, () => kvm.createHostMemory({ size: 3 * MiB, kind: 'hugetlb' }), 'ERR_OUT_OF_RANGE', '2 MiB');
  if (
    backend.name !== 'kvm' ||
    Number(readFileSync('/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages', 'utf8')) > 1
  ) {
    using memory = create();
    t.equal(memory.kind, 'hugetlb');
    refused(t, () => memory.discard({ offset: 0, size: kvm.pageSize }), 'ERR_OUT_OF_RANGE', String(2 * MiB));
    return;
  }
  const error = refused(
    t,
    create,
    'ENOMEM',
    '2 free huge pages of 2 MiB',
    'echo 2 > /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages',
  );
  t.match(error, { syscall: 'mmap', errno: -12, args: { size: 4 * MiB, hugePageSize: 2 * MiB } });
  refused(
    t,
    () => kvm.createHostMemory({ size: 32 * MiB, kind: 'hugetlb', hugePageSize: 16 * MiB }),
    'EINVAL',
    '16 MiB',
  );
});

await everywhere(t, 'NUMA nodes', (t, { kvm, P }) => {
  using memory = kvm.createHostMemory({ size: P, numaNode: 0 });
  memory.bytes()[0] = 1;
  const before = openFiles();
  for (const kind of ['anonymous', 'memfd'] as const) {
    const error = refused(t, () => kvm.createHostMemory({ size: P, kind, numaNode: 999 }), 'EINVAL', 'NUMA node 999');
    t.match(error, { syscall: 'mbind', args: { numaNode: 999 } });
  }
  t.same(openFiles(), before, 'what was refused left nothing open');
  for (const numaNode of [-1, 1024, 0.5])
    refused(t, () => kvm.createHostMemory({ size: P, numaNode }), 'ERR_OUT_OF_RANGE', 'numaNode');
});

await everywhere(t, 'sizes', (t, { kvm, P }) => {
  refused(t, () => kvm.createHostMemory({ size: P + 1 }), 'ERR_OUT_OF_RANGE', 'multiple');
  refused(t, () => kvm.createHostMemory({ size: 0 }), 'ERR_OUT_OF_RANGE', 'size');
  refused(
    t,
    () => kvm.createHostMemory({ size: P, kind: 'swap' as 'memfd' }),
    'ERR_OUT_OF_RANGE',
    'anonymous',
    'hugetlb',
  );
  refused(t, () => kvm.createHostMemory({ size: 2 ** 52 }), 'ENOMEM', 'mmap');
  using huge = kvm.createHostMemory({ size: 64 * GiB });
  refused(t, () => huge.bytes(), 'ERR_OUT_OF_RANGE', '4 GiB');
  const last = huge.bytes({ offset: 64 * GiB - 16, size: 16 });
  last[15] = 1;
  t.equal(huge.residentBytes({ offset: 64 * GiB - P, size: P }), P);
  huge.close();
  t.equal(last.length, 0);
});

await everywhere(t, 'guest_memfd: pages come and go', (t, { vm, P, closed }) => {
  const file = closed(8);
  t.equal(file.size, 8 * P);
  t.equal(file.residentBytes(), 0);
  file.allocate({ offset: 2 * P, size: 3 * P });
  t.equal(file.residentBytes(), 3 * P);
  t.equal(file.residentBytes({ offset: 0, size: 3 * P }), P);
  file.punchHole({ offset: 3 * P, size: P });
  t.equal(file.residentBytes(), 2 * P);
  file.allocate();
  t.equal(file.residentBytes(), 8 * P);
  vm.createMemslot({ address: 0, size: 8 * P, guestMemfd: file });
  file.punchHole();
  t.equal(file.residentBytes(), 0, 'also under a slot');
  file.punchHole();
  for (const call of [() => file.allocate({ offset: 1, size: P }), () => file.punchHole({ offset: 0, size: 1 })]) {
    const error = refused(t, call, 'EINVAL', 'fallocate', 'whole pages');
    t.match(error, { syscall: 'fallocate', request: null, errno: -22 });
  }
  for (const call of [
    () => file.allocate({ offset: 0, size: 9 * P }),
    () => file.punchHole({ offset: 8 * P, size: P }),
  ])
    refused(t, call, 'ERR_OUT_OF_RANGE', 'past the end');
});

await everywhere(t, 'guest_memfd: only some are for the host', (t, { vm, P }) => {
  for (const [options, flags] of [
    [{}, 0n],
    [{ mmap: true }, 1n],
    [{ initShared: true }, 2n],
    [{ flags: 1n }, 1n],
  ] as const) {
    const file = vm.createGuestMemfd({ size: P, ...options });
    t.equal(file.flags, flags);
    refused(t, () => file.bytes(), 'UNSUPPORTED', '{ mmap: true, initShared: true }', '6.18');
  }
  const file = vm.createGuestMemfd({ size: 4 * P, mmap: true, flags: 2n });
  t.equal(file.flags, 3n);
  const [all, part] = [file.bytes(), file.bytes({ offset: P, size: P })];
  part[0] = 7;
  t.equal(all[P], 7);
  t.equal(file.residentBytes(), P, 'a touch makes a page');
  file.punchHole();
  t.same([part[0], all[P]], [0, 0], 'views stay over a punch, and read zeros');
  part[0] = 8;
  file.allocate();
  t.equal(all[P], 8, 'allocate() keeps what is there');
  file.close();
  t.same([all.length, part.length], [0, 0]);
  refused(
    t,
    () => vm.createGuestMemfd({ size: 8 * GiB, mmap: true, initShared: true }).bytes(),
    'ERR_OUT_OF_RANGE',
    '4 GiB',
  );
});

await everywhere(t, 'guest_memfd: its fd', (t, { backend, vm, P }) => {
  const [one, two] = [vm.createGuestMemfd({ size: P }), vm.createGuestMemfd({ size: P })];
  t.ok(Number.isInteger(one.fd) && one.fd > 2 && one.fd !== two.fd);
  if (backend.name === 'kvm') {
    t.match(readFileSync(`/proc/self/fdinfo/${one.fd}`, 'utf8'), /^flags:\s*0?2\d{6}$/m, 'FD_CLOEXEC is set');
    t.equal(openFiles().filter((name) => /gmem|kvm-gmem/.test(name)).length, 2);
  }
  one.close();
  refused(t, () => one.fd, 'ERR_CLOSED', 'guest_memfd');
});

await everywhere(t, 'pins are held, and let go once', (t, { vm, P }) => {
  const file = vm.createGuestMemfd({ size: 4 * P });
  using pin = file.pin({ offset: 1, size: 2 });
  t.type(pin[Symbol.dispose], 'function');
  refused(t, () => file.pin({ offset: 0, size: 5 * P }), 'ERR_OUT_OF_RANGE');
  refused(t, () => file.pin(undefined as never), 'ERR_INVALID_ARG_TYPE');
  file.close();
  pin[Symbol.dispose]();
  pin[Symbol.dispose]();
});

await everywhere(
  t,
  'seed 0.7: pages of a guest_memfd are never swapped',
  (t, { shared }) => {
    const unevictable = (): number =>
      1024 * Number(/^Unevictable: +(\d+) kB$/m.exec(readFileSync('/proc/meminfo', 'utf8'))?.[1]);
    const file = shared(4096);
    const before = unevictable();
    file.allocate();
    const grown = unevictable() - before;
    // Others on this machine lock and unlock pages too.
    t.ok(grown > 0.9 * file.size, `${grown} of ${file.size} bytes are Unevictable in /proc/meminfo`);
  },
  backends.filter(({ name }) => name === 'kvm'),
);
