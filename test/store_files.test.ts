import fs, { cpSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import zlib from 'node:zlib';
import t from 'tap';
import { GuestMemoryStore, Kvm, KvmError, type StoredMemory } from '../lib/index.ts';
import { dataExtents } from '../lib/kernel/data_extents.ts';
import { internal } from '../lib/resource.ts';
import { Disk, type FileSystem } from '../lib/store/disk.ts';
import { BadMetadata, decode, encode, encodeRanges, HEADER_SIZE, type Metadata } from '../lib/store/metadata.ts';
import { MetadataFile } from '../lib/store/metadata_file.ts';
import { ERRNO } from '../lib/uapi.ts';
import { refused } from './backends.ts';
import { FailingKernel } from './failing_kernel.ts';

// The files of a store: torn, cut, changed, in the way. No kernel is asked.

const folder = mkdtempSync(join(tmpdir(), 'guest-memfd-'));
t.teardown(() => rmSync(folder, { recursive: true }));
let folders = 0;
const place = (): string => join(folder, `${folders++}`);
const text = (bytes: Uint8Array): string => Buffer.from(bytes).toString();

const software = (): Kvm => Kvm.open({ backend: 'software' });
const openWith = (kvm: Kvm, path: string, files: FileSystem): GuestMemoryStore => {
  const vm = kvm.createVm();
  const { kernel } = vm.backing;
  vm.close();
  return GuestMemoryStore.open(internal, kvm, kernel, path, {}, () => {}, files);
};

class Dead extends Error {}

/** Files of a process that dies at its n-th call: a write is torn, and no later call does anything. */
function mortal(dies: number, torn: number): FileSystem {
  let calls = 0;
  return new Proxy(fs, {
    get: (target, name) => {
      const value = Reflect.get(target, name);
      if (typeof value !== 'function') return value;
      return (...args: unknown[]) => {
        const at = calls++;
        if (at < dies) return value.apply(target, args);
        if (at === dies && name === 'writeSync') {
          const [fd, bytes, offset, length, position] = args as [number, Uint8Array, number, number, number];
          fs.writeSync(fd, bytes, offset, Math.floor(length * torn), position);
        }
        throw new Dead();
      };
    },
  }) as FileSystem;
}

/** What another process finds. */
function found(path: string): string {
  const copy = place();
  cpSync(path, copy, { recursive: true, filter: (source) => !/writer\.\d+$/.test(source) });
  using kvm = software();
  using store = kvm.openStore(copy);
  const what = store.list().map((name) => {
    const memory = store.open(name);
    return `${name} ${memory.size} ${[...memory.tags].join()} ${text(readFileSync(join(copy, name, 'data')).subarray(0, 4))}`;
  });
  rmSync(copy, { recursive: true });
  return what.join('; ');
}

t.test('seed 3.5: killed at every call of every update: the old state or the new one', (t) => {
  const updates: Record<string, (store: GuestMemoryStore, memory: StoredMemory) => void> = {
    tags: (_, memory) => memory.setTags({ state: 'new', much: 'x'.repeat(9000) }),
    create: (store) => store.create('second', { size: 8192, tags: { a: 'b' } }),
    remove: (store, memory) => {
      memory.close();
      store.remove('guest');
    },
  };
  for (const [name, update] of Object.entries(updates)) {
    const outcomes = new Set<string>();
    let alive = false;
    for (let step = 0; !alive; step++) {
      const path = place();
      using kvm = software();
      const life = mortal(Number.POSITIVE_INFINITY, 0);
      let current = life;
      const files = new Proxy(fs, { get: (_, key) => Reflect.get(current, key) }) as FileSystem;
      const store = openWith(kvm, path, files);
      const memory = store.create('guest', { size: 4096, tags: { state: 'first' } });
      memory.setTags({ state: 'old' });
      writeFileSync(join(path, 'guest', 'data'), 'data', { flag: 'r+' });
      outcomes.add(found(path));
      current = mortal(step, 0.3);
      try {
        update(store, memory);
        alive = true;
      } catch (error) {
        if (!(error instanceof Dead)) throw error;
      }
      current = life;
      outcomes.add(found(path));
      rmSync(path, { recursive: true });
    }
    // What was before, what the last one made, and nothing else on the way.
    t.equal(outcomes.size, 2, `${name}: ${[...outcomes].join(' | ').slice(0, 120)}`);
  }
  t.end();
});

/** A generator that gives the same each time. */
function random(seed: number): (below: number) => number {
  let state = seed;
  return (below) => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return Math.floor((state / 2 ** 32) * below);
  };
}

const sample = (tag: string, ranges = 40): Metadata => ({
  ...{ size: 1 << 20, arch: 'x86_64', vmType: 'sw-protected', pageSize: 4096, isSnapshot: false },
  tags: new Map([['tag', tag]]),
  regions: [
    { kind: 'host', size: 1 << 20, flags: 0n, dataOffset: 0 },
    { kind: 'guest-memfd', size: 1 << 16, flags: 3n, dataOffset: null },
  ],
  slots: [
    {
      ...{ slot: 3, address: 0, size: 65536, host: 0, hostOffset: 4096, guestMemfd: 1, guestMemfdOffset: 0 },
      ...{ readonly: false, logDirtyPages: false },
    },
  ],
  users: [{ name: 'nic', holds: [{ address: 5, size: 6 }] }],
  vcpus: [{ id: 0, state: [{ call: 'ioctl', number: 1n, bytes: new Uint8Array(30) }] }],
  privatePages: encodeRanges(
    Array.from({ length: ranges }, (_, i) => ({ start: 3 * i, end: 3 * i + 1 })),
    ranges,
  ),
});

/** Metadata as a store finds them, from two copies. */
function opened(path: string, copies: readonly (Uint8Array | null)[]): string {
  copies.forEach((bytes, index) => {
    const file = join(path, 'guest', `metadata.${index}`);
    if (bytes) writeFileSync(file, bytes);
    else rmSync(file, { force: true });
  });
  using kvm = software();
  using store = kvm.openStore(path, { readOnly: true });
  try {
    return store.open('guest').tags.get('tag') ?? 'no tag';
  } catch (error) {
    if (error instanceof KvmError && error.code === 'ERR_CORRUPT') return 'ERR_CORRUPT';
    throw error;
  }
}

function prepared(): string {
  const path = place();
  mkdirSync(join(path, 'guest'), { recursive: true });
  writeFileSync(join(path, 'guest', 'data'), new Uint8Array(1 << 20));
  return path;
}

/** The same from copies that are in memory, because ten thousand are many. */
function readBack(copies: readonly Uint8Array[]): string {
  const files = {
    openSync: (path: string) => Number(path.at(-1)),
    closeSync: () => {},
    fstatSync: (fd: number) => ({ size: copies[fd]?.length }),
    readSync: (fd: number, target: Uint8Array, offset: number, length: number, position: number) => {
      const bytes = copies[fd]?.subarray(position, position + length) ?? new Uint8Array(0);
      target.set(bytes, offset);
      return bytes.length;
    },
  };
  try {
    return new MetadataFile(new Disk(files as unknown as FileSystem), 'guest').read().tags.get('tag') ?? 'no tag';
  } catch (error) {
    if (error instanceof KvmError && error.code === 'ERR_CORRUPT') return 'ERR_CORRUPT';
    throw error;
  }
}

t.test('metadata of every length are read as they were written', (t) => {
  for (let length = 0; length < 1200; length++) {
    const tag = 'x'.repeat(length);
    const { tags, ...rest } = decode(encode(sample(tag), 1n)).metadata;
    const { tags: _, ...written } = sample(tag);
    if (tags.get('tag') !== tag) t.fail(`${length} bytes of tag`);
    if (length % 100 === 0) t.same(rest, written);
  }
  t.end();
});

t.test('seed 3.5: 10 000 updates cut anywhere', (t) => {
  const below = random(5);
  const [older, old, next] = [
    encode(sample('older', 70), 5n),
    encode(sample('old'), 6n),
    encode(sample('new', 55), 7n),
  ];
  const outcomes = { old: 0, new: 0 };
  for (let i = 0; i < 10_000; i++) {
    const cut = below(next.length + 1);
    // The disk has any prefix of what was written, over what was there, or a file that ends there.
    const torn = below(2) ? Buffer.concat([next.subarray(0, cut), older.subarray(cut)]) : next.subarray(0, cut);
    outcomes[readBack([torn, old]) as 'old' | 'new']++;
  }
  t.equal(outcomes.old + outcomes.new, 10_000, JSON.stringify(outcomes));
  t.ok(outcomes.old > 0 && outcomes.new > 0);
  const path = prepared();
  t.same(
    [opened(path, [next, old]), opened(path, [next.subarray(0, 99), old]), opened(path, [null, next])],
    ['new', 'old', 'new'],
  );
  t.same([opened(path, [null, null]), opened(path, [next.subarray(0, 9), null])], ['ERR_CORRUPT', 'ERR_CORRUPT']);
  t.end();
});

t.test('seed 3.5: 10 000 mutations: a typed error, or a correct older state', (t) => {
  const below = random(9);
  const [old, last] = [encode(sample('old'), 5n), encode(sample('last', 60), 6n)];
  const mutate = (bytes: Uint8Array): Uint8Array => {
    const copy = Uint8Array.from(bytes);
    switch (below(4)) {
      case 0:
        return copy.subarray(0, below(copy.length));
      case 1:
        return Buffer.concat([copy, new Uint8Array(1 + below(100))]);
      case 2:
        flip(copy, below(copy.length), 1 << below(8));
        return copy;
      default:
        copy.fill(below(256), below(copy.length), below(copy.length));
        flip(copy, below(copy.length), 0xff);
        return copy;
    }
  };
  const outcomes = new Map<string, number>();
  for (let i = 0; i < 10_000; i++) {
    const both = below(4) === 0;
    const outcome = readBack([both ? mutate(old) : old, mutate(last)]);
    const allowed = both ? ['ERR_CORRUPT'] : ['old'];
    if (!allowed.includes(outcome)) t.fail(`${outcome} of mutation ${i}`);
    outcomes.set(outcome, (outcomes.get(outcome) ?? 0) + 1);
  }
  t.same([...outcomes.keys()].sort(), ['ERR_CORRUPT', 'old']);
  // And with checksums that are right, as somebody hostile would make them.
  let refusals = 0;
  for (let i = 0; i < 10_000; i++) {
    const bytes = encode(sample('last', 4), 6n);
    const body = bytes.subarray(HEADER_SIZE);
    for (let changes = below(3); changes >= 0; changes--) body[below(body.length)] = below(256);
    if (below(8) === 0) body.fill(255, below(body.length));
    try {
      decode(resealed(body));
    } catch (error) {
      if (!(error instanceof BadMetadata)) throw error;
      refusals++;
    }
  }
  t.ok(refusals > 1000, `${refusals} refused`);
  t.end();
});

function flip(bytes: Uint8Array, at: number, bits: number): void {
  bytes[at] = (bytes[at] as number) ^ bits;
}

/** A body with a header that fits it. */
function resealed(body: Uint8Array): Uint8Array {
  const copy = Buffer.concat([encode(sample('x', 0), 6n).subarray(0, HEADER_SIZE), body]);
  copy.writeBigUInt64LE(BigInt(body.length), 24);
  copy.writeUInt32LE(zlib.crc32(body), 32);
  copy.writeUInt32LE(zlib.crc32(copy.subarray(0, 36)), 36);
  return copy;
}

t.test('a store with a million ranges', (t) => {
  const path = prepared();
  t.equal(opened(path, [encode(sample('many', 1_000_000), 1n), null]), 'many');
  t.end();
});

t.test('what stands in the way is said, and nothing is lost', (t) => {
  using kvm = software();
  const path = place();
  let errno: string | null = null;
  const files = new Proxy(fs, {
    get: (target, name) => {
      const value = Reflect.get(target, name);
      if (name !== 'writeSync' && name !== 'ftruncateSync') return value;
      return (...args: unknown[]) => {
        if (errno) throw Object.assign(new Error(errno), { code: errno, syscall: 'write' });
        return value.apply(target, args);
      };
    },
  }) as FileSystem;
  {
    using store = openWith(kvm, path, files);
    const memory = store.create('guest', { size: 8192, tags: { tag: 'old' } });
    errno = 'ENOSPC';
    refused(t, () => memory.setTags({ tag: 'new' }), 'ENOSPC', 'full', path);
    t.equal(memory.tags.get('tag'), 'old');
    refused(t, () => store.create('second', { size: 4096 }), 'ENOSPC', 'full');
    t.same(
      readdirSync(path).filter((name) => !name.startsWith('writer')),
      ['guest'],
      'no rest of it',
    );
    errno = 'EFBIG';
    refused(t, () => store.create('second', { size: 4096 }), 'EFBIG', 'that large');
    errno = null;
    t.equal(found(path).includes('tag,old'), true);
    memory.setTags({ tag: 'newer' });
    t.match(found(path), 'tag,newer');

    refused(t, () => kvm.openStore(path), 'EBUSY', `${process.pid}`, 'readOnly');
    using reader = kvm.openStore(path, { readOnly: true });
    const seen = reader.open('guest');
    t.equal(seen.tags.get('tag'), 'newer');
    memory.setTags({ tag: 'newest' });
    t.equal(reader.open('guest').tags.get('tag'), 'newest', 'a reader sees what was recorded since');
    for (const call of [
      () => seen.hostMemory,
      () => seen.setTags({}),
      () => reader.create('x', { size: 4096 }),
      () => reader.remove('guest'),
    ])
      refused(t, call, 'EROFS', 'readOnly');
  }
  using next = kvm.openStore(path);
  t.same(next.list(), ['guest'], 'a store that was closed can be opened');
  refused(t, () => next.open('none'), 'ENOENT', 'does not exist');
  refused(t, () => next.remove('none'), 'ENOENT', 'does not exist');
  refused(t, () => next.create('guest', { size: 4096 }), 'EEXIST', 'exists already');
  for (const name of ['', '.', '..', 'a/b', '../x', 'writer.1', 'x'.repeat(101), '-a'])
    refused(t, () => next.create(name, { size: 4096 }), 'ERR_OUT_OF_RANGE', 'name');
  refused(t, () => next.create('x', { size: 100 }), 'ERR_OUT_OF_RANGE', 'multiple');
  const file = join(path, 'guest', 'data');
  fs.truncateSync(file, 4096);
  refused(t, () => next.open('guest'), 'ERR_CORRUPT', 'cut it');
  refused(t, () => kvm.openStore(file), 'EEXIST');
  t.end();
});

t.test('a lock whose process is gone, or another’s', (t) => {
  using kvm = software();
  const path = place();
  kvm.openStore(path).close();
  const [name = ''] = readdirSync(path);
  const lock = join(path, name);
  const own = { pid: 2 ** 22 + 1, started: '1', host: '', boot: '', namespace: '' };
  {
    using store = kvm.openStore(path);
    const now = join(path, readdirSync(path)[0] ?? '');
    t.not(now, lock, 'the next number');
    Object.assign(own, JSON.parse(readFileSync(now, 'utf8')));
    t.equal(own.pid, process.pid);
    t.equal(store.readOnly, false);
  }
  const held = (holder: object | string) => {
    const at = join(path, readdirSync(path)[0] ?? '');
    writeFileSync(at, typeof holder === 'string' ? holder : JSON.stringify(holder));
    const error = (() => {
      try {
        kvm.openStore(path).close();
        return null;
      } catch (error) {
        return (error as KvmError).code;
      }
    })();
    return error;
  };
  t.equal(held({ ...own, started: '7' }), null, 'the number was used again');
  t.equal(held(own), 'EBUSY');
  t.equal(held({ ...own, boot: 'before' }), null, 'the host has restarted');
  t.equal(held({ ...own, boot: 'x', host: 'elsewhere' }), 'EBUSY', 'another host cannot be asked');
  t.equal(held({ ...own, namespace: 'pid:[1]' }), 'EBUSY', 'nor another container');
  for (const odd of ['null', '{', '[]', '{"pid":"x"}', '{"pid":-1}']) t.equal(held(odd), 'EBUSY', odd);
  t.equal(held(''), null, 'let go');
  t.end();
});

t.test('a file system without holes', (t) => {
  t.same([...dataExtents({ lseek: () => -ERRNO.EINVAL }, 3, 0, 100)], [{ start: 0, end: 100 }]);
  const failing = new FailingKernel();
  using store = failing.kvm.openStore(place());
  const memory = store.create('guest', { size: 8192 });
  Object.assign(failing, { failAt: 0, forEver: true, errno: ERRNO.EOPNOTSUPP });
  memory.hostMemory.bytes()[1] = 7;
  refused(t, () => memory.hostMemory.discard({ offset: 0, size: 4096 }), 'EOPNOTSUPP');
  t.equal(memory.hostMemory.bytes()[1], 7);
  memory.sync();
  t.same(memory.extents()[0]?.offset, 0);
  failing.kvm.close();
  t.end();
});
