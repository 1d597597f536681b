import { spawnSync } from 'node:child_process';
import {
  closeSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  readSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import t from 'tap';
import { GiB, GuestAgent, handOver, KvmError, MiB, takeOver } from '../lib/index.ts';
import { type Kernel, linuxKernel, softwareKernel } from '../lib/kernel/index.ts';
import {
  ERRNO,
  errnoName,
  F_GET_SEALS,
  MADV_DONTNEED,
  MADV_PAGEOUT,
  MADV_POPULATE_READ,
  MADV_REMOVE,
  MAP_PRIVATE,
  MAP_SHARED,
  MS_SYNC,
  O_CLOEXEC,
  PROT_EXEC,
  PROT_READ,
  PROT_WRITE,
} from '../lib/uapi.ts';
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
    'UNSUPPORTED',
    'no huge pages of 16 MiB',
  );
});

await everywhere(
  t,
  'seed 3.3, seed 3.4: guest memory in huge pages, stored and handed over',
  async (t, { backend, kvm, vm, P }) => {
    const [path, data] = [join(folder, 'store'), mkdtempSync(join(folder, 'huge-'))];
    refused(t, () => kvm.openStore(path, { data: join(data, 'nowhere') }), 'ENOENT');
    // Takes a privilege, which a machine of ours and most containers give.
    if (spawnSync('mount', ['-t', 'hugetlbfs', '-o', 'pagesize=2M', 'none', data]).status !== 0) return;
    const pool = '/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages';
    const before = readFileSync(pool, 'utf8').trim();
    t.teardown(() => {
      spawnSync('umount', [data]);
      try {
        writeFileSync(pool, before);
      } catch {
        // Nor could it be changed.
      }
    });
    if (backend.name !== 'kvm') {
      using store = kvm.openStore(path, { data });
      refused(
        t,
        () => store.create(backend.name.replaceAll(' ', '-'), { size: 2 * MiB }).hostMemory,
        'UNSUPPORTED',
        'hugetlbfs',
      );
      return;
    }
    refused(t, () => kvm.openStore(data), 'EINVAL', 'hugetlbfs', '{ data:');
    const store = kvm.openStore(path, { data });
    refused(t, () => store.create('odd', { size: 3 * MiB }), 'ERR_OUT_OF_RANGE', '2 MiB');
    const far = store.create('too-large', { size: 2 ** 40 });
    refused(t, () => far.hostMemory, 'ENOMEM', `${2 ** 19} free huge pages of 2 MiB`, 'echo');
    far.close();
    store.remove('too-large');

    try {
      writeFileSync(pool, String(Number(before) + 8));
    } catch {
      return;
    }
    if (Number(readFileSync(pool, 'utf8')) < Number(before) + 8) return;
    const memory = store.create('guest', { size: 4 * MiB });
    vm.createMemslot({ address: 0, size: 4 * MiB, hostMemory: memory.hostMemory });
    const agent = GuestAgent.boot(vm, { address: 0 });
    agent.write(3 * MiB, Buffer.from('huge'));
    memory.record(vm);
    t.equal(memory.hostMemory.residentBytes(), 4 * MiB);
    t.same(memory.extents(), [{ offset: 0, size: 4 * MiB }]);
    memory.sync();
    agent.close();
    vm.close();
    store.close();

    // Whoever comes next need not know where the bytes are.
    using again = kvm.openStore(path);
    using next = kvm.createVm();
    again.attach(next, 'guest');
    using there = GuestAgent.boot(next, { address: 0 });
    t.equal(Buffer.from(there.read(3 * MiB, 4)).toString(), 'huge');
    there.close();
    const { hostMemory } = again.open('guest');
    refused(t, () => hostMemory.discard({ offset: 0, size: P }), 'ERR_OUT_OF_RANGE', String(2 * MiB));
    hostMemory.discard({ offset: 2 * MiB, size: 2 * MiB });
    t.equal(hostMemory.residentBytes(), 2 * MiB);
    next.close();
    again.open('guest').close();
    t.equal(readdirSync(data).length, 1);
    again.remove('guest');
    t.same(readdirSync(data), []);

    const huge = kvm.createHostMemory({ size: 4 * MiB, kind: 'hugetlb' });
    using giver = kvm.createVm();
    giver.createMemslot({ address: 0, size: 4 * MiB, hostMemory: huge });
    giver.memory.write(3 * MiB, Buffer.from('handed'));
    const socket = join(folder, 'socket');
    const [, taken] = await Promise.all([handOver(giver, { path: socket }), takeOver(kvm, { path: socket })]);
    t.equal(Buffer.from(taken.vm.memory.read(3 * MiB, 6)).toString(), 'handed');
    const [slot] = taken.vm.memslots.values();
    t.match(slot?.hostMemory, { kind: 'hugetlb', size: 4 * MiB });
    refused(t, () => slot?.hostMemory?.discard({ offset: 0, size: P }), 'ERR_OUT_OF_RANGE', String(2 * MiB));
    taken.vm.close();
    giver.close();
  },
);

await everywhere(t, 'NUMA nodes', (t, { kvm, P }) => {
  using memory = kvm.createHostMemory({ size: P, numaNode: 0 });
  memory.bytes()[0] = 1;
  const before = openFiles();
  for (const kind of ['anonymous', 'memfd'] as const) {
    const error = refused(t, () => kvm.createHostMemory({ size: P, kind, numaNode: 999 }), 'EINVAL', 'NUMA node 999');
    t.match(error, { syscall: 'mbind', args: { mode: 'bind', nodes: [999] } });
  }
  t.same(openFiles(), before, 'what was refused left nothing open');
  for (const numaNode of [-1, 1024, 0.5])
    refused(t, () => kvm.createHostMemory({ size: P, numaNode }), 'ERR_OUT_OF_RANGE', 'numaNode');
});

await everywhere(t, 'seed 3.10: a NUMA policy for each range of host memory', (t, { kvm, vm, P }) => {
  for (const kind of ['anonymous', 'memfd', 'file'] as const) {
    const path = join(folder, `placed ${process.pid}`);
    using memory = kvm.createHostMemory({ size: 8 * P, kind, ...(kind === 'file' ? { path } : {}) });
    t.equal(memory.numaPolicyAt(0), 'default');
    memory.setNumaPolicy({ mode: 'bind', nodes: [0] }, { offset: 2 * P, size: 2 * P });
    memory.setNumaPolicy({ mode: 'interleave', nodes: [0] }, { offset: 6 * P, size: P });
    t.same(
      [0, 1, 2, 3, 4, 6, 7].map((page) => memory.numaPolicyAt(page * P + 1)),
      ['default', 'default', 'bind', 'bind', 'default', 'interleave', 'default'],
    );
    memory.bytes().fill(1);
    memory.setNumaPolicy({ mode: 'local' });
    t.equal(memory.numaPolicyAt(8 * P - 1), 'local');
    memory.setNumaPolicy({ mode: 'default' });
    refused(t, () => memory.setNumaPolicy({ mode: 'bind', nodes: [999] }), 'EINVAL', 'NUMA node 999', 'online');
    t.equal(memory.numaPolicyAt(0), 'default', 'and nothing has changed');
    refused(t, () => memory.setNumaPolicy({ mode: 'bind' }), 'ERR_OUT_OF_RANGE', 'nodes');
    refused(t, () => memory.setNumaPolicy({ mode: 'local', nodes: [0] }), 'ERR_OUT_OF_RANGE', 'names no nodes');
    refused(t, () => memory.setNumaPolicy({ mode: 'preferred', nodes: [0, 1] }), 'ERR_OUT_OF_RANGE', 'one node');
    refused(t, () => memory.setNumaPolicy({ mode: 'bind', nodes: [1024] }), 'ERR_OUT_OF_RANGE', 'nodes[0]');
    refused(t, () => memory.setNumaPolicy({ mode: 'near' as 'bind' }), 'ERR_OUT_OF_RANGE', 'policy.mode');
    refused(
      t,
      () => memory.setNumaPolicy({ mode: 'local' }, { offset: 1, size: P }),
      'ERR_OUT_OF_RANGE',
      'whole pages',
    );
    refused(t, () => memory.numaPolicyAt(8 * P), 'ERR_OUT_OF_RANGE', 'offset');
  }
  t.notOk(vm.closed);
});

await everywhere(t, 'seed 3.10: a guest_memfd keeps its policy since Linux 6.19', (t, { kvm, vm, P, shared }) => {
  if (!vm.capabilities.guestMemfdInitShared) return;
  const [major = 0, minor = 0] = kvm.kernelRelease.split('.').map((part) => Number.parseInt(part, 10));
  const file = shared(8);
  const set = () => file.setNumaPolicy({ mode: 'bind', nodes: [0] }, { offset: 2 * P, size: 2 * P });
  if (major > 6 || (major === 6 && minor >= 19)) {
    set();
    t.same(
      [1, 2, 3, 4].map((page) => file.numaPolicyAt(page * P)),
      ['default', 'bind', 'bind', 'default'],
    );
    file.allocate();
    refused(t, () => file.setNumaPolicy({ mode: 'bind', nodes: [999] }), 'EINVAL', 'NUMA node 999');
    refused(t, () => file.setNumaPolicy({ mode: 'local' }, { offset: 1, size: P }), 'EINVAL', 'begin at a page');
    file.setNumaPolicy({ mode: 'default' });
    t.equal(file.numaPolicyAt(2 * P), 'default');
  } else {
    refused(t, set, 'UNSUPPORTED', 'Linux 6.19');
    refused(t, () => file.numaPolicyAt(0), 'UNSUPPORTED', 'Linux 6.19');
  }
  const closed = vm.createGuestMemfd({ size: P });
  refused(t, () => closed.setNumaPolicy({ mode: 'local' }), 'UNSUPPORTED', 'mmap: true');
});

/** Page by page, when they are touched, against the user's limit; before, a mapping of them counts as locked. */
function countsSecrets({ release }: Kernel): boolean {
  const [major = 0, minor = 0] = release.split('.').map((part) => Number.parseInt(part, 10));
  return major > 7 || (major === 7 && minor >= 3);
}

await everywhere(t, 'seed 3.2: secret memory is the host’s alone, and out of the kernel’s reach', (t, world) => {
  const { backend, kvm, vm, P } = world;
  const kernel = backend.model ? softwareKernel(backend.model) : linuxKernel();
  const fd = kernel.memfdSecret(O_CLOEXEC);
  if (fd >= 0) kernel.close(fd);
  const create = () => kvm.createHostMemory({ size: 4 * P, kind: 'secret' });
  if (fd < 0) {
    refused(t, create, 'UNSUPPORTED', 'memfd_secret', 'CONFIG_SECRETMEM', 'Linux 5.14');
    return;
  }
  const memory = create();
  t.match(memory, { kind: 'secret', size: 4 * P });
  t.equal(memory.residentBytes(), countsSecrets(kernel) ? 4 * P : 0, 'a touch that a limit refuses would be SIGBUS');
  const bytes = memory.bytes();
  bytes.set([1, 2, 3], P);
  t.same([...memory.bytes({ offset: P, size: 3 })], [1, 2, 3]);
  if (!backend.model) {
    // What reads the memory of a process for others, and would of any other page.
    using plain = kvm.createHostMemory({ size: P });
    plain.bytes()[0] = 7;
    const self = openSync('/proc/self/mem', 'r');
    t.equal(readSync(self, new Uint8Array(1), 0, 1, plain.address), 1);
    t.throws(() => readSync(self, new Uint8Array(1), 0, 1, memory.address + BigInt(P)), /EIO|EFAULT/);
    closeSync(self);
  }
  refused(t, () => vm.createMemslot({ address: 0, size: P, hostMemory: memory }), 'EINVAL', 'host alone');
  refused(t, () => memory.discard({ offset: 0, size: P }), 'UNSUPPORTED', 'close()');
  memory.setNumaPolicy({ mode: 'bind', nodes: [0] });
  t.same([...bytes.subarray(P, P + 3)], [1, 2, 3]);
  memory.close();
  t.equal(bytes.length, 0, 'close() detaches the views; the kernel zeroes the pages');
  refused(t, () => memory.bytes(), 'ERR_CLOSED');
});

await everywhere(t, 'seed 3.2: secret memory at the boundary', (t, { backend }) => {
  const kernel = backend.model ? softwareKernel(backend.model) : linuxKernel();
  const P = kernel.pageSize;
  const fd = kernel.memfdSecret(O_CLOEXEC);
  if (fd === -ERRNO.ENOSYS) {
    t.equal(kernel.memfdSecret(7), -ERRNO.ENOSYS);
    return;
  }
  const name = (result: number) => (result < 0 ? errnoName(result) : 'ok');
  const eight = new Uint8Array(8);
  const map = (flags: number, prot = PROT_READ | PROT_WRITE) =>
    kernel.mmap({ length: 4 * P, prot, flags, fd, offset: 0 });
  const answers = {
    flags: name(kernel.memfdSecret(7)),
    read: name(kernel.read(fd, eight)),
    write: name(kernel.write(fd, eight)),
    pread: name(kernel.pread(fd, eight, 0)),
    pwrite: name(kernel.pwrite(fd, eight, 0)),
    lseek: name(kernel.lseek(fd, 0, 0)),
    allocate: name(kernel.fallocate(fd, 1, 0, P)),
    punch: name(kernel.fallocate(fd, 3, 0, P)),
    fsync: name(kernel.fsync(fd)),
    seals: name(kernel.fcntl(fd, F_GET_SEALS, 0)),
    size: name(kernel.ftruncate(fd, 4 * P)),
    shorter: name(kernel.ftruncate(fd, 2 * P)),
    same: name(kernel.ftruncate(fd, 4 * P)),
    private: name(map(MAP_PRIVATE)),
    executable: name(map(MAP_SHARED, PROT_READ | PROT_EXEC)),
  };
  t.same(answers, {
    flags: 'EINVAL',
    read: 'EINVAL',
    write: 'EINVAL',
    pread: 'ESPIPE',
    pwrite: 'ESPIPE',
    lseek: 'ESPIPE',
    allocate: 'EOPNOTSUPP',
    punch: 'EOPNOTSUPP',
    fsync: 'EINVAL',
    seals: 'EINVAL',
    size: 'ok',
    shorter: 'EINVAL',
    same: 'EINVAL',
    private: 'EINVAL',
    executable: 'EPERM',
  });
  const mapping = map(MAP_SHARED);
  kernel.window(mapping, 0, P)[0] = 5;
  const residency = new Uint8Array(4);
  kernel.mincore(mapping, 0, 4 * P, residency);
  t.same(
    [...residency].map((byte) => byte & 1),
    [1, 0, 0, 0],
  );
  eight.fill(9);
  t.equal(kernel.poke(mapping, P, eight), 8, 'this process reaches it');
  t.equal(kernel.peek(mapping, P, eight.fill(0)), 8);
  t.same([...eight], new Array(8).fill(9));
  t.same(
    [
      kernel.madvise(mapping, 0, P, MADV_DONTNEED),
      kernel.madvise(mapping, 0, P, MADV_REMOVE),
      kernel.madvise(mapping, 0, P, MADV_POPULATE_READ),
      kernel.madvise(mapping, 0, P, MADV_PAGEOUT),
      kernel.mlock(mapping, 0, P),
      kernel.munlock(mapping, 0, P),
      kernel.madvise(mapping, 0, P, MADV_DONTNEED),
      kernel.msync(mapping, 0, P, MS_SYNC),
    ].map(name),
    countsSecrets(kernel)
      ? ['ok', 'EOPNOTSUPP', 'EINVAL', 'ok', 'ENOMEM', 'ok', 'ok', 'EINVAL']
      : ['EINVAL', 'EINVAL', 'EINVAL', 'EINVAL', 'ENOMEM', 'ok', 'EINVAL', 'EINVAL'],
  );
  t.same([...kernel.window(mapping, 0, P).subarray(0, 1)], [5]);
  kernel.munmap(mapping);
  kernel.close(fd);
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
