import { allocateFirstPage, punchFirstPage } from '../child_programs.ts';
import { shareable } from '../needs.ts';
import { FILE_END, INIT_SHARED, MMAP, type Scenario, scenario, section } from '../scenario.ts';

const ALLOCATE = 1;
const PUNCH = 3;

const gmem = (s: Scenario) => s.gmem(s.vm());
/** A shared guest_memfd of 16 pages and a mapping of it, with 7 in page 0. */
const written = (s: Scenario) => {
  const file = s.gmem(s.vm(), 16, MMAP | INIT_SHARED);
  const mapping = s.map(file);
  s.put(mapping, 0, 7);
  return { file, mapping };
};
const top = (s: Scenario, pages: number) => FILE_END - BigInt(pages * s.P);

export const fallocate = section('fallocate', [
  scenario(55, 'without KEEP_SIZE it is EOPNOTSUPP', {
    given: gmem,
    when: (s, file) => s.fallocate(file, 0, 0, 1),
    expect: 'EOPNOTSUPP',
  }),
  scenario(56, 'allocates the whole file', {
    given: gmem,
    when: (s, file) => [s.fallocate(file, ALLOCATE, 0, 16), s.cached(file)],
    expect: [0, 16],
  }),
  scenario(57, 'allocating past the end is EINVAL and allocates nothing', {
    given: gmem,
    when: (s, file) => [
      s.fallocate(file, ALLOCATE, 0, 17),
      s.fallocate(file, ALLOCATE, 15, 2),
      s.fallocate(file, ALLOCATE, 16, 1),
      s.cached(file),
    ],
    expect: ['EINVAL', 'EINVAL', 'EINVAL', 0],
  }),
  scenario(58, 'allocating an unaligned range is EINVAL', {
    given: gmem,
    when: (s, file) => [s.kernel.fallocate(file, ALLOCATE, 1, s.P), s.kernel.fallocate(file, ALLOCATE, 0, 1)],
    expect: ['EINVAL', 'EINVAL'],
  }),
  scenario(59, 'punching is idempotent', {
    given: gmem,
    when: (s, file) => [s.fallocate(file, PUNCH, 0, 1), s.fallocate(file, PUNCH, 0, 1)],
    expect: [0, 0],
  }),
  scenario('59 frees', 'punching frees just the pages of the range', {
    given: gmem,
    when: (s, file) => [
      s.fallocate(file, ALLOCATE, 0, 8),
      s.fallocate(file, PUNCH, 2, 3),
      s.cached(file),
      s.cached(file, 2, 3),
    ],
    expect: [0, 0, 5, 0],
  }),
  scenario(60, 'punching across and wholly past the end succeeds', {
    given: gmem,
    when: (s, file) => [
      s.fallocate(file, PUNCH, 15, 2),
      s.fallocate(file, PUNCH, 16, 1),
      s.fallocate(file, PUNCH, 1000, 1),
      s.stat(file).size,
    ],
    expect: (s) => [0, 0, 0, 16 * s.P],
  }),
  scenario(61, 'punching an unaligned range is EINVAL', {
    given: gmem,
    when: (s, file) => [
      s.kernel.fallocate(file, PUNCH, 1, s.P),
      s.kernel.fallocate(file, PUNCH, 0, 1),
      s.kernel.fallocate(file, PUNCH, 0, s.P + 1),
    ],
    expect: ['EINVAL', 'EINVAL', 'EINVAL'],
  }),
  scenario(62, 'PUNCH_HOLE without KEEP_SIZE is EOPNOTSUPP', {
    given: gmem,
    when: (s, file) => s.fallocate(file, 2, 0, 1),
    expect: 'EOPNOTSUPP',
  }),
  scenario(63, 'a negative offset, or a length that is negative or 0, is EINVAL', {
    given: gmem,
    when: (s, file) => [
      s.kernel.fallocate(file, PUNCH, -s.P, s.P),
      s.kernel.fallocate(file, PUNCH, 0, 0),
      s.kernel.fallocate(file, PUNCH, 0, -s.P),
      s.kernel.fallocate(file, ALLOCATE, -1, s.P),
      s.kernel.fallocate(file, ALLOCATE, 0, 0),
    ],
    expect: ['EINVAL', 'EINVAL', 'EINVAL', 'EINVAL', 'EINVAL'],
  }),
  scenario(64, 'a length of 0 or a negative offset beats a bad mode', {
    given: gmem,
    when: (s, file) => [
      s.fallocate(file, 0x100, 0, 0),
      s.fallocate(file, 0x100, -1, 1),
      s.fallocate(file, 0, 0, 0),
      s.fallocate(file, 4, 0, 0),
    ],
    expect: ['EINVAL', 'EINVAL', 'EINVAL', 'EINVAL'],
  }),
  scenario(65, 'every other mode is EOPNOTSUPP', {
    given: gmem,
    when: (s, file) =>
      [0x100, 4, 5, 7, 8, 9, 0x10, 0x11, 0x13, 0x20, 0x21, 0x40, 0x41, 0x80, 0x81].map((mode) =>
        s.fallocate(file, mode, 0, 1),
      ),
    expect: Array(15).fill('EOPNOTSUPP'),
  }),
  scenario(66, 'a bad mode beats an unaligned range and one past the end', {
    given: gmem,
    when: (s, file) => [
      s.kernel.fallocate(file, 0x100, 1, 1),
      s.kernel.fallocate(file, 0, 1, 1),
      s.kernel.fallocate(file, 0x11, 1, 1),
      s.fallocate(file, 0, 16, 1),
    ],
    expect: ['EOPNOTSUPP', 'EOPNOTSUPP', 'EOPNOTSUPP', 'EOPNOTSUPP'],
  }),
  scenario(67, 'a range that ends beyond the largest file is EFBIG', {
    given: gmem,
    when: (s, file) => [
      s.kernel.fallocate(file, PUNCH, top(s, 1), s.P),
      s.kernel.fallocate(file, ALLOCATE, top(s, 1), s.P),
      s.kernel.fallocate(file, PUNCH, s.P, top(s, 1)),
    ],
    expect: ['EFBIG', 'EFBIG', 'EFBIG'],
  }),
  scenario(68, 'EFBIG beats an unaligned range', {
    given: gmem,
    when: (s, file) => [
      s.kernel.fallocate(file, PUNCH, FILE_END - 1n, 1),
      s.kernel.fallocate(file, PUNCH, 1, FILE_END - 1n),
    ],
    expect: ['EFBIG', 'EFBIG'],
  }),
  scenario(69, 'EFBIG beats a mode that only guest_memfd refuses, not one that the VFS refuses', {
    given: gmem,
    when: (s, file) => [0, 0x10, 0x40, 2, 0x100, 0x18].map((mode) => s.kernel.fallocate(file, mode, top(s, 1), s.P)),
    expect: ['EFBIG', 'EFBIG', 'EFBIG', 'EOPNOTSUPP', 'EOPNOTSUPP', 'EOPNOTSUPP'],
  }),
  scenario(70, 'allocating far past the end is EINVAL', {
    given: gmem,
    when: (s, file) => s.kernel.fallocate(file, ALLOCATE, top(s, 2), s.P),
    expect: 'EINVAL',
  }),
  scenario('70 punch', 'punching the last page a file could have succeeds', {
    given: gmem,
    when: (s, file) => s.kernel.fallocate(file, PUNCH, top(s, 2), s.P),
    expect: 0,
  }),
  scenario(71, 'one punch of everything empties the file', {
    given: gmem,
    when: (s, file) => [
      s.fallocate(file, ALLOCATE, 0, 16),
      s.kernel.fallocate(file, PUNCH, 0, top(s, 1)),
      s.cached(file),
    ],
    expect: [0, 0, 0],
  }),
  scenario(72, 'a closed fd is EBADF before everything else', {
    given: gmem,
    when: (s, file) => [
      s.closeFd(file),
      s.fallocate(file, PUNCH, 0, 1),
      s.fallocate(file, 0x100, 0, 1),
      s.kernel.fallocate(file, PUNCH, -1, 0),
    ],
    expect: [0, 'EBADF', 'EBADF', 'EBADF'],
  }),
  scenario(73, 'allocating keeps what is written', {
    needs: [shareable],
    given: written,
    when: (s, { file, mapping }) => [s.fallocate(file, ALLOCATE, 0, 16), s.get(mapping, 0), s.get(mapping, 1)],
    expect: [0, 7, 0],
  }),
  scenario(74, 'punching a mapped page: the next read finds 0', {
    needs: [shareable],
    given: written,
    when: (s, { file, mapping }) => [s.get(mapping, 0), s.fallocate(file, PUNCH, 0, 1), s.get(mapping, 0)],
    expect: [7, 0, 0],
  }),
  scenario(75, 'punching leaves the pages beside the range', {
    needs: [shareable],
    given: written,
    when: (s, { file, mapping }) => [
      s.put(mapping, 1, 8),
      s.put(mapping, 2, 9),
      s.fallocate(file, PUNCH, 1, 1),
      ...[0, 1, 2].map((page) => s.get(mapping, page)),
      s.fallocate(file, PUNCH, 16, 4),
      s.get(mapping, 0),
    ],
    expect: [1, 1, 0, 7, 0, 9, 0, 7],
  }),
  scenario(76, 'a child process punches, the parent reads 0', {
    needs: [shareable],
    given: written,
    when: (s, { file, mapping }) => [s.inChild(punchFirstPage, [file]), s.get(mapping, 0)],
    expect: [[0], 0],
  }),
  scenario('76 private', 'a child process allocates, the parent sees the page', {
    given: gmem,
    when: (s, file) => [s.inChild(allocateFirstPage, [file]), s.cached(file)],
    expect: [[0], 1],
  }),
  scenario('9 after close', 'it works after the VM fd is closed', {
    given: (s) => {
      const vm = s.vm();
      return { vm, file: s.gmem(vm) };
    },
    when: (s, { vm, file }) => [
      s.closeFd(vm),
      s.fallocate(file, ALLOCATE, 0, 4),
      s.cached(file),
      s.fallocate(file, PUNCH, 0, 2),
      s.cached(file),
    ],
    expect: [0, 0, 4, 0, 2],
  }),
  scenario('9 order', 'alignment is checked before the end of the file', {
    given: gmem,
    when: (s, file) => [
      s.kernel.fallocate(file, ALLOCATE, 16 * s.P + 1, s.P),
      s.kernel.fallocate(file, PUNCH, 16 * s.P + 1, s.P),
      s.kernel.fallocate(file, PUNCH, 0, top(s, 1) - 1n),
    ],
    expect: ['EINVAL', 'EINVAL', 'EINVAL'],
  }),
  scenario('9 another dup', 'a dup allocates and punches the same pages', {
    given: gmem,
    when: (s, file) => {
      const copy = s.dup(file);
      return [s.fallocate(copy, ALLOCATE, 0, 3), s.fallocate(file, PUNCH, 0, 1), s.cached(copy)];
    },
    expect: [0, 0, 2],
  }),
]);
