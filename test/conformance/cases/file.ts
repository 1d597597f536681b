import {
  EPOLL_CTL_ADD,
  F_ADD_SEALS,
  F_GET_SEALS,
  F_GETFD,
  F_GETFL,
  F_SETFD,
  FD_CLOEXEC,
  O_RDWR,
  POLLIN,
  POLLOUT,
  SEEK_CUR,
  SEEK_DATA,
  SEEK_END,
  SEEK_HOLE,
  SEEK_SET,
} from '../../../lib/uapi.ts';
import { before, gmemSlots, shareable, since } from '../needs.ts';
import { INIT_SHARED, MMAP, type Scenario, scenario, section } from '../scenario.ts';

const O_PATH = 0o10000000;
const FIOCLEX = 0x5451;
const GMEM_MAGIC = 0x474d454d;
const ANON_INODE_MAGIC = 0x09041934;

const gmem = (s: Scenario) => s.gmem(s.vm());
const bytes = (length: number) => new Uint8Array(length);
const self = (file: number) => `/proc/self/fd/${file}`;
const filesystem = (s: Scenario, file: number) => {
  const status: { type?: number; bsize?: number } = {};
  return [s.kernel.fstatfs(file, status), status.type, status.bsize];
};
const status = (s: Scenario, file: number) => {
  const { mode, size, blocks, blksize, nlink } = s.stat(file);
  return [mode, size, blocks, blksize, nlink];
};

export const fileOperations = section('guest_memfd file operations', [
  scenario(37, 'fstat: a regular file of the size it was created with, 0600, no blocks', {
    given: gmem,
    when: status,
    expect: (s) => [0o100600, 16 * s.P, 0, s.P, 1],
  }),
  scenario(38, 'fstat says 0 blocks even when pages are allocated', {
    given: gmem,
    when: (s, file) => [s.fallocate(file, 1, 0, 4), ...status(s, file)],
    expect: (s) => [0, 0o100600, 16 * s.P, 0, s.P, 1],
  }),
  scenario('38 cachestat', 'cachestat counts what is allocated', {
    given: gmem,
    when: (s, file) => [s.cached(file), s.fallocate(file, 1, 2, 4), s.cached(file), s.cached(file, 0, 3)],
    expect: [0, 0, 4, 1],
  }),
  scenario(39, 'read and write, even of 0 bytes, are EINVAL', {
    given: gmem,
    when: (s, file) => [
      s.kernel.read(file, bytes(8)),
      s.kernel.write(file, bytes(8)),
      s.kernel.read(file, bytes(0)),
      s.kernel.write(file, bytes(0)),
    ],
    expect: ['EINVAL', 'EINVAL', 'EINVAL', 'EINVAL'],
  }),
  scenario('39 shared', 'read and write are EINVAL on a shared one too', {
    needs: [shareable],
    given: (s) => s.gmem(s.vm(), 16, MMAP | INIT_SHARED),
    when: (s, file) => [s.kernel.read(file, bytes(8)), s.kernel.write(file, bytes(8))],
    expect: ['EINVAL', 'EINVAL'],
  }),
  scenario(40, 'pread and pwrite are ESPIPE', {
    given: gmem,
    when: (s, file) => [
      s.kernel.pread(file, bytes(8), 0),
      s.kernel.pwrite(file, bytes(8), 0),
      s.kernel.pread(file, bytes(0), s.P),
      s.kernel.pwrite(file, bytes(8), 100 * s.P),
    ],
    expect: ['ESPIPE', 'ESPIPE', 'ESPIPE', 'ESPIPE'],
  }),
  scenario(41, 'pread and pwrite at a negative offset are EINVAL', {
    given: gmem,
    when: (s, file) => [s.kernel.pread(file, bytes(8), -1), s.kernel.pwrite(file, bytes(8), -s.P)],
    expect: ['EINVAL', 'EINVAL'],
  }),
  scenario(42, 'lseek is ESPIPE whatever the origin', {
    given: gmem,
    when: (s, file) =>
      [SEEK_SET, SEEK_CUR, SEEK_END, SEEK_DATA, SEEK_HOLE].map((whence) => s.kernel.lseek(file, 0, whence)),
    expect: ['ESPIPE', 'ESPIPE', 'ESPIPE', 'ESPIPE', 'ESPIPE'],
  }),
  scenario(43, 'lseek with a bad origin is EINVAL', {
    given: gmem,
    when: (s, file) => [s.kernel.lseek(file, 0, 99), s.kernel.lseek(file, 0, 5)],
    expect: ['EINVAL', 'EINVAL'],
  }),
  scenario(44, 'ftruncate to the same size, 0, more or less than nothing is EINVAL', {
    given: gmem,
    when: (s, file) => [16 * s.P, 0, 32 * s.P, -1].map((length) => s.kernel.ftruncate(file, length)),
    expect: ['EINVAL', 'EINVAL', 'EINVAL', 'EINVAL'],
  }),
  scenario(46, 'fsync is EINVAL', {
    given: gmem,
    when: (s, file) => s.kernel.fsync(file),
    expect: 'EINVAL',
  }),
  scenario(47, 'opening it again through /proc/self/fd is ENXIO', {
    given: gmem,
    when: (s, file) => s.open(self(file), O_RDWR),
    expect: 'ENXIO',
  }),
  scenario(48, 'an O_PATH fd of it can be opened, and is EBADF for fallocate', {
    given: gmem,
    when: (s, file) => {
      const path = s.open(self(file), O_PATH);
      return [path, s.fallocate(path, 3, 0, 1)];
    },
    expect: ['ok', 'EBADF'],
  }),
  scenario('48 bind', 'an O_PATH fd of it is EBADF for binding', {
    needs: [gmemSlots],
    given: (s) => {
      const vm = s.gmemVm();
      return { vm, path: s.open(self(s.bindable(vm)), O_PATH) };
    },
    when: (s, { vm, path }) => [path, s.bind(vm, { file: path })],
    expect: ['ok', 'EBADF'],
  }),
  scenario(49, 'since 6.19 it has a file system of its own', {
    needs: [since('6.19')],
    given: gmem,
    when: filesystem,
    expect: (s) => [0, GMEM_MAGIC, s.P],
  }),
  scenario(50, 'before 6.19 it is an anonymous inode', {
    needs: [before('6.19')],
    given: gmem,
    when: filesystem,
    expect: (s) => [0, ANON_INODE_MAGIC, s.P],
  }),
  scenario(51, 'F_GETFL: O_RDWR | O_LARGEFILE', {
    given: gmem,
    when: (s, file) => s.kernel.fcntl(file, F_GETFL, 0),
    expect: { x86_64: 0x8002, aarch64: 0x20002 },
  }),
  scenario(52, 'it cannot be watched with epoll; poll always says readable and writable', {
    given: gmem,
    when: (s, file) => [
      s.kernel.epollCtl(s.epoll(), EPOLL_CTL_ADD, file, POLLIN),
      s.kernel.poll(file, POLLIN | POLLOUT),
    ],
    expect: ['EPERM', 5],
  }),
  scenario(53, 'it has no seals', {
    given: gmem,
    when: (s, file) => [s.kernel.fcntl(file, F_ADD_SEALS, 1), s.kernel.fcntl(file, F_GET_SEALS, 0)],
    expect: ['EINVAL', 'EINVAL'],
  }),
  scenario(54, 'a dup is the same file', {
    given: (s) => {
      const file = gmem(s);
      return { file, copy: s.dup(file) };
    },
    when: (s, { file, copy }) => [
      s.stat(file).ino === s.stat(copy).ino,
      s.fallocate(copy, 1, 0, 2),
      s.closeFd(file),
      s.cached(copy),
    ],
    expect: [true, 0, 0, 2],
  }),
  scenario('7 close on exec', 'FD_CLOEXEC can be dropped and set', {
    given: gmem,
    when: (s, file) => [
      s.kernel.fcntl(file, F_SETFD, 0),
      s.kernel.fcntl(file, F_GETFD, 0),
      s.kernel.fcntl(file, F_SETFD, FD_CLOEXEC),
      s.kernel.fcntlGetFd(file),
    ],
    expect: [0, 0, 0, 1],
  }),
  scenario('7 ioctl', 'the ioctls that belong to every file are answered', {
    given: gmem,
    when: (s, file) => [s.kernel.ioctl(file, FIOCLEX, 0), s.closesOnExec(file)],
    expect: [0, true],
  }),
]);
