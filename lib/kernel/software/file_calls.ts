import { hex } from '../../format.ts';
import {
  EFD_SEMAPHORE,
  EPOLL_CTL_ADD,
  ERRNO,
  F_ADD_SEALS,
  F_GET_SEALS,
  F_GETFD,
  F_GETFL,
  F_SETFD,
  FALLOC_FL_KEEP_SIZE,
  FALLOC_FL_PUNCH_HOLE,
  FD_CLOEXEC,
  MFD_ALLOW_SEALING,
  MFD_CLOEXEC,
  MFD_HUGETLB,
  O_CLOEXEC,
  O_NONBLOCK,
  O_PATH,
  POLLIN,
  POLLOUT,
} from '../../uapi.ts';
import { F_SEAL_GUEST } from '../../uapi_proposed.ts';
import { bytes, i32, isNegative, isZero, text, toPages, u32, u64 } from '../arguments.ts';
import type { CacheStatus, FileStatus, Result, U64 } from '../kernel.ts';
import { fallocateRules, fileSizeRule, vfsFallocateRules } from '../rules/guest_memfd.ts';
import { GuestMemfdFile, OpenFile } from '../state.ts';
import { DiskFile } from './disk_file.ts';
import { type GuestMemfdIo, transferRules } from './guest_memfd_io.ts';
import { guestFileFallocateRules, guestFileRules, guestSealRules } from './guest_seal_rules.ts';
import { MemoryFile } from './memory_file.ts';
import { SoftwareProcess } from './process.ts';
import { SocketFile } from './socket_file.ts';
import { EpollFile, EventFile, SecretFile, SoftwareGuestMemfd, StatsFile } from './software_files.ts';

const GUEST_MEMFD_MAGIC = 0x474d454d;
const ANON_INODE_MAGIC = 0x09041934;
const TMPFS_MAGIC = 0x01021994;

/** The system calls on files of any kind. */
export abstract class FileCalls extends SoftwareProcess {
  abstract openKvm(path?: string): Result;

  open(path: string, flags: number, mode = 0): Result {
    text('path', path);
    i32('flags', flags);
    if (flags & O_PATH) return this.#openPath(path);
    const own = /^\/(?:proc\/self|dev)\/fd\/(\d+)$/.exec(path);
    if (path === '/dev/kvm') return this.openKvm();
    if (own) {
      const file = this.file(Number(own[1]));
      if (!file) return this.refuse('ENOENT', `${path} does not exist`);
      if (file.kind === 'kvm') return this.openKvm();
      if (!(file instanceof MemoryFile)) return this.refuse('ENXIO', 'this kind of file cannot be opened again');
      return this.install(() => file, (flags & O_CLOEXEC) !== 0);
    }
    const file = DiskFile.open(this.pageSize, path, flags, i32('mode', mode));
    if (file === -ERRNO.EOPNOTSUPP)
      return this.refuse(
        'EOPNOTSUPP',
        `${path} is on hugetlbfs, which has no write(2), and the software kernel writes its files`,
      );
    if (typeof file === 'number') return this.refuseErrno(-file, `${path} cannot be opened`);
    return this.install(() => file, (flags & O_CLOEXEC) !== 0);
  }

  fallocate(fd: number, mode: number, offset: U64, length: U64): Result {
    const request = { mode: i32('mode', mode), offset: u64('offset', offset), length: u64('length', length) };
    const file = this.file(i32('fd', fd));
    if (!file) return this.badFd(fd);
    if (file instanceof SoftwareGuestMemfd) {
      const refused = this.check(fallocateRules, file, request);
      if (refused !== null) return refused;
      const start = toPages(request.offset, this.pageSize);
      const end = Math.min(start + toPages(request.length, this.pageSize), file.pages);
      if (request.mode & FALLOC_FL_PUNCH_HOLE) return this.answer(file.punch(start, end));
      file.store.allocate(start, end);
      return 0;
    }
    const refused = this.check(vfsFallocateRules, { machine: this.machine }, request);
    if (refused !== null) return refused;
    if (file instanceof StatsFile) return this.refuse('EBADF', 'statistics can only be read');
    if (file instanceof SecretFile)
      return this.refuse('EOPNOTSUPP', 'secret memory is given back as a whole, by close');
    if (!(file instanceof MemoryFile)) return this.refuse('ENODEV', 'only regular files can be allocated');
    const sealed = this.check(guestFileFallocateRules, file, request);
    if (sealed !== null) return sealed;
    const beyond = this.check([fileSizeRule], file, request);
    if (beyond !== null) return beyond;
    if (request.mode & ~(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE))
      return this.refuse('EOPNOTSUPP', 'memory files only allocate and punch holes');
    return request.mode & FALLOC_FL_PUNCH_HOLE
      ? file.punch(Number(request.offset), Number(request.length))
      : file.allocate(BigInt(request.offset), BigInt(request.length), (request.mode & FALLOC_FL_KEEP_SIZE) !== 0);
  }

  async fallocateAsync(fd: number, mode: number, offset: U64, length: U64): Promise<Result> {
    return this.fallocate(fd, mode, offset, length);
  }

  ftruncate(fd: number, length: U64): Result {
    const size = u64('length', length);
    const file = this.file(i32('fd', fd));
    if (!file) return isNegative(size) ? this.refuse('EINVAL', 'the length is negative') : this.badFd(fd);
    if (file instanceof SecretFile && file.size === 0 && !isNegative(size)) {
      file.size = Number(size);
      return 0;
    }
    if (isNegative(size) || !(file instanceof MemoryFile))
      return this.refuse('EINVAL', 'the size of this file cannot change');
    const sealed = this.check(guestFileRules, file, 'cut');
    if (sealed !== null) return sealed;
    return this.answer(file.truncate(Number(size)));
  }

  fstat(fd: number, status: FileStatus): Result {
    const file = this.files.get(i32('fd', fd));
    if (!file) return this.badFd(fd);
    const { pageSize } = this;
    if (file instanceof SoftwareGuestMemfd || file instanceof SecretFile) {
      Object.assign(status, {
        mode: 0o100600,
        size: BigInt(file.size),
        blocks: 0n,
        blksize: pageSize,
        ino: file.ino,
        nlink: 1,
      });
    } else if (file instanceof MemoryFile) {
      // Also those that KEEP_SIZE allocated behind the end.
      const blocks = BigInt((file.store.residentPages(0, Number.MAX_SAFE_INTEGER) * pageSize) / 512);
      Object.assign(status, {
        mode: file.mode,
        size: BigInt(file.size),
        blocks,
        blksize: pageSize,
        ino: file.ino,
        nlink: 0,
      });
    } else {
      const mode = file.kind === 'kvm' ? 0o020600 : 0o600;
      Object.assign(status, { mode, size: 0n, blocks: 0n, blksize: pageSize, ino: 0n, nlink: 1 });
    }
    return 0;
  }

  fstatfs(fd: number, status: { type?: number; bsize?: number }): Result {
    const file = this.file(i32('fd', fd));
    if (!file) return this.badFd(fd);
    const gmem = file instanceof GuestMemfdFile && this.machine.since('6.19');
    status.type = gmem
      ? GUEST_MEMFD_MAGIC
      : file instanceof MemoryFile || file.kind === 'kvm'
        ? TMPFS_MAGIC
        : ANON_INODE_MAGIC;
    status.bsize = this.pageSize;
    return 0;
  }

  cachestat(fd: number, offset: U64, length: U64, status: CacheStatus): Result {
    const [start, size] = [u64('offset', offset), u64('length', length)];
    const file = this.file(i32('fd', fd));
    if (!file) return this.badFd(fd);
    const pages = (value: U64, round: (n: number) => number): number => round(Number(value) / this.pageSize);
    const end = isZero(size) ? Number.MAX_SAFE_INTEGER : pages(Number(start) + Number(size), Math.ceil);
    const stored = file instanceof SoftwareGuestMemfd || file instanceof MemoryFile || file instanceof SecretFile;
    status.cache = stored ? file.store.residentPages(pages(start, Math.floor), end) : 0;
    status.dirty = status.writeback = status.evicted = status.recentlyEvicted = 0;
    return 0;
  }

  fsync(fd: number): Result {
    const file = this.file(i32('fd', fd));
    if (!file) return this.badFd(fd);
    if (!(file instanceof MemoryFile)) return this.refuse('EINVAL', 'this kind of file cannot be synced');
    return this.answer(file.sync());
  }

  read(fd: number, target: Uint8Array): Result {
    const plain = bytes('target', target);
    const file = this.file(i32('fd', fd));
    if (file instanceof EventFile) return this.answer(file.read(plain));
    if (file instanceof StatsFile) return this.#readStats(file, plain, null);
    return this.#transfer(fd, plain, false, null);
  }

  write(fd: number, source: Uint8Array): Result {
    const plain = bytes('source', source);
    const file = this.file(i32('fd', fd));
    if (file instanceof EventFile) return this.answer(file.write(plain));
    if (file instanceof StatsFile) return this.refuse('EBADF', 'statistics can only be read');
    return this.#transfer(fd, plain, true, null);
  }

  pread(fd: number, target: Uint8Array, offset: U64): Result {
    const plain = bytes('target', target);
    const file = this.file(i32('fd', fd));
    const at = u64('offset', offset);
    if (file instanceof StatsFile && !isNegative(at)) return this.#readStats(file, plain, Number(at));
    return this.#transferAt(fd, plain, false, at);
  }

  pwrite(fd: number, source: Uint8Array, offset: U64): Result {
    return this.#transferAt(fd, bytes('source', source), true, offset);
  }

  lseek(fd: number, offset: U64, whence: number): Result {
    const at = BigInt.asIntN(64, BigInt(u64('offset', offset)));
    const file = this.file(i32('fd', fd));
    if (!file) return this.badFd(fd);
    if (i32('whence', whence) < 0 || whence > 4) return this.refuse('EINVAL', `there is no whence ${whence}`);
    const io = transferable(file);
    if (io) return this.answer(io.seek(Number(at), whence));
    // Seeking there does nothing, and says where the next read is.
    if (file instanceof StatsFile) return file.position;
    return file.kind === 'kvm' || file.kind === 'vm' || file.kind === 'vcpu'
      ? 0
      : this.refuse('ESPIPE', 'this file has no position');
  }

  memfdCreate(name: string, flags: number): Result {
    const known = MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_HUGETLB | 8 | 16;
    const wanted = u32('flags', flags);
    if (wanted & ~known & 0x3ffffff || (!(wanted & MFD_HUGETLB) && wanted >>> 26))
      return this.refuse('EINVAL', `memfd flags ${hex(wanted)} are unknown`);
    if (text('name', name).length > 249) return this.refuse('EINVAL', 'the name of a memfd has at most 249 bytes');
    const file = (): MemoryFile =>
      new MemoryFile(this.pageSize, this.newIno(), {
        sealable: (wanted & MFD_ALLOW_SEALING) !== 0,
        shmem: (wanted & MFD_HUGETLB) === 0,
      });
    return this.install(file, (wanted & MFD_CLOEXEC) !== 0);
  }

  memfdSecret(flags: number): Result {
    if (u32('flags', flags) & ~O_CLOEXEC) return this.refuse('EINVAL', 'memfd_secret knows only O_CLOEXEC');
    return this.install(() => new SecretFile(this.pageSize, this.newIno()), (flags & O_CLOEXEC) !== 0);
  }

  fcntlGetFd(fd: number): Result {
    return this.fcntl(fd, F_GETFD, 0);
  }

  fcntl(fd: number, command: number, argument: number): Result {
    const [number, value] = [i32('command', command), i32('argument', argument)];
    const file = this.files.get(i32('fd', fd));
    if (!file) return this.badFd(fd);
    switch (number) {
      case F_GETFD:
        return this.inheritable.has(fd) ? 0 : FD_CLOEXEC;
      case F_SETFD:
        if (value & FD_CLOEXEC) this.inheritable.delete(fd);
        else this.inheritable.add(fd);
        return 0;
      case F_GETFL: {
        if (file.kind === 'stats') return 0;
        const largeFile = this.machine.isArm ? 0x20000 : 0x8000;
        // What open(2) opened has it, and what behaves as if it had.
        return file.kind === 'kvm' || file.kind === 'gmem' || file.kind === 'file' || file.kind === 'secret'
          ? 2 | largeFile
          : 2;
      }
      case F_ADD_SEALS:
        if (file instanceof MemoryFile && value & F_SEAL_GUEST && this.machine.proposals.has('guest-seal'))
          return this.#sealForGuest(file, value);
        return file instanceof MemoryFile
          ? this.answer(file.fcntlSeals(number, value))
          : this.refuse('EINVAL', 'this file cannot be sealed');
      case F_GET_SEALS:
        return file instanceof MemoryFile
          ? this.answer(file.fcntlSeals(number, value))
          : this.refuse('EINVAL', 'this file cannot be sealed');
      default:
        return this.refuse('EINVAL', `fcntl command ${number} is not one of this boundary`);
    }
  }

  poll(fd: number, events: number): Result {
    const wanted = i32('events', events);
    const file = this.file(i32('fd', fd));
    if (!file) return this.badFd(fd);
    if (file instanceof SocketFile) return wanted & (POLLOUT | (file.readable ? POLLIN : 0));
    return file.kind === 'epoll' || file.kind === 'uffd' ? 0 : wanted & (POLLIN | POLLOUT);
  }

  eventfd(initial: number, flags: number): Result {
    u32('initial', initial);
    if (i32('flags', flags) & ~(O_CLOEXEC | O_NONBLOCK | EFD_SEMAPHORE))
      return this.refuse('EINVAL', 'unknown eventfd flags');
    return this.install(() => new EventFile(initial, (flags & EFD_SEMAPHORE) !== 0));
  }

  epollCreate1(flags: number): Result {
    if (i32('flags', flags) & ~O_CLOEXEC) return this.refuse('EINVAL', 'epoll_create1 knows only EPOLL_CLOEXEC');
    return this.install(() => new EpollFile(), (flags & O_CLOEXEC) !== 0);
  }

  epollCtl(epoll: number, operation: number, fd: number, events: number): Result {
    i32('events', events);
    const [set, file] = [this.file(i32('epoll', epoll)), this.file(i32('fd', fd))];
    if (!set || !file) return this.badFd(set ? fd : epoll);
    // Files that are always ready cannot be waited for; only another epoll instance could, which no caller here needs.
    if (file.kind !== 'epoll' && file.kind !== 'uffd') return this.refuse('EPERM', 'this kind of file is always ready');
    if (set.kind !== 'epoll' || set === file) return this.refuse('EINVAL', 'not an epoll instance, or the same one');
    return operation === EPOLL_CTL_ADD ? 0 : this.refuse('ENOENT', 'the file is not in the set');
  }

  dup(fd: number): Result {
    const file = this.files.get(i32('fd', fd));
    return file ? this.install(() => file) : this.badFd(fd);
  }

  close(fd: number): Result {
    this.inheritable.delete(i32('fd', fd));
    return this.files.close(fd) ? 0 : this.badFd(fd);
  }

  /** F_ADD_SEALS with F_SEAL_GUEST, alone or with others: all of them or none. */
  #sealForGuest(file: MemoryFile, seals: number): Result {
    const refused = this.check(guestSealRules, file, seals);
    if (refused !== null) return refused;
    const others = this.answer(file.fcntlSeals(F_ADD_SEALS, seals & ~F_SEAL_GUEST));
    if (others === 0) file.seals |= F_SEAL_GUEST;
    return others;
  }

  /** An fd that only names a file: every operation on it is EBADF. */
  #openPath(path: string): Result {
    const own = Number(/^\/proc\/self\/fd\/(\d+)$/.exec(path)?.[1]);
    return path === '/dev/kvm' || this.files.get(own)
      ? this.install(() => new OpenFile('path'), false)
      : this.refuse('ENOENT', `the software kernel names only its own files, not ${path}`);
  }

  #readStats(file: StatsFile, target: Uint8Array, at: number | null): Result {
    if (this.memory.touchable(target) < target.length)
      return this.refuse('EFAULT', 'the buffer lies in memory that cannot be touched');
    const count = file.read(target, at ?? file.position);
    if (at === null) file.position += count;
    return count;
  }

  /** @param at null: at the file's position, which moves on. */
  #transfer(fd: number, buffer: Uint8Array, write: boolean, at: number | null): Result {
    const file = this.file(i32('fd', fd));
    if (!file) return this.badFd(fd);
    const io = transferable(file);
    if (!io) return this.refuse('EINVAL', 'this file has no read or write');
    const offset = at ?? io.position;
    const refused =
      file instanceof SoftwareGuestMemfd
        ? this.check(transferRules, file, { offset, length: buffer.length, write })
        : this.check(guestFileRules, file as MemoryFile, 'read or written');
    if (refused !== null) return refused;
    if (this.memory.touchable(buffer) < buffer.length)
      return this.refuse('EFAULT', 'the buffer lies in memory that cannot be touched');
    const count = write ? io.write(buffer, offset) : io.read(buffer, offset);
    if (at === null && count > 0) io.position += count;
    return this.answer(count);
  }

  #transferAt(fd: number, buffer: Uint8Array, write: boolean, offset: U64): Result {
    const at = u64('offset', offset);
    if (isNegative(at)) return this.refuse('EINVAL', 'the offset is negative');
    const file = this.file(i32('fd', fd));
    if (!file) return this.badFd(fd);
    if (file.kind !== 'kvm' && !transferable(file)) return this.refuse('ESPIPE', 'this file has no offsets');
    return this.#transfer(fd, buffer, write, Number(at));
  }
}

/** What reads and writes the bytes of a file; null where they are not for that. */
function transferable(file: OpenFile): MemoryFile | GuestMemfdIo | null {
  if (file instanceof SoftwareGuestMemfd) return file.io;
  return file instanceof MemoryFile ? file : null;
}
