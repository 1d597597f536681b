import {
  F_ADD_SEALS,
  F_GET_SEALS,
  F_GETFL,
  MADV_DONTNEED,
  MADV_FREE,
  MADV_POPULATE_READ,
  MADV_POPULATE_WRITE,
  MADV_REMOVE,
  MAP_ANONYMOUS,
  MAP_PRIVATE,
  MAP_SHARED,
  MAP_SHARED_VALIDATE,
  MAP_SYNC,
  MFD_ALLOW_SEALING,
  PROT_EXEC,
  PROT_NONE,
  PROT_READ,
  PROT_WRITE,
  SEEK_CUR,
  SEEK_DATA,
  SEEK_END,
  SEEK_HOLE,
  SEEK_SET,
} from '../../../lib/uapi.ts';
import { numa, userfaultfd } from '../needs.ts';
import { FILE_END, type Scenario, scenario, section } from '../scenario.ts';

// The other side of a slot is ordinary memory: what a memfd and an anonymous mapping do where a guest_memfd does something else.

const text = (string: string) => new TextEncoder().encode(string);
const read = (s: Scenario, file: number, length: number) => {
  const target = new Uint8Array(length);
  return [s.kernel.read(file, target), ...target];
};
/** A memfd of 4 pages, mapped shared, with 7 in page 0. */
const mapped = (s: Scenario) => {
  const file = s.memfd(4);
  const mapping = s.map(file, { pages: 4 });
  s.put(mapping, 0, 7);
  return { file, mapping };
};

export const ordinaryMemory = section('Ordinary memory: memfd and anonymous mappings', [
  scenario('memfd fstat', 'a memfd has a size that changes and blocks that count', {
    given: (s) => s.memfd(),
    when: (s, file) => {
      const before = s.stat(file);
      return [
        before.size,
        before.blocks,
        s.kernel.ftruncate(file, 4 * s.P),
        s.stat(file).size,
        s.stat(file).blocks,
        s.fallocate(file, 0, 0, 2),
        s.stat(file).blocks,
        s.stat(file).nlink,
      ];
    },
    expect: (s) => [0, 0, 0, 4 * s.P, 0, 0, (2 * s.P) / 512, 0],
  }),
  scenario('memfd read', 'a memfd can be read and written, at its position and at an offset', {
    given: (s) => s.memfd(),
    when: (s, file) => [
      s.kernel.write(file, text('abc')),
      s.kernel.lseek(file, 0, SEEK_CUR),
      read(s, file, 2),
      s.kernel.lseek(file, 1, SEEK_SET),
      read(s, file, 4),
      s.kernel.pwrite(file, text('z'), 5),
      s.kernel.lseek(file, 0, SEEK_END),
      s.kernel.pread(file, new Uint8Array(10), 4),
      s.kernel.pread(file, new Uint8Array(10), 100),
      s.kernel.lseek(file, -1, SEEK_SET),
      s.kernel.lseek(file, 0, 99),
    ],
    expect: [3, 3, [0, 0, 0], 1, [2, 98, 99, 0, 0], 1, 6, 2, 0, 'EINVAL', 'EINVAL'],
  }),
  scenario('memfd ftruncate', 'a negative size is EINVAL', {
    given: (s) => s.memfd(1),
    when: (s, file) => [s.kernel.ftruncate(file, -1), s.kernel.ftruncate(file, 0), s.stat(file).size],
    expect: ['EINVAL', 0, 0],
  }),
  scenario('memfd fallocate', 'a memfd grows without KEEP_SIZE, and is punched at any byte', {
    given: (s) => s.memfd(1),
    when: (s, file) => [
      s.fallocate(file, 0, 0, 4),
      s.stat(file).size,
      s.fallocate(file, 1, 0, 8),
      s.stat(file).size,
      s.kernel.fallocate(file, 3, 1, 1),
      s.kernel.fallocate(file, 3, 0, 0),
      s.fallocate(file, 2, 0, 1),
      s.fallocate(file, 0x10, 0, 1),
      s.kernel.fallocate(file, 3, FILE_END - 1n, 1),
    ],
    expect: (s) => [0, 4 * s.P, 0, 4 * s.P, 0, 'EINVAL', 'EOPNOTSUPP', 'EOPNOTSUPP', 'EFBIG'],
  }),
  scenario('memfd punch', 'punching a mapped memfd: the next read finds 0', {
    given: mapped,
    when: (s, { file, mapping }) => [
      s.get(mapping, 0),
      s.cached(file),
      s.fallocate(file, 3, 0, 1),
      s.get(mapping, 0),
      s.put(mapping, 1, 8),
      s.advise(mapping, 1, 1, MADV_REMOVE),
      s.get(mapping, 1),
    ],
    expect: [7, 1, 0, 0, 1, 0, 0],
  }),
  scenario('memfd mapping', 'a shared mapping and the file show the same bytes', {
    given: mapped,
    when: (s, { file, mapping }) => {
      const byte = new Uint8Array(1);
      return [
        s.kernel.pread(file, byte, 0),
        byte[0],
        s.kernel.pwrite(file, Uint8Array.of(9), s.P),
        s.get(mapping, 1),
        s.advise(mapping, 0, 4, MADV_DONTNEED),
        s.get(mapping, 0),
      ];
    },
    expect: [1, 7, 1, 9, 0, 7],
  }),
  scenario('memfd past the end', 'a page past the end of a memfd would be SIGBUS', {
    given: (s) => {
      const file = s.memfd(1);
      return { file, mapping: s.map(file, { pages: 2 }) };
    },
    when: (s, { file, mapping }) => [
      s.get(mapping, 0),
      s.get(mapping, 1),
      s.kernel.ftruncate(file, 2 * s.P),
      s.get(mapping, 1),
      s.kernel.ftruncate(file, 0),
      s.get(mapping, 0),
    ],
    expect: [0, 'EFAULT', 0, 0, 0, 'EFAULT'],
  }),
  scenario('memfd private', 'a private mapping keeps its writes to itself', {
    given: (s) => {
      const { file, mapping } = mapped(s);
      return { mapping, own: s.map(file, { pages: 4, flags: MAP_PRIVATE }) };
    },
    when: (s, { mapping, own }) => [
      s.get(own, 0),
      s.put(own, 0, 9),
      s.get(mapping, 0),
      s.put(mapping, 1, 5),
      s.get(own, 1),
      s.advise(own, 0, 1, MADV_DONTNEED),
      s.get(own, 0),
    ],
    expect: [7, 1, 7, 1, 5, 0, 7],
  }),
  scenario('memfd seals', 'a memfd takes seals only if it was created for them', {
    given: (s) => s.memfd(1),
    when: (s, file) => {
      const sealable = s.memfd(0, MFD_ALLOW_SEALING);
      return [
        s.kernel.fcntl(file, F_GET_SEALS, 0),
        s.kernel.fcntl(file, F_ADD_SEALS, 2),
        s.kernel.fcntl(sealable, F_GET_SEALS, 0),
        s.kernel.fcntl(sealable, F_ADD_SEALS, 6),
        s.kernel.fcntl(sealable, F_GET_SEALS, 0),
        s.kernel.ftruncate(sealable, s.P),
      ];
    },
    expect: [1, 'EPERM', 0, 0, 6, 'EPERM'],
  }),
  scenario('memfd seal effects', 'each seal forbids its own', {
    when: (s) => {
      const sealed = (seals: number) => {
        const file = s.memfd(2, MFD_ALLOW_SEALING);
        return [s.kernel.fcntl(file, F_ADD_SEALS, seals), file] as const;
      };
      const [shrink, noShrink] = sealed(2);
      const [grow, noGrow] = sealed(4);
      const [write, noWrite] = sealed(8);
      const [seal, noSeal] = sealed(1);
      const mapped = s.memfd(1, MFD_ALLOW_SEALING);
      s.map(mapped, { pages: 1 });
      return [
        [shrink, ...[1, 2, 3].map((pages) => s.kernel.ftruncate(noShrink, pages * s.P))],
        [grow, ...[1, 2, 3].map((pages) => s.kernel.ftruncate(noGrow, pages * s.P))],
        [grow, s.kernel.pwrite(noGrow, Uint8Array.of(1), 8 * s.P), s.fallocate(noGrow, 0, 0, 8)],
        [
          write,
          s.kernel.write(noWrite, Uint8Array.of(1)),
          s.fallocate(noWrite, 3, 0, 1),
          s.mmap(noWrite, { pages: 1 }),
          // The mapping's flags are looked at first.
          s.mmap(noWrite, { pages: 1, flags: MAP_SHARED_VALIDATE | MAP_SYNC }),
        ],
        [seal, s.kernel.fcntl(noSeal, F_ADD_SEALS, 2)],
        [s.kernel.fcntl(mapped, F_ADD_SEALS, 8), s.kernel.fcntl(mapped, F_ADD_SEALS, 0x1000)],
      ];
    },
    expect: [
      [0, 'EPERM', 0, 0],
      [0, 0, 'EPERM', 'EPERM'],
      [0, 'EPERM', 'EPERM'],
      [0, 'EPERM', 'EPERM', 'EPERM', 'EOPNOTSUPP'],
      [0, 'EPERM'],
      ['EBUSY', 'EINVAL'],
    ],
  }),
  scenario('memfd data and holes', 'lseek finds data and holes', {
    given: (s) => {
      const file = s.memfd(4);
      s.kernel.pwrite(file, Uint8Array.of(1), s.P);
      return file;
    },
    when: (s, file) => [
      s.kernel.lseek(file, 0, SEEK_DATA) / s.P,
      s.kernel.lseek(file, s.P, SEEK_HOLE) / s.P,
      s.kernel.lseek(file, 0, SEEK_HOLE),
      s.kernel.lseek(file, s.P + 1, SEEK_DATA) - s.P,
      s.kernel.lseek(file, 2 * s.P, SEEK_DATA),
      s.kernel.lseek(file, 3 * s.P, SEEK_HOLE) / s.P,
      s.kernel.lseek(file, 4 * s.P, SEEK_HOLE),
      s.kernel.lseek(file, 9 * s.P, SEEK_DATA),
    ],
    expect: [1, 2, 0, 1, 'ENXIO', 3, 'ENXIO', 'ENXIO'],
  }),
  scenario('memfd read-only mapping', 'a read-only mapping of a memfd can be neither written nor populated for it', {
    given: (s) => s.map(s.memfd(2), { pages: 2, prot: PROT_READ }),
    when: (s, mapping) => [
      s.put(mapping, 0, 1),
      s.advise(mapping, 0, 1, MADV_POPULATE_READ),
      s.advise(mapping, 0, 1, MADV_POPULATE_WRITE),
      s.kernel.msync(mapping, 0, s.P, 5),
      s.kernel.msync(mapping, 0, s.P, 4),
    ],
    expect: ['EFAULT', 0, 'EINVAL', 'EINVAL', 0],
  }),
  scenario('epoll misuse', 'epoll wants its own kind of file and flags it knows', {
    given: (s) => ({ epoll: s.epoll(), file: s.memfd(1) }),
    when: (s, { epoll, file }) => [
      s.kernel.epollCreate1(1),
      s.kernel.epollCtl(file, 1, epoll, 1),
      s.kernel.epollCtl(epoll, 1, epoll, 1),
      s.kernel.epollCtl(epoll, 1, 99999, 1),
      s.kernel.epollCtl(99999, 1, file, 1),
    ],
    expect: ['EINVAL', 'EINVAL', 'EINVAL', 'EBADF', 'EBADF'],
  }),
  scenario('userfaultfd', 'ordinary memory can be registered, after the API was set once', {
    needs: [userfaultfd],
    given: (s) => ({ uffd: s.userfaultfd(), memory: s.anonymous(4), file: s.memfd(1) }),
    when: (s, { uffd, memory, file }) => [
      s.kernel.uffdioRegister(uffd, memory, 0, s.P, 1),
      s.kernel.uffdioApi(uffd, 0),
      s.kernel.uffdioApi(uffd, 0),
      s.kernel.uffdioRegister(uffd, memory, 0, s.P, 0),
      s.kernel.uffdioRegister(uffd, memory, 0, s.P, 8),
      s.kernel.uffdioRegister(uffd, memory, 1, s.P, 1),
      s.kernel.uffdioRegister(uffd, memory, 0, s.P, 1),
      s.kernel.uffdioApi(file, 0),
    ],
    expect: ['EINVAL', 0, 'EINVAL', 'EINVAL', 'EINVAL', 'EINVAL', 0, 'ENOTTY'],
  }),
  scenario('memfd flags', 'memfd_create with unknown flags is EINVAL', {
    when: (s) => [
      s.kernel.memfdCreate('conformance', 0x1000),
      s.kernel.memfdCreate('x'.repeat(250), 0),
      s.closeFd(s.kernel.memfdCreate('x'.repeat(249), 0)),
    ],
    expect: ['EINVAL', 'EINVAL', 0],
  }),
  scenario('memfd F_GETFL', 'a memfd is open for reading and writing', {
    given: (s) => s.memfd(),
    when: (s, file) => s.kernel.fcntl(file, F_GETFL, 0),
    expect: { x86_64: 0x8002, aarch64: 0x20002 },
  }),
  scenario('memfd limits', 'a memfd maps with EXEC, and not at an unaligned offset', {
    given: (s) => s.memfd(1),
    when: (s, file) => [
      s.mmap(file, { pages: 1, offset: 1 }),
      s.mmap(file, { length: 0 }),
      s.mmap(file, { pages: 1, flags: 0 }),
      s.mmap(file, { pages: 1, prot: PROT_READ | PROT_EXEC }),
    ],
    expect: ['EINVAL', 'EINVAL', 'EINVAL', 'ok'],
  }),
  scenario('anonymous', 'anonymous memory starts as 0, and MADV_DONTNEED makes it 0 again', {
    given: (s) => s.anonymous(4),
    when: (s, memory) => [
      s.get(memory, 0),
      s.put(memory, 0, 7),
      s.get(memory, 0),
      s.advise(memory, 0, 4, MADV_DONTNEED),
      s.get(memory, 0),
      s.advise(memory, 0, 4, MADV_FREE),
    ],
    expect: [0, 1, 7, 0, 0, 0],
  }),
  scenario(
    'anonymous shared',
    'shared anonymous memory keeps its bytes over MADV_DONTNEED, and loses them to MADV_REMOVE',
    {
      given: (s) => s.map(-1, { pages: 4, flags: MAP_SHARED | MAP_ANONYMOUS }),
      when: (s, memory) => [
        s.put(memory, 0, 7),
        s.advise(memory, 0, 1, MADV_DONTNEED),
        s.get(memory, 0),
        s.advise(memory, 0, 1, MADV_REMOVE),
        s.get(memory, 0),
        s.advise(memory, 0, 1, MADV_FREE),
      ],
      expect: [1, 0, 7, 0, 0, 'EINVAL'],
    },
  ),
  scenario('anonymous remove', 'private anonymous memory cannot be removed', {
    given: (s) => s.anonymous(1),
    when: (s, memory) => s.advise(memory, 0, 1, MADV_REMOVE),
    expect: 'EINVAL',
  }),
  scenario('anonymous protection', 'memory without access is EFAULT', {
    given: (s) => s.anonymous(2),
    when: (s, memory) => [
      s.protect(memory, PROT_NONE),
      s.get(memory, 0),
      s.get(memory, 1),
      s.protect(memory, PROT_READ),
      s.get(memory, 0),
      s.put(memory, 0, 1),
      s.protect(memory, PROT_READ | PROT_WRITE),
      s.put(memory, 0, 1),
    ],
    expect: [0, 'EFAULT', 0, 0, 0, 'EFAULT', 0, 1],
  }),
  scenario('anonymous residency', 'mincore reports the pages that were touched', {
    given: (s) => s.anonymous(4),
    when: (s, memory) => {
      const residency = new Uint8Array(4);
      return [
        s.put(memory, 2, 1),
        s.kernel.mincore(memory, 0, 4 * s.P, residency),
        ...residency.map((byte) => byte & 1),
      ];
    },
    expect: [1, 0, 0, 0, 1, 0],
  }),
  scenario('anonymous policy', 'a policy is the mapping’s', {
    needs: [numa],
    given: (s) => s.anonymous(4),
    when: (s, memory) => [
      s.kernel.getMempolicy(memory, 0),
      s.kernel.mbind(memory, 0, s.P, 2, [0]),
      s.kernel.getMempolicy(memory, 0),
      s.kernel.getMempolicy(memory, s.P),
      s.kernel.mbind(memory, 0, s.P, 4, [0]),
      s.kernel.mbind(memory, 0, s.P, 0, [0]),
      s.kernel.mbind(memory, 0, s.P, 3, []),
    ],
    expect: [0, 0, 2, 0, 'EINVAL', 'EINVAL', 'EINVAL'],
  }),
  scenario('ordinary slot', 'a slot over a memfd’s mapping, with the memfd’s fd given, is an ordinary slot', {
    given: (s) => ({ vm: s.vm(), ...mapped(s) }),
    when: (s, { vm, file, mapping }) => [
      s.slot(vm, { pages: 4, hva: s.kernel.addressOf(mapping), file }),
      s.munmap(mapping),
      s.slot(vm, { slot: 1, at: 3 }),
      s.remove(vm, 0),
    ],
    expect: [0, 0, 'EEXIST', 0],
  }),
]);
