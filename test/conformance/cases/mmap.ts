import {
  MADV_COLD,
  MADV_COLLAPSE,
  MADV_DONTFORK,
  MADV_DONTNEED,
  MADV_DONTNEED_LOCKED,
  MADV_FREE,
  MADV_GUARD_INSTALL,
  MADV_GUARD_REMOVE,
  MADV_HUGEPAGE,
  MADV_MERGEABLE,
  MADV_PAGEOUT,
  MADV_POPULATE_READ,
  MADV_POPULATE_WRITE,
  MADV_REMOVE,
  MADV_WILLNEED,
  MADV_WIPEONFORK,
  MAP_GROWSDOWN,
  MAP_HUGETLB,
  MAP_NORESERVE,
  MAP_POPULATE,
  MAP_PRIVATE,
  MAP_SHARED,
  MAP_SHARED_VALIDATE,
  MAP_SYNC,
  MPOL_BIND,
  MPOL_DEFAULT,
  MPOL_INTERLEAVE,
  MPOL_LOCAL,
  MPOL_PREFERRED,
  MS_ASYNC,
  MS_SYNC,
  PROT_EXEC,
  PROT_NONE,
  PROT_READ,
  PROT_WRITE,
  UFFD_FEATURE_WP_ASYNC,
  UFFDIO_REGISTER_MODE_MINOR,
  UFFDIO_REGISTER_MODE_MISSING,
  UFFDIO_REGISTER_MODE_WP,
} from '../../../lib/uapi.ts';
import { readAndWriteMapping, touchUnshared } from '../child_programs.ts';
import {
  asyncWriteProtect,
  before,
  hugePages,
  mappable,
  numa,
  realMemory,
  samePageMerging,
  shareable,
  since,
  swProtected,
  userfaultfd,
} from '../needs.ts';
import { FILE_END, INIT_SHARED, MMAP, type Scenario, scenario, section, U64_END } from '../scenario.ts';

const gmem = (flags: number) => (s: Scenario) => s.gmem(s.vm(), 16, flags);
/** A guest_memfd with these flags and a mapping of its 16 pages. */
const mapped =
  (flags: number, pages = 16) =>
  (s: Scenario) => {
    const file = s.gmem(s.vm(), 16, flags);
    return { file, mapping: s.map(file, { pages }) };
  };
const SHARED = MMAP | INIT_SHARED;
/** Shared, mapped, with 7 in page 0. */
const written = (s: Scenario) => {
  const world = mapped(SHARED)(s);
  s.put(world.mapping, 0, 7);
  return world;
};
const residency = (s: Scenario, mapping: number, pages: number) => {
  const bytes = new Uint8Array(pages);
  return [s.kernel.mincore(mapping, 0, pages * s.P, bytes), ...bytes.map((byte) => byte & 1)];
};
const mbind = (s: Scenario, mapping: number, policy: number, nodes: number[]) =>
  s.kernel.mbind(mapping, 0, s.P, policy, nodes);
const register = (s: Scenario, features: number, mode: number, mapping: number) => {
  const uffd = s.userfaultfd();
  return [s.kernel.uffdioApi(uffd, features), s.kernel.uffdioRegister(uffd, mapping, 0, s.P, mode)];
};

export const mmap = section('mmap', [
  scenario(77, 'without MMAP it cannot be mapped: ENODEV, also for PROT_NONE and MAP_PRIVATE', {
    given: gmem(0),
    when: (s, file) => [
      s.mmap(file),
      s.mmap(file, { prot: PROT_NONE }),
      s.mmap(file, { flags: MAP_PRIVATE }),
      s.mmap(file, { flags: MAP_SHARED_VALIDATE }),
    ],
    expect: ['ENODEV', 'ENODEV', 'ENODEV', 'ENODEV'],
  }),
  scenario(78, 'without MMAP, PROT_EXEC is EPERM all the same', {
    needs: [since('6.18')],
    given: gmem(0),
    when: (s, file) => [
      s.mmap(file, { prot: PROT_EXEC }),
      s.mmap(file, { prot: PROT_READ | PROT_EXEC, flags: MAP_PRIVATE }),
    ],
    expect: ['EPERM', 'EPERM'],
  }),
  scenario('78 before', 'before 6.18 PROT_EXEC is ENODEV as everything else', {
    needs: [before('6.18')],
    given: gmem(0),
    when: (s, file) => s.mmap(file, { prot: PROT_EXEC }),
    expect: 'ENODEV',
  }),
  scenario(79, 'INIT_SHARED alone cannot be mapped', {
    needs: [shareable],
    given: gmem(INIT_SHARED),
    when: (s, file) => s.mmap(file),
    expect: 'ENODEV',
  }),
  scenario(80, 'MMAP can be mapped shared with any protection but EXEC', {
    needs: [mappable],
    given: gmem(MMAP),
    when: (s, file) => [PROT_READ, PROT_WRITE, PROT_READ | PROT_WRITE, PROT_NONE].map((prot) => s.mmap(file, { prot })),
    expect: ['ok', 'ok', 'ok', 'ok'],
  }),
  scenario('80 type 1', 'MMAP on a SW_PROTECTED VM can be mapped, and not touched', {
    needs: [swProtected, mappable],
    given: (s) => s.map(s.gmem(s.vm(1), 16, MMAP)),
    when: (s, mapping) => s.get(mapping, 0),
    expect: 'EFAULT',
  }),
  scenario(81, 'MAP_PRIVATE is EINVAL, whatever the protection', {
    needs: [mappable],
    given: (s) => [s.gmem(s.vm(), 16, MMAP), s.gmem(s.vm(), 16, SHARED)],
    when: (s, files) =>
      files.flatMap((file) =>
        [PROT_READ, PROT_READ | PROT_WRITE, PROT_NONE].map((prot) => s.mmap(file, { prot, flags: MAP_PRIVATE })),
      ),
    expect: ['EINVAL', 'EINVAL', 'EINVAL', 'EINVAL', 'EINVAL', 'EINVAL'],
  }),
  scenario(82, 'PROT_EXEC is EPERM, before MAP_PRIVATE is looked at', {
    needs: [mappable],
    given: gmem(MMAP),
    when: (s, file) => [
      s.mmap(file, { prot: PROT_EXEC, flags: MAP_PRIVATE }),
      s.mmap(file, { prot: PROT_READ | PROT_EXEC }),
    ],
    expect: ['EPERM', 'EPERM'],
  }),
  scenario(83, 'MAP_SHARED_VALIDATE is accepted, with MAP_SYNC it is EOPNOTSUPP', {
    needs: [mappable],
    given: gmem(MMAP),
    when: (s, file) => [
      s.mmap(file, { flags: MAP_SHARED_VALIDATE }),
      s.mmap(file, { flags: MAP_SHARED_VALIDATE | MAP_SYNC }),
    ],
    expect: ['ok', 'EOPNOTSUPP'],
  }),
  scenario('83 unknown', 'a flag nobody knows is EOPNOTSUPP with MAP_SHARED_VALIDATE, and ignored with MAP_SHARED', {
    needs: [mappable],
    given: gmem(MMAP),
    when: (s, file) => [
      s.mmap(file, { flags: MAP_SHARED_VALIDATE | 0x200000 }),
      s.mmap(file, { flags: MAP_SHARED | 0x200000 }),
      s.mmap(file, { flags: MAP_SHARED | MAP_NORESERVE }),
      s.mmap(file, { flags: MAP_SHARED_VALIDATE | MAP_NORESERVE }),
    ],
    expect: ['EOPNOTSUPP', 'ok', 'ok', 'ok'],
  }),
  scenario(84, 'MAP_GROWSDOWN is EINVAL', {
    needs: [mappable],
    given: (s) => [s.gmem(s.vm(), 16, MMAP), s.gmem(s.vm(), 16, SHARED)],
    when: (s, files) => files.map((file) => s.mmap(file, { flags: MAP_SHARED | MAP_GROWSDOWN })),
    expect: ['EINVAL', 'EINVAL'],
  }),
  scenario(85, 'a mapping may go past the end of the file, or begin there', {
    needs: [mappable],
    given: gmem(MMAP),
    when: (s, file) => [s.mmap(file, { pages: 64 }), s.mmap(file, { from: 100, pages: 1 })],
    expect: ['ok', 'ok'],
  }),
  scenario(86, 'a mapping may not go past the largest file', {
    needs: [mappable],
    given: gmem(MMAP),
    when: (s, file) => [
      s.mmap(file, { offset: FILE_END - BigInt(s.P), pages: 1 }),
      s.mmap(file, { offset: FILE_END - BigInt(2 * s.P), pages: 1 }),
      s.mmap(file, { offset: FILE_END - BigInt(2 * s.P), pages: 2 }),
    ],
    expect: ['EOVERFLOW', 'ok', 'EOVERFLOW'],
  }),
  scenario(87, 'MAP_POPULATE of a file that is not shared succeeds and populates nothing', {
    needs: [mappable],
    given: gmem(MMAP),
    when: (s, file) => [s.mmap(file, { flags: MAP_SHARED | MAP_POPULATE }), s.cached(file)],
    expect: ['ok', 0],
  }),
  scenario('87 shared', 'MAP_POPULATE of a shared file allocates it', {
    needs: [shareable],
    given: gmem(SHARED),
    when: (s, file) => [s.mmap(file, { flags: MAP_SHARED | MAP_POPULATE, pages: 4 }), s.cached(file)],
    expect: ['ok', 4],
  }),
  scenario('8.1 step 1', 'an unaligned offset is EINVAL before the fd is looked at', {
    when: (s) => [s.mmap(99999, { offset: 1 }), s.mmap(99999), s.mmap(99999, { length: 0 })],
    expect: ['EINVAL', 'EBADF', 'EBADF'],
  }),
  scenario('8.1 step 1 gmem', 'an unaligned offset is EINVAL before everything that is wrong with the file', {
    given: gmem(0),
    when: (s, file) => [
      s.mmap(file, { offset: s.P + 1 }),
      s.mmap(file, { offset: 1, prot: PROT_EXEC }),
      s.mmap(file, { offset: FILE_END - 1n }),
    ],
    expect: ['EINVAL', 'EINVAL', 'EINVAL'],
  }),
  scenario('8.1 step 2', 'a closed fd is EBADF', {
    given: gmem(0),
    when: (s, file) => [s.closeFd(file), s.mmap(file), s.mmap(file, { flags: MAP_SHARED | MAP_HUGETLB })],
    expect: [0, 'EBADF', 'EBADF'],
  }),
  scenario('8.1 other files', 'a VM fd cannot be mapped', {
    given: (s) => s.vm(),
    when: (s, vm) => [s.mmap(vm), s.mmap(vm, { flags: MAP_PRIVATE, prot: PROT_READ })],
    expect: ['ENODEV', 'ENODEV'],
  }),
  scenario('8.1 step 3', 'MAP_HUGETLB is EINVAL, before the file is asked', {
    given: gmem(0),
    when: (s, file) => [
      s.mmap(file, { flags: MAP_SHARED | MAP_HUGETLB }),
      s.mmap(file, { flags: MAP_SHARED | MAP_HUGETLB, prot: PROT_EXEC }),
    ],
    expect: ['EINVAL', 'EINVAL'],
  }),
  scenario('8.1 step 4', 'a length of 0 is EINVAL, one that rounds up to 2^64 ENOMEM, before the file is asked', {
    given: gmem(0),
    when: (s, file) => [
      s.mmap(file, { length: 0 }),
      s.mmap(file, { length: 0, prot: PROT_EXEC }),
      s.mmap(file, { length: U64_END - 1n }),
    ],
    expect: ['EINVAL', 'EINVAL', 'ENOMEM'],
  }),
  scenario('8.1 step 5', 'a length larger than the address space is ENOMEM, before the file is asked', {
    given: gmem(0),
    when: (s, file) => [s.mmap(file, { length: 1n << 60n }), s.mmap(file, { length: 1n << 60n, prot: PROT_EXEC })],
    expect: ['ENOMEM', 'ENOMEM'],
  }),
  scenario('8.1 step 6', 'EOVERFLOW comes before the type of mapping, EXEC and ENODEV', {
    given: gmem(0),
    when: (s, file) =>
      [
        { flags: MAP_SHARED },
        { flags: 0 },
        { flags: MAP_SHARED, prot: PROT_EXEC },
        { flags: MAP_SHARED_VALIDATE | MAP_SYNC },
        { flags: MAP_PRIVATE },
      ].map((o) => s.mmap(file, { ...o, offset: FILE_END - BigInt(s.P), pages: 1 })),
    expect: ['EOVERFLOW', 'EOVERFLOW', 'EOVERFLOW', 'EOVERFLOW', 'EOVERFLOW'],
  }),
  scenario('8.1 step 7', 'neither shared nor private is EINVAL, and MAP_SYNC EOPNOTSUPP, before EXEC and ENODEV', {
    given: gmem(0),
    when: (s, file) => [
      s.mmap(file, { flags: 0 }),
      s.mmap(file, { flags: 0, prot: PROT_EXEC }),
      s.mmap(file, { flags: MAP_SHARED_VALIDATE | MAP_SYNC }),
      s.mmap(file, { flags: MAP_SHARED_VALIDATE | MAP_SYNC, prot: PROT_EXEC }),
    ],
    expect: ['EINVAL', 'EINVAL', 'EOPNOTSUPP', 'EOPNOTSUPP'],
  }),
  scenario('8.1 step 8', 'EXEC comes before MAP_GROWSDOWN', {
    needs: [mappable],
    given: gmem(MMAP),
    when: (s, file) => s.mmap(file, { flags: MAP_SHARED | MAP_GROWSDOWN, prot: PROT_EXEC }),
    expect: 'EPERM',
  }),
  scenario('8.1 step 9', 'MAP_GROWSDOWN comes before the missing MMAP', {
    needs: [mappable],
    given: gmem(0),
    when: (s, file) => s.mmap(file, { flags: MAP_SHARED | MAP_GROWSDOWN }),
    expect: 'EINVAL',
  }),
  scenario('8.1 mprotect', 'EXEC cannot be added later; the rest of the protection can change', {
    needs: [shareable],
    given: written,
    when: (s, { mapping }) => [
      s.protect(mapping, PROT_READ | PROT_EXEC),
      s.protect(mapping, PROT_READ),
      s.get(mapping, 0),
      s.put(mapping, 0, 9),
      s.protect(mapping, PROT_NONE),
      s.get(mapping, 0),
      s.protect(mapping, PROT_READ | PROT_WRITE),
      s.get(mapping, 0),
    ],
    expect: ['EACCES', 0, 7, 'EFAULT', 0, 'EFAULT', 0, 7],
  }),
]);

export const hostAccess = section('Host access to a mapping', [
  scenario(88, 'a file that is not shared: any touch would be SIGBUS, so a guarded one is EFAULT', {
    needs: [mappable],
    given: mapped(MMAP),
    when: (s, { mapping }) => [s.get(mapping, 0), s.put(mapping, 0, 1), s.get(mapping, 15), s.get(mapping, 3)],
    expect: ['EFAULT', 'EFAULT', 'EFAULT', 'EFAULT'],
  }),
  scenario('88 SIGBUS', 'a process that touches it unguarded dies of SIGBUS', {
    needs: [realMemory, mappable],
    given: gmem(MMAP),
    when: (s, file) => s.inChild(touchUnshared, [file]),
    expect: 'SIGBUS',
  }),
  scenario('88 allocated', 'allocating a page does not make it touchable', {
    needs: [mappable],
    given: mapped(MMAP),
    when: (s, { file, mapping }) => [s.fallocate(file, 1, 0, 1), s.get(mapping, 0)],
    expect: [0, 'EFAULT'],
  }),
  scenario(89, 'a file that is not shared: populating is EFAULT, mlock ENOMEM', {
    needs: [mappable],
    given: mapped(MMAP),
    when: (s, { mapping }) => [
      s.advise(mapping, 0, 1, MADV_POPULATE_READ),
      s.advise(mapping, 0, 1, MADV_POPULATE_WRITE),
      s.kernel.mlock(mapping, 0, s.P),
    ],
    expect: ['EFAULT', 'EFAULT', 'ENOMEM'],
  }),
  scenario(90, 'a shared file: populating and mlock succeed and allocate', {
    needs: [shareable],
    given: mapped(SHARED),
    when: (s, { file, mapping }) => [
      s.advise(mapping, 0, 2, MADV_POPULATE_READ),
      s.advise(mapping, 2, 2, MADV_POPULATE_WRITE),
      s.cached(file),
      s.kernel.mlock(mapping, 4 * s.P, s.P),
      s.kernel.munlock(mapping, 4 * s.P, s.P),
      s.cached(file),
    ],
    expect: [0, 0, 4, 0, 0, 5],
  }),
  scenario(91, 'a fresh page reads 0 and is allocated by the read', {
    needs: [shareable],
    given: mapped(SHARED),
    when: (s, { file, mapping }) => [s.cached(file), s.get(mapping, 0), s.get(mapping, 15), s.cached(file)],
    expect: [0, 0, 0, 2],
  }),
  scenario(92, 'a mapping past the end: the last page works, those behind it would be SIGBUS', {
    needs: [shareable],
    given: mapped(SHARED, 32),
    when: (s, { mapping }) => [
      ...[15, 16, 20].map((page) => s.get(mapping, page)),
      ...[15, 16, 20].map((page) => s.put(mapping, page, 1)),
    ],
    expect: [0, 'EFAULT', 'EFAULT', 1, 'EFAULT', 'EFAULT'],
  }),
  scenario('92 short', 'a guarded copy across the end stops there', {
    needs: [shareable],
    given: mapped(SHARED, 32),
    when: (s, { mapping }) => s.kernel.peek(mapping, 15 * s.P, new Uint8Array(2 * s.P)),
    expect: (s) => s.P,
  }),
  scenario('92 populate', 'populating or locking past the end is EFAULT and ENOMEM', {
    needs: [shareable],
    given: mapped(SHARED, 32),
    when: (s, { mapping }) => [
      s.advise(mapping, 15, 2, MADV_POPULATE_READ),
      s.advise(mapping, 16, 1, MADV_POPULATE_WRITE),
      s.kernel.mlock(mapping, 16 * s.P, s.P),
    ],
    expect: ['EFAULT', 'EFAULT', 'ENOMEM'],
  }),
  scenario(93, 'two mappings show the same bytes, each from its own offset', {
    needs: [shareable],
    given: (s) => {
      const { file, mapping } = mapped(SHARED)(s);
      return { mapping, other: s.map(file, { from: 3, pages: 4 }) };
    },
    when: (s, { mapping, other }) => [s.put(mapping, 4, 8), s.get(other, 1), s.put(other, 0, 9), s.get(mapping, 3)],
    expect: [1, 8, 1, 9],
  }),
  scenario(94, 'MADV_DONTNEED drops the mapping’s pages, not the data', {
    needs: [shareable],
    given: written,
    when: (s, { file, mapping }) => [s.advise(mapping, 0, 1, MADV_DONTNEED), s.cached(file), s.get(mapping, 0)],
    expect: [0, 1, 7],
  }),
  scenario(95, 'MADV_REMOVE is a punch', {
    needs: [shareable],
    given: written,
    when: (s, { file, mapping }) => [s.advise(mapping, 0, 1, MADV_REMOVE), s.cached(file), s.get(mapping, 0)],
    expect: [0, 0, 0],
  }),
  scenario('95 past the end', 'MADV_REMOVE past the end succeeds', {
    needs: [shareable],
    given: mapped(SHARED, 32),
    when: (s, { mapping }) => [s.advise(mapping, 15, 2, MADV_REMOVE), s.advise(mapping, 20, 1, MADV_REMOVE)],
    expect: [0, 0],
  }),
  scenario('95 offset', 'MADV_REMOVE punches at the mapping’s offset in the file', {
    needs: [shareable],
    given: (s) => {
      const { file, mapping } = written(s);
      s.put(mapping, 5, 8);
      return { mapping, other: s.map(file, { from: 4, pages: 4 }) };
    },
    when: (s, { mapping, other }) => [s.advise(other, 1, 1, MADV_REMOVE), s.get(mapping, 5), s.get(mapping, 0)],
    expect: [0, 0, 7],
  }),
  scenario('95 unshared', 'MADV_REMOVE frees pages of a file that cannot be touched', {
    needs: [mappable],
    given: mapped(MMAP),
    when: (s, { file, mapping }) => [
      s.fallocate(file, 1, 0, 4),
      s.advise(mapping, 0, 4, MADV_DONTNEED),
      s.cached(file),
      s.advise(mapping, 1, 2, MADV_REMOVE),
      s.cached(file),
    ],
    expect: [0, 0, 4, 0, 2],
  }),
  scenario(96, 'MADV_FREE, WIPEONFORK and COLLAPSE are EINVAL', {
    needs: [shareable],
    given: written,
    when: (s, { mapping }) =>
      [MADV_FREE, MADV_WIPEONFORK, MADV_COLLAPSE].map((advice) => s.advise(mapping, 0, 16, advice)),
    expect: ['EINVAL', 'EINVAL', 'EINVAL'],
  }),
  scenario('8.3 no effect', 'advice about reclaim and fork succeeds and loses nothing', {
    needs: [shareable],
    given: written,
    when: (s, { mapping }) => [
      ...[MADV_COLD, MADV_PAGEOUT, MADV_WILLNEED, 2, MADV_DONTFORK, 11, 16, MADV_DONTNEED_LOCKED].map((advice) =>
        s.advise(mapping, 0, 4, advice),
      ),
      s.get(mapping, 0),
    ],
    expect: [0, 0, 0, 0, 0, 0, 0, 0, 7],
  }),
  scenario('8.3 huge pages', 'advice about huge pages succeeds where they are built', {
    needs: [shareable, hugePages],
    given: written,
    when: (s, { mapping }) => [s.advise(mapping, 0, 16, MADV_HUGEPAGE), s.advise(mapping, 0, 16, 15)],
    expect: [0, 0],
  }),
  scenario('8.3 merging', 'advice about merging succeeds where it is built', {
    needs: [shareable, samePageMerging],
    given: written,
    when: (s, { mapping }) => s.advise(mapping, 0, 16, MADV_MERGEABLE),
    expect: 0,
  }),
  scenario('8.3 guards', 'a guard page is EFAULT until it is removed, and the data is still there', {
    needs: [shareable],
    given: written,
    when: (s, { mapping }) => [
      s.advise(mapping, 0, 1, MADV_GUARD_INSTALL),
      s.get(mapping, 0),
      s.get(mapping, 1),
      s.advise(mapping, 0, 1, MADV_GUARD_REMOVE),
      s.get(mapping, 0),
    ],
    expect: [0, 'EFAULT', 0, 0, 7],
  }),
  scenario('8.3 mincore', 'mincore reports pages that were touched, not those that are only allocated', {
    needs: [shareable],
    given: written,
    when: (s, { file, mapping }) => [
      s.fallocate(file, 1, 2, 1),
      residency(s, mapping, 4),
      s.get(mapping, 2),
      s.advise(mapping, 0, 4, MADV_DONTNEED),
      residency(s, mapping, 4),
      s.fallocate(file, 3, 0, 1),
      residency(s, mapping, 4),
    ],
    expect: [0, [0, 1, 0, 0, 0], 0, 0, [0, 1, 0, 1, 0], 0, [0, 0, 0, 1, 0]],
  }),
  scenario('8.3 mincore unshared', 'mincore on a file that is not shared succeeds: nothing was touched', {
    needs: [mappable],
    given: mapped(MMAP),
    when: (s, { file, mapping }) => [s.fallocate(file, 1, 0, 1), residency(s, mapping, 2)],
    expect: [0, [0, 0, 0]],
  }),
  scenario('8.3 unknown', 'unknown advice and an unaligned address are EINVAL', {
    needs: [shareable],
    given: written,
    when: (s, { mapping }) => [
      s.advise(mapping, 0, 1, 9999),
      s.kernel.madvise(mapping, 1, s.P, MADV_DONTNEED),
      s.kernel.madvise(mapping, 0, 0, MADV_DONTNEED),
    ],
    expect: ['EINVAL', 'EINVAL', 0],
  }),
  scenario(97, 'msync(MS_SYNC) is EINVAL, as fsync', {
    needs: [shareable],
    given: written,
    when: (s, { mapping }) => s.kernel.msync(mapping, 0, s.P, MS_SYNC),
    expect: 'EINVAL',
  }),
  scenario('97 async', 'msync(MS_ASYNC) has nothing to do', {
    needs: [shareable],
    given: written,
    when: (s, { mapping }) => s.kernel.msync(mapping, 0, s.P, MS_ASYNC),
    expect: 0,
  }),
  scenario(98, 'the kernel’s own copies from and to a page past the end are EFAULT', {
    needs: [shareable],
    given: (s) => ({ ...mapped(SHARED, 32)(s), other: s.memfd(1) }),
    when: (s, { mapping, other }) => {
      const past = s.kernel.window(mapping, 16 * s.P, s.P);
      return [s.kernel.write(other, past), s.kernel.lseek(other, 0, 0), s.kernel.read(other, past)];
    },
    expect: ['EFAULT', 0, 'EFAULT'],
  }),
  scenario('98 inside', 'the kernel copies from and to a page of the file', {
    needs: [shareable],
    given: (s) => ({ ...written(s), other: s.memfd() }),
    when: (s, { mapping, other }) => [
      s.kernel.write(other, s.kernel.window(mapping, 0, 1)),
      s.kernel.pread(other, s.kernel.window(mapping, s.P, 1), 0),
      s.get(mapping, 1),
    ],
    expect: [1, 1, 7],
  }),
  scenario(99, 'mbind, then the policy through another mapping: since 6.19 it belongs to the file', {
    needs: [shareable, numa, since('6.19')],
    given: (s) => {
      const { file, mapping } = mapped(SHARED)(s);
      return { mapping, other: s.map(file) };
    },
    when: (s, { mapping, other }) => [
      mbind(s, mapping, MPOL_BIND, [0]),
      s.kernel.getMempolicy(mapping, 0),
      s.kernel.getMempolicy(other, 0),
      s.kernel.getMempolicy(other, s.P),
    ],
    expect: [0, MPOL_BIND, MPOL_BIND, MPOL_DEFAULT],
  }),
  scenario(100, 'mbind, then the policy through another mapping: before 6.19 it belongs to the mapping', {
    needs: [shareable, numa, before('6.19')],
    given: (s) => {
      const { file, mapping } = mapped(SHARED)(s);
      return { mapping, other: s.map(file) };
    },
    when: (s, { mapping, other }) => [
      mbind(s, mapping, MPOL_BIND, [0]),
      s.kernel.getMempolicy(mapping, 0),
      s.kernel.getMempolicy(other, 0),
    ],
    expect: [0, MPOL_BIND, MPOL_DEFAULT],
  }),
  scenario('8.3 policy survives', 'since 6.19 the policy survives its mapping', {
    needs: [shareable, numa, since('6.19')],
    given: mapped(SHARED),
    when: (s, { file, mapping }) => [
      mbind(s, mapping, MPOL_BIND, [0]),
      s.munmap(mapping),
      s.kernel.getMempolicy(s.map(file), 0),
    ],
    expect: [0, 0, MPOL_BIND],
  }),
  scenario('8.3 policy change', 'the policy of a page is the last one set', {
    needs: [shareable, numa],
    given: mapped(SHARED),
    when: (s, { mapping }) => [
      s.kernel.getMempolicy(mapping, 0),
      mbind(s, mapping, MPOL_PREFERRED, [0]),
      s.kernel.getMempolicy(mapping, 0),
      mbind(s, mapping, MPOL_INTERLEAVE, [0]),
      s.kernel.getMempolicy(mapping, 0),
      s.kernel.getMempolicy(mapping, s.P),
      mbind(s, mapping, MPOL_DEFAULT, []),
      s.kernel.getMempolicy(mapping, 0),
    ],
    expect: [MPOL_DEFAULT, 0, MPOL_PREFERRED, 0, MPOL_INTERLEAVE, MPOL_DEFAULT, 0, MPOL_DEFAULT],
  }),
  scenario(101, 'mbind with a bad policy, an empty BIND mask, an absent node or an unaligned address is EINVAL', {
    needs: [shareable, numa],
    given: mapped(SHARED),
    when: (s, { mapping }) => [
      mbind(s, mapping, 999, []),
      mbind(s, mapping, MPOL_BIND, []),
      mbind(s, mapping, MPOL_BIND, [63]),
      s.kernel.mbind(mapping, 1, s.P, MPOL_LOCAL, []),
    ],
    expect: ['EINVAL', 'EINVAL', 'EINVAL', 'EINVAL'],
  }),
  scenario('8.3 mbind', 'every policy is accepted', {
    needs: [shareable, numa],
    given: mapped(SHARED),
    when: (s, { mapping }) => [
      mbind(s, mapping, MPOL_BIND, [0]),
      mbind(s, mapping, MPOL_PREFERRED, [0]),
      mbind(s, mapping, MPOL_INTERLEAVE, [0]),
      mbind(s, mapping, MPOL_LOCAL, []),
      mbind(s, mapping, MPOL_DEFAULT, []),
    ],
    expect: [0, 0, 0, 0, 0],
  }),
  scenario(102, 'userfaultfd cannot register it for missing, minor or write-protect faults', {
    needs: [shareable, userfaultfd],
    given: mapped(SHARED),
    when: (s, { mapping }) =>
      [
        UFFDIO_REGISTER_MODE_MISSING,
        UFFDIO_REGISTER_MODE_MINOR,
        UFFDIO_REGISTER_MODE_WP,
        UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP,
      ].map((mode) => register(s, 0, mode, mapping)),
    expect: [
      [0, 'EINVAL'],
      [0, 'EINVAL'],
      [0, 'EINVAL'],
      [0, 'EINVAL'],
    ],
  }),
  scenario(103, 'userfaultfd registers it for asynchronous write-protection alone', {
    needs: [shareable, asyncWriteProtect],
    given: mapped(SHARED),
    when: (s, { mapping }) => [
      register(s, UFFD_FEATURE_WP_ASYNC, UFFDIO_REGISTER_MODE_WP, mapping),
      register(s, UFFD_FEATURE_WP_ASYNC, UFFDIO_REGISTER_MODE_MISSING, mapping),
    ],
    expect: [
      [0, 0],
      [0, 'EINVAL'],
    ],
  }),
  scenario(104, 'a child process reads and writes the same memory', {
    needs: [shareable],
    given: written,
    when: (s, { file, mapping }) => [s.inChild(readAndWriteMapping, [file]), s.get(mapping, 0)],
    expect: [[1, 7, 1], 2],
  }),
  scenario(105, 'a mapping outlives the fd and the VM fd', {
    needs: [shareable],
    given: (s) => {
      const vm = s.vm();
      const file = s.gmem(vm, 16, SHARED);
      return { vm, file, mapping: s.map(file) };
    },
    when: (s, { vm, file, mapping }) => [
      s.put(mapping, 3, 5),
      s.closeFd(file),
      s.closeFd(vm),
      s.get(mapping, 3),
      s.put(mapping, 15, 6),
      s.advise(mapping, 3, 1, MADV_REMOVE),
      s.get(mapping, 3),
      s.munmap(mapping),
    ],
    expect: [1, 0, 0, 5, 1, 0, 0, 0],
  }),
]);
