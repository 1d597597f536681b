import { formatBytes, hex } from '../../format.ts';
import type { Arch, ModelOptions } from '../../model_options.ts';
import type { ReadonlyRangeMap } from '../../ranges.ts';
import {
  EPOLL_CTL_ADD,
  ERRNO,
  type ErrnoName,
  F_ADD_SEALS,
  F_GET_SEALS,
  F_GETFD,
  F_GETFL,
  F_SETFD,
  FALLOC_FL_KEEP_SIZE,
  FALLOC_FL_PUNCH_HOLE,
  FD_CLOEXEC,
  KVM_API_VERSION,
  KVM_CHECK_EXTENSION,
  KVM_CLEAR_DIRTY_LOG,
  KVM_CREATE_GUEST_MEMFD,
  KVM_CREATE_VM,
  KVM_ENABLE_CAP,
  KVM_GET_API_VERSION,
  KVM_GET_DIRTY_LOG,
  KVM_GET_VCPU_MMAP_SIZE,
  KVM_SET_MEMORY_ATTRIBUTES,
  KVM_SET_USER_MEMORY_REGION,
  KVM_SET_USER_MEMORY_REGION2,
  MAP_ANONYMOUS,
  MAP_POPULATE,
  MAP_PRIVATE,
  MAP_TYPE,
  MFD_ALLOW_SEALING,
  MFD_CLOEXEC,
  MFD_HUGETLB,
  MS_ASYNC,
  MS_SYNC,
  O_CLOEXEC,
  POLLIN,
  POLLOUT,
  PROT_READ,
  UFFD_FEATURE_WP_ASYNC,
  UFFDIO_REGISTER_MODE_WP,
} from '../../uapi.ts';
import { bytes, i32, isAligned, isNegative, isZero, low32, text, toPages, u32, u64 } from '../arguments.ts';
import type {
  CacheStatus,
  FileStatus,
  Kernel,
  MemoryAttributesArgs,
  Result,
  U64,
  UserMemoryRegion,
  UserMemoryRegion2,
} from '../kernel.ts';
import { checkExtension, Machine } from '../machine.ts';
import { clearDirtyLogRules, getDirtyLogRules } from '../rules/dirty_log.ts';
import { createGuestMemfdRules, fallocateRules, fileSizeRule, vfsFallocateRules } from '../rules/guest_memfd.ts';
import { memoryAttributesRules } from '../rules/memory_attributes.ts';
import { isSameRegion, memslotRules } from '../rules/memslot.ts';
import { check, type Rule, type Violation } from '../rules/rule.ts';
import { applyEnableCap, createVmRules, enableCapRules, vmType } from '../rules/vm.ts';
import { FileTable, GuestMemfdFile, OpenFile, type RegionRequest, VmFile } from '../state.ts';
import { AddressSpace, isAdvice, type MappedFile, type Mapping } from './address_space.ts';
import { DiskFile } from './disk_file.ts';
import { MemoryFile } from './memory_file.ts';
import { mmapRules } from './mmap_rules.ts';
import { EpollFile, SoftwareGuestMemfd, UserfaultFile } from './software_files.ts';

/** RLIMIT_NOFILE of the process the model plays. */
const MAX_FILES = 65536;
const GUEST_MEMFD_MAGIC = 0x474d454d;
const ANON_INODE_MAGIC = 0x09041934;
const TMPFS_MAGIC = 0x01021994;

/** A kernel in TypeScript: the whole of the contract that needs no vCPU, as one process sees it. */
export class SoftwareKernel implements Kernel {
  readonly name = 'software';
  readonly arch: Arch;
  readonly release: string;
  readonly pageSize: number;
  readonly #machine: Machine;
  readonly #files: FileTable;
  readonly #memory: AddressSpace;
  /** fds that survive exec: those without FD_CLOEXEC. */
  readonly #inheritable = new Set<number>();
  /** VMs this process created, whose ioctls it may therefore call. Contract §2.1. */
  readonly #ownVms: WeakSet<VmFile> = new WeakSet();
  #violation: Violation | string | null = null;
  #nextIno = 1n;

  constructor(model: ModelOptions = {}, parent?: { files: FileTable; memory: AddressSpace }) {
    this.#machine = Machine.model(model);
    this.arch = this.#machine.arch;
    this.release = this.#machine.release;
    this.pageSize = this.#machine.pageSize;
    this.#files = parent?.files ?? new FileTable(3);
    this.#memory = parent?.memory ?? new AddressSpace(this.#machine);
    this.#model = model;
  }
  readonly #model: ModelOptions;

  /** The view of a forked child: the same open files and shared memory, an address space of its own. */
  fork(): SoftwareKernel {
    return new SoftwareKernel(this.#model, { files: this.#files.fork(), memory: this.#memory.fork() });
  }

  explain(): string | null {
    const violation = this.#violation;
    return typeof violation === 'string' ? violation : (violation?.sentence ?? null);
  }

  privateGfns(vm: number): ReadonlyRangeMap<true> | undefined {
    return this.#files.vm(vm)?.attributes;
  }

  // ── any fd

  ioctl(fd: number, request: number, argument: U64): Result {
    const [file, number, value] = [this.#files.get(i32('fd', fd)), u32('request', request), u64('argument', argument)];
    if (!file) return this.#badFd(fd);
    if (file.kind === 'kvm') {
      if (number === KVM_CREATE_VM) return this.createVm(fd, value);
      if (number === KVM_CHECK_EXTENSION) return this.checkExtension(fd, low32(value) | 0);
      if (number === KVM_GET_API_VERSION || number === KVM_GET_VCPU_MMAP_SIZE) {
        if (!isZero(value)) return this.#refuse('EINVAL', 'the argument is not 0');
        return number === KVM_GET_API_VERSION ? this.getApiVersion(fd) : this.getVcpuMmapSize(fd);
      }
      return this.#refuse('EINVAL', `/dev/kvm has no request ${hex(number)}`);
    }
    if (!(file instanceof VmFile)) return this.#refuse('ENOTTY', 'this kind of file has no ioctls');
    const refused = this.#vm(fd);
    if (typeof refused === 'number') return refused;
    if (number === KVM_CHECK_EXTENSION) return this.checkExtension(fd, low32(value) | 0);
    if (number === KVM_SET_MEMORY_ATTRIBUTES && !this.#machine.swProtected) return this.#unknownVmRequest(number);
    if (number === KVM_CREATE_GUEST_MEMFD && !this.#machine.hasGuestMemfd) return this.#unknownVmRequest(number);
    const pointers: readonly number[] = [
      KVM_GET_DIRTY_LOG,
      KVM_CLEAR_DIRTY_LOG,
      KVM_SET_USER_MEMORY_REGION,
      KVM_SET_USER_MEMORY_REGION2,
      KVM_ENABLE_CAP,
      KVM_SET_MEMORY_ATTRIBUTES,
      KVM_CREATE_GUEST_MEMFD,
    ];
    return pointers.includes(number)
      ? this.#refuse('EFAULT', 'the argument is not a readable address')
      : this.#unknownVmRequest(number);
  }

  // ── /dev/kvm

  openKvm(path = '/dev/kvm'): Result {
    if (text('path', path) !== '/dev/kvm') return this.#refuse('ENOENT', `the software kernel has no device ${path}`);
    return this.#install(() => new OpenFile('kvm'));
  }

  getApiVersion(kvm: number): Result {
    return this.#kvm(kvm) ?? KVM_API_VERSION;
  }

  getVcpuMmapSize(kvm: number): Result {
    return this.#kvm(kvm) ?? (this.#machine.isArm ? 2 : 3) * this.pageSize;
  }

  checkExtension(fd: number, capability: number): Result {
    const number = i32('capability', capability);
    if (this.#files.get(i32('fd', fd))?.kind === 'kvm') return checkExtension(this.#machine, number);
    const vm = this.#vm(fd);
    return typeof vm === 'number' ? vm : checkExtension(this.#machine, number, vm);
  }

  createVm(kvm: number, type: U64): Result {
    const request = vmType(type);
    const refused = this.#kvm(kvm) ?? this.#noFreeFd();
    if (refused !== null) return refused;
    return (
      this.#check(createVmRules, this.#machine, request) ??
      this.#install(() => {
        const vm = new VmFile(this.#machine, low32(request.type));
        this.#ownVms.add(vm);
        return vm;
      })
    );
  }

  // ── VM fds

  createGuestMemfd(vm: number, args: { size: U64; flags: U64 }): Result {
    const request = { size: u64('size', args.size), flags: u64('flags', args.flags) };
    const owner = this.#vm(vm);
    if (typeof owner === 'number') return owner;
    return (
      this.#check(createGuestMemfdRules, owner, request) ??
      this.#install(() => new SoftwareGuestMemfd(owner, request.size, low32(request.flags), this.#nextIno++))
    );
  }

  setUserMemoryRegion(vm: number, region: UserMemoryRegion): Result {
    return this.#setRegion(vm, { ...region, guestMemfdOffset: 0, guestMemfd: -1 }, true);
  }

  setUserMemoryRegion2(vm: number, region: UserMemoryRegion2): Result {
    return this.#setRegion(vm, region, false);
  }

  setMemoryAttributes(vm: number, args: MemoryAttributesArgs): Result {
    const { address, size, attributes, flags } = args;
    const request = {
      address: u64('address', address),
      size: u64('size', size),
      attributes: u64('attributes', attributes),
      flags: u64('flags', flags),
    };
    const owner = this.#vm(vm);
    if (typeof owner === 'number') return owner;
    const refused = this.#check(memoryAttributesRules, owner, request);
    if (refused !== null) return refused;
    owner.applyAttributes(request.address, request.size, request.attributes);
    return 0;
  }

  async setMemoryAttributesAsync(vm: number, args: MemoryAttributesArgs): Promise<Result> {
    return this.setMemoryAttributes(vm, args);
  }

  enableCap(fd: number, args: { cap: number; flags: number; args: readonly U64[] }): Result {
    const [a0 = 0, a1 = 0, a2 = 0, a3 = 0] = Array.from(args.args, (value) => u64('args', value));
    const request = { cap: u32('cap', args.cap), flags: u32('flags', args.flags), args: [a0, a1, a2, a3] as const };
    const vm = this.#vm(fd);
    if (typeof vm === 'number') return vm;
    const refused = this.#check(enableCapRules, vm, request);
    if (refused !== null) return refused;
    applyEnableCap(vm, request);
    return 0;
  }

  getDirtyLog(vm: number, args: { slot: number; dirtyBitmap: Uint8Array | null }): Result {
    const slotNumber = u32('slot', args.slot);
    const bitmap = args.dirtyBitmap === null ? null : bytes('dirtyBitmap', args.dirtyBitmap);
    const owner = this.#vm(vm);
    if (typeof owner === 'number') return owner;
    const request = { addressSpace: slotNumber >>> 16, id: slotNumber & 0xffff };
    const refused = this.#check(getDirtyLogRules, owner, request);
    if (refused !== null) return refused;
    const slot = owner.slot(request.addressSpace, request.id);
    const dirty = slot?.dirty;
    if (!slot || !dirty) return -ERRNO.ENOENT;
    const pages = [...dirty];
    // Without manual protection the bits are taken before they are copied out, and lost when that fails. Contract §16.
    if (owner.manualDirtyLog === 0) dirty.clear();
    const size = Math.ceil(slot.pages / 64) * 8;
    if (!bitmap || bitmap.length < size) return this.#refuse('EFAULT', `the bitmap is shorter than ${size} bytes`);
    bitmap.fill(0, 0, size);
    for (const { start, end } of pages) setBits(bitmap, start, end);
    return 0;
  }

  clearDirtyLog(
    vm: number,
    args: { slot: number; numPages: number; firstPage: U64; dirtyBitmap: Uint8Array | null },
  ): Result {
    const slotNumber = u32('slot', args.slot);
    const request = {
      addressSpace: slotNumber >>> 16,
      id: slotNumber & 0xffff,
      numPages: u32('numPages', args.numPages),
      firstPage: u64('firstPage', args.firstPage),
    };
    const bitmap = args.dirtyBitmap === null ? null : bytes('dirtyBitmap', args.dirtyBitmap);
    const owner = this.#vm(vm);
    if (typeof owner === 'number') return owner;
    const refused = this.#check(clearDirtyLogRules, owner, request);
    if (refused !== null) return refused;
    if (request.numPages === 0) return 0;
    const size = Math.ceil(request.numPages / 64) * 8;
    if (!bitmap || bitmap.length < size) return this.#refuse('EFAULT', `the bitmap is shorter than ${size} bytes`);
    const dirty = owner.slot(request.addressSpace, request.id)?.dirty;
    const first = Number(request.firstPage);
    for (const { start, end } of setRuns(bitmap, request.numPages)) dirty?.delete(first + start, first + end);
    return 0;
  }

  // ── files

  open(path: string, flags: number, mode = 0): Result {
    text('path', path);
    i32('flags', flags);
    const own = /^\/(?:proc\/self|dev)\/fd\/(\d+)$/.exec(path);
    if (path === '/dev/kvm') return this.openKvm();
    if (own) {
      const file = this.#files.get(Number(own[1]));
      if (!file) return this.#refuse('ENOENT', `${path} does not exist`);
      if (file.kind === 'kvm') return this.openKvm();
      if (!(file instanceof MemoryFile)) return this.#refuse('ENXIO', 'this kind of file cannot be opened again');
      return this.#install(() => file, (flags & O_CLOEXEC) !== 0);
    }
    const file = DiskFile.open(this.pageSize, path, flags, i32('mode', mode));
    if (typeof file === 'number') return this.#refuseErrno(-file, `${path} cannot be opened`);
    return this.#install(() => file, (flags & O_CLOEXEC) !== 0);
  }

  fallocate(fd: number, mode: number, offset: U64, length: U64): Result {
    const request = { mode: i32('mode', mode), offset: u64('offset', offset), length: u64('length', length) };
    const file = this.#files.get(i32('fd', fd));
    if (!file) return this.#badFd(fd);
    if (file instanceof SoftwareGuestMemfd) {
      const refused = this.#check(fallocateRules, file, request);
      if (refused !== null) return refused;
      const start = toPages(request.offset, this.pageSize);
      const end = Math.min(start + toPages(request.length, this.pageSize), file.pages);
      if (request.mode & FALLOC_FL_PUNCH_HOLE) file.store.discard(start, end);
      else file.store.populate(start, end);
      return 0;
    }
    const refused = this.#check(vfsFallocateRules, file, request);
    if (refused !== null) return refused;
    if (!(file instanceof MemoryFile)) return this.#refuse('ENODEV', 'only regular files can be allocated');
    const beyond = this.#check([fileSizeRule], file, request);
    if (beyond !== null) return beyond;
    if (request.mode & ~(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE))
      return this.#refuse('EOPNOTSUPP', 'memory files only allocate and punch holes');
    const [at, size] = [Number(request.offset), Number(request.length)];
    return request.mode & FALLOC_FL_PUNCH_HOLE
      ? file.punch(at, size)
      : file.allocate(at, size, (request.mode & FALLOC_FL_KEEP_SIZE) !== 0);
  }

  async fallocateAsync(fd: number, mode: number, offset: U64, length: U64): Promise<Result> {
    return this.fallocate(fd, mode, offset, length);
  }

  ftruncate(fd: number, length: U64): Result {
    const size = u64('length', length);
    const file = this.#files.get(i32('fd', fd));
    if (!file) return isNegative(size) ? this.#refuse('EINVAL', 'the length is negative') : this.#badFd(fd);
    if (isNegative(size) || !(file instanceof MemoryFile))
      return this.#refuse('EINVAL', 'the size of this file cannot change');
    return this.#answer(file.truncate(Number(size)));
  }

  fstat(fd: number, status: FileStatus): Result {
    const file = this.#files.get(i32('fd', fd));
    if (!file) return this.#badFd(fd);
    const { pageSize } = this;
    if (file instanceof SoftwareGuestMemfd) {
      Object.assign(status, {
        mode: 0o100600,
        size: BigInt(file.size),
        blocks: 0n,
        blksize: pageSize,
        ino: file.ino,
        nlink: 1,
      });
    } else if (file instanceof MemoryFile) {
      const blocks = BigInt((file.store.residentPages(0, file.pages) * pageSize) / 512);
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
    const file = this.#files.get(i32('fd', fd));
    if (!file) return this.#badFd(fd);
    const gmem = file instanceof GuestMemfdFile && this.#machine.since('6.19');
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
    const file = this.#files.get(i32('fd', fd));
    if (!file) return this.#badFd(fd);
    const pages = (value: U64, round: (n: number) => number): number => round(Number(value) / this.pageSize);
    const end = isZero(size) ? Number.MAX_SAFE_INTEGER : pages(Number(start) + Number(size), Math.ceil);
    const stored = file instanceof SoftwareGuestMemfd || file instanceof MemoryFile;
    status.cache = stored ? file.store.residentPages(pages(start, Math.floor), Math.min(end, file.pages)) : 0;
    status.dirty = status.writeback = status.evicted = status.recentlyEvicted = 0;
    return 0;
  }

  fsync(fd: number): Result {
    const file = this.#files.get(i32('fd', fd));
    if (!file) return this.#badFd(fd);
    if (!(file instanceof MemoryFile)) return this.#refuse('EINVAL', 'this kind of file cannot be synced');
    file.sync();
    return 0;
  }

  read(fd: number, target: Uint8Array): Result {
    bytes('target', target);
    return this.#transfer(fd, target, (file) => {
      const count = file.read(target, file.position);
      file.position += count;
      return count;
    });
  }

  write(fd: number, source: Uint8Array): Result {
    bytes('source', source);
    return this.#transfer(fd, source, (file) => {
      const count = file.write(source, file.position);
      if (count > 0) file.position += count;
      return count;
    });
  }

  pread(fd: number, target: Uint8Array, offset: U64): Result {
    bytes('target', target);
    return this.#transferAt(fd, target, offset, (file, at) => file.read(target, at));
  }

  pwrite(fd: number, source: Uint8Array, offset: U64): Result {
    bytes('source', source);
    return this.#transferAt(fd, source, offset, (file, at) => file.write(source, at));
  }

  lseek(fd: number, offset: U64, whence: number): Result {
    const at = BigInt.asIntN(64, BigInt(u64('offset', offset)));
    const file = this.#files.get(i32('fd', fd));
    if (!file) return this.#badFd(fd);
    if (i32('whence', whence) < 0 || whence > 4) return this.#refuse('EINVAL', `there is no whence ${whence}`);
    if (file instanceof MemoryFile) return this.#answer(file.seek(Number(at), whence));
    return file.kind === 'kvm' || file.kind === 'vm' ? 0 : this.#refuse('ESPIPE', 'this file has no position');
  }

  memfdCreate(name: string, flags: number): Result {
    const known = MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_HUGETLB | 8 | 16;
    const wanted = u32('flags', flags);
    if (wanted & ~known & 0x3ffffff || (!(wanted & MFD_HUGETLB) && wanted >>> 26))
      return this.#refuse('EINVAL', `memfd flags ${hex(wanted)} are unknown`);
    if (text('name', name).length > 249) return this.#refuse('EINVAL', 'the name of a memfd has at most 249 bytes');
    const file = (): MemoryFile =>
      new MemoryFile(this.pageSize, this.#nextIno++, { sealable: (wanted & MFD_ALLOW_SEALING) !== 0 });
    return this.#install(file, (wanted & MFD_CLOEXEC) !== 0);
  }

  fcntlGetFd(fd: number): Result {
    return this.fcntl(fd, F_GETFD, 0);
  }

  fcntl(fd: number, command: number, argument: number): Result {
    const [number, value] = [i32('command', command), i32('argument', argument)];
    const file = this.#files.get(i32('fd', fd));
    if (!file) return this.#badFd(fd);
    switch (number) {
      case F_GETFD:
        return this.#inheritable.has(fd) ? 0 : FD_CLOEXEC;
      case F_SETFD:
        if (value & FD_CLOEXEC) this.#inheritable.delete(fd);
        else this.#inheritable.add(fd);
        return 0;
      case F_GETFL: {
        const largeFile = this.#machine.isArm ? 0x20000 : 0x8000;
        return file.kind === 'vm' || file.kind === 'uffd' ? 2 : 2 | largeFile;
      }
      case F_ADD_SEALS:
      case F_GET_SEALS:
        return file instanceof MemoryFile
          ? this.#answer(file.fcntlSeals(number, value))
          : this.#refuse('EINVAL', 'this file cannot be sealed');
      default:
        return this.#refuse('EINVAL', `fcntl command ${number} is not one of this boundary`);
    }
  }

  poll(fd: number, events: number): Result {
    const wanted = i32('events', events);
    const file = this.#files.get(i32('fd', fd));
    if (!file) return this.#badFd(fd);
    return file.kind === 'epoll' || file.kind === 'uffd' ? 0 : wanted & (POLLIN | POLLOUT);
  }

  epollCreate1(flags: number): Result {
    if (i32('flags', flags) & ~O_CLOEXEC) return this.#refuse('EINVAL', 'epoll_create1 knows only EPOLL_CLOEXEC');
    return this.#install(() => new EpollFile(), (flags & O_CLOEXEC) !== 0);
  }

  epollCtl(epoll: number, operation: number, fd: number, events: number): Result {
    i32('events', events);
    const [set, file] = [this.#files.get(i32('epoll', epoll)), this.#files.get(i32('fd', fd))];
    if (!set || !file) return this.#badFd(set ? fd : epoll);
    // Files that are always ready cannot be waited for; only another epoll instance could, which no caller here needs.
    if (file.kind !== 'epoll' && file.kind !== 'uffd')
      return this.#refuse('EPERM', 'this kind of file is always ready');
    if (set.kind !== 'epoll' || set === file) return this.#refuse('EINVAL', 'not an epoll instance, or the same one');
    return operation === EPOLL_CTL_ADD ? 0 : this.#refuse('ENOENT', 'the file is not in the set');
  }

  dup(fd: number): Result {
    const file = this.#files.get(i32('fd', fd));
    return file ? this.#install(() => file) : this.#badFd(fd);
  }

  close(fd: number): Result {
    this.#inheritable.delete(i32('fd', fd));
    return this.#files.close(fd) ? 0 : this.#badFd(fd);
  }

  // ── mappings

  mmap(args: { length: U64; prot: number; flags: number; fd: number; offset: U64 }): Result {
    const flags = i32('flags', args.flags);
    const fd = i32('fd', args.fd);
    const request = {
      length: u64('length', args.length),
      prot: i32('prot', args.prot),
      flags,
      offset: u64('offset', args.offset),
      file: flags & MAP_ANONYMOUS ? undefined : this.#files.get(fd),
    };
    const refused = this.#check(mmapRules, this.#machine, request);
    if (refused !== null) return refused;
    const pages = Math.ceil(Number(request.length) / this.pageSize);
    const shared = (flags & MAP_TYPE) !== MAP_PRIVATE;
    const pgoff = request.file ? toPages(request.offset, this.pageSize) : 0;
    const handle = this.#memory.map(
      pages,
      shared,
      this.#mappedFile(request.file, shared, pages),
      pgoff,
      request.prot & 7,
    );
    if (handle < 0) return this.#refuse('ENOMEM', `no room for ${formatBytes(request.length)}`);
    if (flags & MAP_POPULATE) this.#memory.populate(this.#memory.get(handle) as Mapping, 0, pages, PROT_READ);
    return handle;
  }

  addressOf(mapping: number): bigint {
    const found = this.#memory.get(i32('mapping', mapping));
    if (!found) throw new TypeError(`there is no mapping ${mapping}`);
    return found.address;
  }

  mprotect(mapping: number, offset: U64, length: U64, prot: number): Result {
    const wanted = i32('prot', prot);
    return this.#range(mapping, offset, length, (found, start, end) => this.#memory.protect(found, start, end, wanted));
  }

  madvise(mapping: number, offset: U64, length: U64, advice: number): Result {
    const wanted = i32('advice', advice);
    if (!isAdvice(wanted))
      return this.#refuse('EINVAL', `advice ${wanted} is unknown, or would poison memory of the machine`);
    return this.#range(mapping, offset, length, (found, start, end) => this.#memory.advise(found, start, end, wanted));
  }

  async madviseAsync(mapping: number, offset: U64, length: U64, advice: number): Promise<Result> {
    return this.madvise(mapping, offset, length, advice);
  }

  mlock(mapping: number, offset: U64, length: U64): Result {
    return this.#range(
      mapping,
      offset,
      length,
      (found, start, end) => this.#memory.lock(found, start, end),
      Math.floor,
    );
  }

  munlock(mapping: number, offset: U64, length: U64): Result {
    return this.#range(
      mapping,
      offset,
      length,
      (found, start, end) => {
        found.locked.delete(start, end);
        return 0;
      },
      Math.floor,
    );
  }

  msync(mapping: number, offset: U64, length: U64, flags: number): Result {
    const wanted = i32('flags', flags);
    if (wanted & ~7 || (wanted & MS_ASYNC && wanted & MS_SYNC))
      return this.#refuse('EINVAL', 'MS_ASYNC and MS_SYNC exclude each other');
    return this.#range(mapping, offset, length, ({ file, gmem, shared }) => {
      if (!(wanted & MS_SYNC) || !shared) return 0;
      if (gmem) return -ERRNO.EINVAL;
      if (file instanceof MemoryFile) file.sync();
      return 0;
    });
  }

  mbind(mapping: number, offset: U64, length: U64, policy: number, nodes: readonly number[]): Result {
    const [number, wanted] = [i32('policy', policy), Array.from(nodes, (node) => i32('nodes', node))];
    return this.#range(mapping, offset, length, (found, start, end) =>
      this.#memory.bind(found, start, end, number, wanted),
    );
  }

  getMempolicy(mapping: number, offset: U64): Result {
    return this.#range(mapping, offset, 1, (found, start) => this.#memory.policyAt(found, start), Math.floor);
  }

  mincore(mapping: number, offset: U64, length: U64, residency: Uint8Array): Result {
    bytes('residency', residency);
    return this.#range(mapping, offset, length, (found, start, end) => {
      if (residency.length < end - start) return -ERRNO.EFAULT;
      this.#memory.residency(found, start, end, residency);
      return 0;
    });
  }

  userfaultfd(flags: number): Result {
    return i32('flags', flags) & ~(O_CLOEXEC | 0o4000 | 1)
      ? this.#refuse('EINVAL', 'unknown userfaultfd flags')
      : this.#install(() => new UserfaultFile());
  }

  uffdioApi(uffd: number, features: U64): Result {
    const wanted = BigInt(u64('features', features));
    const file = this.#files.get(i32('uffd', uffd));
    if (!file) return this.#badFd(uffd);
    if (!(file instanceof UserfaultFile)) return this.#refuse('ENOTTY', 'not a userfaultfd');
    if (file.features !== null || wanted >> 17n)
      return this.#refuse('EINVAL', 'the API is set already, or a feature is unknown');
    file.features = wanted;
    return 0;
  }

  uffdioRegister(uffd: number, mapping: number, offset: U64, length: U64, mode: number): Result {
    const wanted = i32('mode', mode);
    const file = this.#files.get(i32('uffd', uffd));
    if (!file) return this.#badFd(uffd);
    if (!(file instanceof UserfaultFile)) return this.#refuse('ENOTTY', 'not a userfaultfd');
    const { features } = file;
    return this.#range(mapping, offset, length, ({ gmem }) => {
      if (features === null || wanted < 1 || wanted > 7) return -ERRNO.EINVAL;
      const asyncOnly = wanted === UFFDIO_REGISTER_MODE_WP && (features & BigInt(UFFD_FEATURE_WP_ASYNC)) !== 0n;
      return gmem && !asyncOnly ? -ERRNO.EINVAL : 0;
    });
  }

  peek(mapping: number, offset: U64, target: Uint8Array): Result {
    const at = Number(u64('offset', offset));
    bytes('target', target);
    const found = this.#memory.get(i32('mapping', mapping));
    if (!found) return this.#refuse('EFAULT', `there is no mapping ${mapping}`);
    return this.#answer(this.#memory.peek(found, at, target));
  }

  poke(mapping: number, offset: U64, source: Uint8Array): Result {
    const at = Number(u64('offset', offset));
    bytes('source', source);
    const found = this.#memory.get(i32('mapping', mapping));
    if (!found) return this.#refuse('EFAULT', `there is no mapping ${mapping}`);
    return this.#answer(this.#memory.poke(found, at, source));
  }

  window(mapping: number, offset: number, length: number): Uint8Array {
    const found = this.#memory.get(i32('mapping', mapping));
    const inside = found && Number.isSafeInteger(offset) && Number.isSafeInteger(length) && offset >= 0 && length >= 0;
    if (!inside || offset + length > found.pages * this.pageSize)
      throw new TypeError(`mapping ${mapping} has no bytes ${offset}, +${length}`);
    const view = this.#memory.window(found, offset, length);
    if (!view)
      throw new TypeError(`bytes ${offset}, +${length} lie in two windows of the software kernel that cannot be one`);
    return view;
  }

  releaseWindow(view: Uint8Array): void {
    this.#memory.releaseWindow(bytes('view', view));
  }

  munmap(mapping: number): Result {
    return this.#answer(this.#memory.unmap(i32('mapping', mapping)));
  }

  // ── what the calls share

  #setRegion(vm: number, region: UserMemoryRegion2, v1: boolean): Result {
    const slot = u32('slot', region.slot);
    const fd = i32('guestMemfd', region.guestMemfd);
    const request: RegionRequest = {
      v1,
      addressSpace: slot >>> 16,
      id: slot & 0xffff,
      flags: u32('flags', region.flags),
      guestPhysAddr: u64('guestPhysAddr', region.guestPhysAddr),
      memorySize: u64('memorySize', region.memorySize),
      userspaceAddr: u64('userspaceAddr', region.userspaceAddr),
      guestMemfdOffset: u64('guestMemfdOffset', region.guestMemfdOffset),
      guestMemfd: fd,
      file: this.#files.get(fd),
    };
    const owner = this.#vm(vm);
    if (typeof owner === 'number') return owner;
    const refused = this.#check(memslotRules, owner, request);
    if (refused !== null) return refused;
    if (!isSameRegion(owner, request)) owner.applyRegion(request);
    return 0;
  }

  #install(create: () => OpenFile, closeOnExec = true): Result {
    const refused = this.#noFreeFd();
    if (refused !== null) return refused;
    const fd = this.#files.add(create());
    if (!closeOnExec) this.#inheritable.add(fd);
    return fd;
  }

  #noFreeFd(): Result | null {
    return this.#files.size >= MAX_FILES ? this.#refuse('EMFILE', `the process has ${MAX_FILES} files open`) : null;
  }

  #kvm(fd: number): Result | null {
    const file = this.#files.get(i32('kvm', fd));
    if (!file) return this.#badFd(fd);
    if (file.kind === 'kvm') return null;
    return file.kind === 'vm' ? this.#unknownVmRequest(0) : this.#refuse('ENOTTY', 'not /dev/kvm');
  }

  /** The VM behind an fd this process may use, or the -errno. Contract §2. */
  #vm(fd: number): VmFile | Result {
    const file = this.#files.get(i32('vm', fd));
    if (!file) return this.#badFd(fd);
    if (file instanceof VmFile)
      return this.#ownVms.has(file) ? file : this.#refuse('EIO', 'the VM belongs to another process');
    return file.kind === 'kvm'
      ? this.#refuse('EINVAL', '/dev/kvm has no such request: it is one of VM fds')
      : this.#refuse('ENOTTY', 'not a VM fd');
  }

  #unknownVmRequest(request: number): Result {
    return this.#refuse(this.#machine.isArm ? 'EINVAL' : 'ENOTTY', `VM fds have no request ${hex(request)}`);
  }

  #transfer(fd: number, buffer: Uint8Array, move: (file: MemoryFile) => Result): Result {
    const file = this.#files.get(i32('fd', fd));
    if (!file) return this.#badFd(fd);
    if (!(file instanceof MemoryFile)) return this.#refuse('EINVAL', 'this file has no read or write');
    if (!this.#memory.canTouch(buffer))
      return this.#refuse('EFAULT', 'the buffer lies in memory that cannot be touched');
    return this.#answer(move(file));
  }

  #transferAt(fd: number, buffer: Uint8Array, offset: U64, move: (file: MemoryFile, at: number) => Result): Result {
    const at = u64('offset', offset);
    if (isNegative(at)) return this.#refuse('EINVAL', 'the offset is negative');
    const file = this.#files.get(i32('fd', fd));
    if (!file) return this.#badFd(fd);
    if (file.kind !== 'kvm' && !(file instanceof MemoryFile)) return this.#refuse('ESPIPE', 'this file has no offsets');
    return this.#transfer(fd, buffer, (opened) => move(opened, Number(at)));
  }

  /** A range of pages of a mapping; arguments are checked as the kernel does for an address and a length. */
  #range(
    mapping: number,
    offset: U64,
    length: U64,
    call: (mapping: Mapping, start: number, end: number) => Result,
    round?: (pages: number) => number,
  ): Result {
    const [at, size] = [u64('offset', offset), u64('length', length)];
    const found = this.#memory.get(i32('mapping', mapping));
    if (!round && !isAligned(at, this.pageSize))
      return this.#refuse('EINVAL', `offset ${hex(at)} is not a multiple of ${this.pageSize}`);
    const start = Math.floor(Number(at) / this.pageSize);
    const end = Math.ceil((Number(at) + Number(size)) / this.pageSize);
    if (!found || end > found.pages) return this.#refuse('ENOMEM', 'the range is not mapped');
    return start === end ? 0 : this.#answer(call(found, start, end));
  }

  #mappedFile(file: OpenFile | undefined, shared: boolean, pages: number): MappedFile | null {
    if (file instanceof SoftwareGuestMemfd || file instanceof MemoryFile) return file;
    if (!shared) return null;
    const memory = new MemoryFile(this.pageSize, this.#nextIno++);
    memory.size = pages * this.pageSize;
    return memory;
  }

  #check<S, R>(rules: readonly Rule<S, R>[], subject: S, request: R): Result | null {
    const violation = check(rules, subject, request);
    if (!violation) return null;
    this.#violation = violation;
    return -violation.errno;
  }

  #badFd(fd: number): Result {
    return this.#refuse('EBADF', `fd ${fd} is not one this kernel opened`);
  }

  #refuse(errno: ErrnoName, sentence: string): Result {
    return this.#refuseErrno(ERRNO[errno], sentence);
  }

  #refuseErrno(errno: number, sentence: string): Result {
    this.#violation = sentence;
    return -errno;
  }

  /** A result whose sentence, if it is an error, nobody knows. */
  #answer(result: Result): Result {
    if (result < 0) this.#violation = null;
    return result;
  }
}

function setBits(bitmap: Uint8Array, start: number, end: number): void {
  for (let bit = start; bit < end; ) {
    if (bit % 8 === 0 && end - bit >= 8) {
      const whole = Math.floor((end - bit) / 8);
      bitmap.fill(0xff, bit / 8, bit / 8 + whole);
      bit += whole * 8;
    } else {
      bitmap[bit >> 3] = (bitmap[bit >> 3] as number) | (1 << (bit % 8));
      bit++;
    }
  }
}

function* setRuns(bitmap: Uint8Array, bits: number): Generator<{ start: number; end: number }> {
  let start = -1;
  for (let bit = 0; bit < bits; bit++) {
    const set = ((bitmap[bit >> 3] as number) >> (bit % 8)) & 1;
    if (set && start < 0) start = bit;
    if (!set && start >= 0) {
      yield { start, end: bit };
      start = -1;
    }
  }
  if (start >= 0) yield { start, end: bits };
}
