import fs from 'node:fs';
import os from 'node:os';
import { KvmError } from '../../errors.ts';
import type { Arch } from '../../model_options.ts';
import type { ReadonlyRangeMap } from '../../ranges.ts';
import {
  ERRNO,
  type ErrnoName,
  F_ADD_SEALS,
  F_GET_SEALS,
  F_GETFD,
  F_GETFL,
  F_SETFD,
  KVM_CAP,
  KVM_CHECK_EXTENSION,
  KVM_CREATE_VCPU,
  KVM_CREATE_VM,
  KVM_GET_API_VERSION,
  KVM_GET_STATS_FD,
  KVM_GET_VCPU_MMAP_SIZE,
  KVM_RUN,
  KVM_VM_TYPE_ARM_PROTECTED,
  MAP_ANONYMOUS,
  MAP_FIXED,
  MAP_FIXED_NOREPLACE,
  O_CLOEXEC,
  O_RDWR,
} from '../../uapi.ts';
import { shown } from '../../validate.ts';
import { bytes, i32, low32, sumExceeds, text, u32, u64 } from '../arguments.ts';
import type {
  CacheStatus,
  FileStatus,
  Kernel,
  MemoryAttributes2Args,
  MemoryAttributesArgs,
  Result,
  U64,
  UserMemoryRegion,
  UserMemoryRegion2,
} from '../kernel.ts';
import { Machine } from '../machine.ts';
import { conversionPages, conversionRules, isToPrivate, notGuestMemfd } from '../rules/conversion.ts';
import { clearDirtyLogRules, getDirtyLogRules } from '../rules/dirty_log.ts';
import { createGuestMemfdRules, fallocateRules } from '../rules/guest_memfd.ts';
import { linkRules } from '../rules/link.ts';
import { memoryAttributesRules } from '../rules/memory_attributes.ts';
import { isSameRegion, memslotRules, regionRequest } from '../rules/memslot.ts';
import { check } from '../rules/rule.ts';
import { applyEnableCap, createVmRules, enableCapRules, vmType } from '../rules/vm.ts';
import { GuestMemfdFile, OpenFile, VmFile } from '../state.ts';
import { type Addon, AddonUnavailable, loadAddon } from './addon.ts';
import type { Command } from './command.ts';
import { isDangerous, isHarmful } from './dangerous.ts';
import { VcpuCalls } from './vcpu_calls.ts';

/** The most bytes one ArrayBuffer has on Node 20. */
const WINDOW_MAX = 2 ** 32;
const WINDOW_STEP = WINDOW_MAX / 2;
/** The most fds of one message. */
const MESSAGE_FDS = 32;
const FCNTL_COMMANDS: readonly number[] = [F_GETFD, F_SETFD, F_GETFL, F_ADD_SEALS, F_GET_SEALS];

interface LinuxMapping {
  readonly length: number;
  readonly file: OpenFile | undefined;
  /** Buffers that views share, by where they start. */
  readonly windows: Map<number, WeakRef<ArrayBuffer>>;
}

/** The running kernel. It does nothing but pass on calls and keep count of what they changed, so that a refusal can be explained. */
export class LinuxKernel extends VcpuCalls implements Kernel {
  readonly name = 'linux';
  readonly arch: Arch = process.arch === 'arm64' ? 'aarch64' : 'x86_64';
  readonly release = os.release();
  readonly pageSize: number;
  readonly #mappings: (LinuxMapping | undefined)[] = [];
  #machine: Machine | null = null;

  constructor(native: Addon) {
    super(native);
    this.pageSize = native.pageSize;
  }

  privateGfns(vm: number): ReadonlyRangeMap<true> | undefined {
    return this.files.vm(vm)?.attributes;
  }

  privatePages(fd: number): ReadonlyRangeMap<true> | undefined {
    return this.files.gmem(fd)?.privatePages;
  }

  /** Takes over an fd that this process got from elsewhere, by inheritance or over a socket. */
  adopt(fd: number, kind: 'kvm' | 'vm' | 'gmem' | 'file'): Result {
    this.command.i32(0, i32('fd', fd));
    if (this.files.get(fd)) return this.answer(-ERRNO.EEXIST);
    const result = this.native.adopt();
    return result < 0 ? this.answer(result) : this.files.put(fd, new OpenFile(kind));
  }

  // ── any fd

  ioctl(fd: number, request: number, argument: U64): Result {
    const [own, number, value] = [this.own(fd), u32('request', request), u64('argument', argument)];
    // Type 0xae without a direction: KVM takes the argument by value. Everything else would be an address of this process.
    const byValue = number >>> 8 === 0xae;
    if (!byValue && sumExceeds(value, 0, 4095)) return this.answer(-ERRNO.EFAULT);
    // What makes a new fd goes through the method that keeps track of it.
    if (number === KVM_CREATE_VM && this.files.get(fd)?.kind === 'kvm') return this.createVm(fd, value);
    if (number === KVM_CREATE_VCPU && this.files.vm(fd)) return this.createVcpu(fd, low32(value));
    // A run without a deadline may never come back.
    if (number === KVM_GET_STATS_FD || number === KVM_RUN) return this.answer(-ERRNO.EINVAL);
    return this.answer(this.ioctlWord(own, number, value));
  }

  // ── /dev/kvm

  openKvm(path = '/dev/kvm'): Result {
    this.command.i32(0, O_RDWR | O_CLOEXEC).i32(1, 0);
    const fd = this.native.open(text('path', path));
    return this.opened(fd, () => new OpenFile('kvm'));
  }

  getApiVersion(kvm: number): Result {
    return this.answer(this.ioctlWord(this.own(kvm), KVM_GET_API_VERSION, 0));
  }

  getVcpuMmapSize(kvm: number): Result {
    return this.answer(this.ioctlWord(this.own(kvm), KVM_GET_VCPU_MMAP_SIZE, 0));
  }

  checkExtension(fd: number, capability: number): Result {
    return this.answer(this.ioctlWord(this.own(fd), KVM_CHECK_EXTENSION, i32('capability', capability) >>> 0));
  }

  createVm(kvm: number, type: U64): Result {
    const request = vmType(type);
    const own = this.own(kvm);
    const machine = this.#probeMachine(own);
    this.command.i32(0, own).u64(1, request.type);
    const fd = this.native.createVm();
    if (fd < 0) return this.refused(fd, createVmRules, machine, request);
    const addressSpaces = Math.max(0, this.ioctlWord(fd, KVM_CHECK_EXTENSION, KVM_CAP.MULTI_ADDRESS_SPACE));
    return this.opened(fd, () => new VmFile(machine, low32(request.type), addressSpaces));
  }

  // ── VM fds

  createGuestMemfd(vm: number, args: { size: U64; flags: U64 }): Result {
    const request = { size: u64('size', args.size), flags: u64('flags', args.flags) };
    const owner = this.files.vm(vm);
    this.command.i32(0, this.own(vm)).u64(1, request.size).u64(2, request.flags);
    const fd = this.native.createGuestMemfd();
    if (fd < 0) return this.refused(fd, createGuestMemfdRules, owner, request);
    // A VM of another thread, of which nothing is known here.
    if (!owner) return this.opened(fd, () => new OpenFile('gmem'));
    return this.opened(fd, () => new GuestMemfdFile(owner, request.size, low32(request.flags)));
  }

  setUserMemoryRegion(vm: number, region: UserMemoryRegion): Result {
    return this.#setRegion(vm, region, 0, -1, true);
  }

  setUserMemoryRegion2(vm: number, region: UserMemoryRegion2): Result {
    return this.#setRegion(vm, region, region.guestMemfdOffset, region.guestMemfd, false);
  }

  setMemoryAttributes(vm: number, args: MemoryAttributesArgs): Result {
    const request = this.#attributes(vm, args);
    const result = this.native.setMemoryAttributes();
    return this.#attributesSet(result, this.files.vm(vm), request);
  }

  async setMemoryAttributesAsync(vm: number, args: MemoryAttributesArgs): Promise<Result> {
    const request = this.#attributes(vm, args);
    const owner = this.files.vm(vm);
    return this.#attributesSet(await this.native.setMemoryAttributesAsync(), owner, request);
  }

  enableCap(fd: number, args: { cap: number; flags: number; args: readonly U64[] }): Result {
    const [a0 = 0, a1 = 0, a2 = 0, a3 = 0] = Array.from(args.args, (value) => u64('args', value));
    const request = { cap: u32('cap', args.cap), flags: u32('flags', args.flags), args: [a0, a1, a2, a3] as const };
    const vm = this.files.vm(fd);
    this.command.i32(0, this.own(fd)).i32(1, request.cap).i32(2, request.flags);
    for (const [index, value] of request.args.entries()) this.command.u64(3 + index, value);
    const result = this.native.enableCap();
    if (result < 0) return this.refused(result, enableCapRules, vm, request);
    if (vm) applyEnableCap(vm, request);
    return result;
  }

  getDirtyLog(vm: number, args: { slot: number; dirtyBitmap: Uint8Array | null }): Result {
    const slot = u32('slot', args.slot);
    const bitmap = args.dirtyBitmap === null ? null : bytes('dirtyBitmap', args.dirtyBitmap);
    const owner = this.files.vm(vm);
    // How long the bitmap must be is unknown, and a log that is not copied is lost.
    if (!owner && this.files.get(vm)?.kind === 'vm') return this.answer(-ERRNO.EIO);
    const request = { addressSpace: slot >>> 16, id: slot & 0xffff };
    const pages = owner?.slot(request.addressSpace, request.id)?.pages ?? Number.POSITIVE_INFINITY;
    this.command.i32(0, this.own(vm)).i32(1, slot);
    // The kernel writes as many bytes as the slot asks for, however long the buffer is.
    const result = this.native.getDirtyLog(bitmap && bitmap.length * 8 >= Math.ceil(pages / 64) * 64 ? bitmap : null);
    return result < 0 ? this.refused(result, getDirtyLogRules, owner, request) : result;
  }

  clearDirtyLog(
    vm: number,
    args: { slot: number; numPages: number; firstPage: U64; dirtyBitmap: Uint8Array | null },
  ): Result {
    const slot = u32('slot', args.slot);
    const request = {
      addressSpace: slot >>> 16,
      id: slot & 0xffff,
      numPages: u32('numPages', args.numPages),
      firstPage: u64('firstPage', args.firstPage),
    };
    const bitmap = args.dirtyBitmap === null ? null : bytes('dirtyBitmap', args.dirtyBitmap);
    this.command.i32(0, this.own(vm)).i32(1, slot).i32(2, request.numPages).u64(3, request.firstPage);
    const result = this.native.clearDirtyLog(bitmap);
    return result < 0 ? this.refused(result, clearDirtyLogRules, this.files.vm(vm), request) : result;
  }

  // ── guest_memfd fds

  setMemoryAttributes2(fd: number, args: MemoryAttributes2Args): Result {
    const request = {
      offset: u64('offset', args.offset),
      size: u64('size', args.size),
      attributes: u64('attributes', args.attributes),
      flags: u64('flags', args.flags),
    };
    const own = this.own(fd);
    const kind = this.files.get(fd)?.kind;
    // The number is new, and what other kinds of files take it for is not known.
    if (kind && kind !== 'gmem') return this.answer(-ERRNO[notGuestMemfd(kind, this.arch === 'aarch64')]);
    this.command.i32(0, own).u64(1, request.offset).u64(2, request.size);
    this.command.u64(3, request.attributes).u64(4, request.flags);
    const result = this.native.setMemoryAttributes2();
    const file = this.files.gmem(fd);
    if (result === -ERRNO.EAGAIN) args.errorOffset = this.command.result(0);
    if (result < 0 || !file) return this.refused(result, conversionRules, file, request);
    file.applyConversion(...conversionPages(file, request), isToPrivate(request));
    return result;
  }

  linkGuestMemfd(vm: number, args: { fd: number; flags: U64 }): Result {
    const request = { flags: u64('flags', args.flags), file: this.files.get(i32('fd', args.fd)) };
    const owner = this.files.vm(vm);
    if (!owner) return this.answer(this.own(vm) < 0 ? -ERRNO.EBADF : -ERRNO.ENOTTY);
    return this.refused(this.arch === 'aarch64' ? -ERRNO.EINVAL : -ERRNO.ENOTTY, linkRules, owner, request);
  }

  // ── files

  open(path: string, flags: number, mode = 0): Result {
    this.command.i32(0, i32('flags', flags)).i32(1, i32('mode', mode));
    return this.opened(this.native.open(text('path', path)), () => new OpenFile(path === '/dev/kvm' ? 'kvm' : 'file'));
  }

  fallocate(fd: number, mode: number, offset: U64, length: U64): Result {
    this.#fallocateCommand(fd, mode, offset, length);
    const result = this.native.fallocate();
    return result < 0 ? this.#fallocateRefused(result, fd, mode, offset, length) : result;
  }

  async fallocateAsync(fd: number, mode: number, offset: U64, length: U64): Promise<Result> {
    this.#fallocateCommand(fd, mode, offset, length);
    const result = await this.native.fallocateAsync();
    return result < 0 ? this.#fallocateRefused(result, fd, mode, offset, length) : result;
  }

  ftruncate(fd: number, length: U64): Result {
    this.command.i32(0, this.own(fd)).u64(1, u64('length', length));
    return this.answer(this.native.ftruncate());
  }

  fstat(fd: number, status: FileStatus): Result {
    this.command.i32(0, this.own(fd));
    const result = this.native.fstat();
    if (result < 0) return this.answer(result);
    const [mode, size, blocks, blksize, ino, nlink] = [0, 1, 2, 3, 4, 5].map((index) => this.command.result(index));
    Object.assign(status, { mode: Number(mode), size, blocks, blksize: Number(blksize), ino, nlink: Number(nlink) });
    return result;
  }

  fstatfs(fd: number, status: { type?: number; bsize?: number }): Result {
    this.command.i32(0, this.own(fd));
    const result = this.native.fstatfs();
    if (result < 0) return this.answer(result);
    status.type = Number(this.command.result(0));
    status.bsize = Number(this.command.result(1));
    return result;
  }

  cachestat(fd: number, offset: U64, length: U64, status: CacheStatus): Result {
    this.command.i32(0, this.own(fd)).u64(1, u64('offset', offset)).u64(2, u64('length', length));
    const result = this.native.cachestat();
    if (result < 0) return this.answer(result);
    const [cache, dirty, writeback, evicted, recentlyEvicted] = [0, 1, 2, 3, 4].map((index) =>
      Number(this.command.result(index)),
    );
    Object.assign(status, { cache, dirty, writeback, evicted, recentlyEvicted });
    return result;
  }

  fsync(fd: number): Result {
    this.command.i32(0, this.own(fd));
    return this.answer(this.native.fsync());
  }

  read(fd: number, target: Uint8Array): Result {
    this.command.i32(0, this.own(fd));
    return this.answer(this.native.read(bytes('target', target)));
  }

  write(fd: number, source: Uint8Array): Result {
    this.command.i32(0, this.own(fd));
    return this.answer(this.native.write(bytes('source', source)));
  }

  pread(fd: number, target: Uint8Array, offset: U64): Result {
    this.command.i32(0, this.own(fd)).u64(1, u64('offset', offset));
    return this.answer(this.native.pread(bytes('target', target)));
  }

  pwrite(fd: number, source: Uint8Array, offset: U64): Result {
    this.command.i32(0, this.own(fd)).u64(1, u64('offset', offset));
    return this.answer(this.native.pwrite(bytes('source', source)));
  }

  lseek(fd: number, offset: U64, whence: number): Result {
    this.command.i32(0, this.own(fd)).u64(1, u64('offset', offset)).i32(2, i32('whence', whence));
    return this.answer(this.native.lseek());
  }

  memfdCreate(name: string, flags: number): Result {
    this.command.i32(0, u32('flags', flags));
    return this.opened(this.native.memfdCreate(text('name', name)), () => new OpenFile('file'));
  }

  memfdSecret(flags: number): Result {
    this.command.i32(0, u32('flags', flags));
    return this.opened(this.native.memfdSecret(), () => new OpenFile('secret'));
  }

  fcntlGetFd(fd: number): Result {
    return this.fcntl(fd, F_GETFD, 0);
  }

  fcntl(fd: number, command: number, argument: number): Result {
    const own = this.own(fd);
    this.command
      .i32(0, own)
      .i32(1, i32('command', command))
      .u64(2, i32('argument', argument) >>> 0);
    return this.answer(own < 0 || FCNTL_COMMANDS.includes(command) ? this.native.fcntl() : -ERRNO.EINVAL);
  }

  poll(fd: number, events: number): Result {
    const own = this.own(fd);
    this.command.i32(0, own).i32(1, i32('events', events));
    return this.answer(own < 0 ? -ERRNO.EBADF : this.native.poll());
  }

  epollCreate1(flags: number): Result {
    this.command.i32(0, i32('flags', flags));
    return this.opened(this.native.epollCreate1(), () => new OpenFile('epoll'));
  }

  epollCtl(epoll: number, operation: number, fd: number, events: number): Result {
    this.command
      .i32(0, this.own(epoll))
      .i32(1, i32('operation', operation))
      .i32(2, this.own(fd))
      .i32(3, i32('events', events));
    return this.answer(this.native.epollCtl());
  }

  dup(fd: number): Result {
    const file = this.files.get(fd);
    this.command.i32(0, this.own(fd));
    const result = this.native.dup();
    return result < 0 || !file ? this.answer(result) : this.opened(result, () => file);
  }

  close(fd: number): Result {
    this.command.i32(0, this.own(fd));
    const result = this.native.close();
    this.files.close(fd);
    return this.answer(result);
  }

  // ── mappings

  mmap(args: { length: U64; prot: number; flags: number; fd: number; offset: U64 }): Result {
    const [flags, prot] = [i32('flags', args.flags), i32('prot', args.prot)];
    const [length, offset] = [u64('length', args.length), u64('offset', args.offset)];
    const own = this.own(args.fd);
    const fd = flags & MAP_ANONYMOUS ? -1 : own;
    this.command.u64(0, length).i32(1, prot).i32(2, flags).i32(3, fd).u64(4, offset);
    if (flags & (MAP_FIXED | MAP_FIXED_NOREPLACE)) return this.answer(-ERRNO.EINVAL);
    const handle = this.native.mmap();
    if (handle < 0) return this.answer(handle);
    const rounded = Math.ceil(Number(length) / this.pageSize) * this.pageSize;
    this.#mappings[handle] = { length: rounded, file: this.files.get(fd)?.hold(), windows: new Map() };
    return handle;
  }

  addressOf(mapping: number): bigint {
    this.command.u64(0, i32('mapping', mapping) >>> 0);
    if (this.native.address() < 0) throw new TypeError(`there is no mapping ${mapping}`);
    return this.command.result(0);
  }

  mprotect(mapping: number, offset: U64, length: U64, prot: number): Result {
    this.#range(mapping, offset, length).i32(3, i32('prot', prot));
    return this.answer(this.native.mprotect());
  }

  madvise(mapping: number, offset: U64, length: U64, advice: number): Result {
    this.#range(mapping, offset, length).i32(3, i32('advice', advice));
    return this.answer(isHarmful(advice) ? -ERRNO.EINVAL : this.native.madvise());
  }

  async madviseAsync(mapping: number, offset: U64, length: U64, advice: number): Promise<Result> {
    this.#range(mapping, offset, length).i32(3, i32('advice', advice));
    return this.answer(isHarmful(advice) ? -ERRNO.EINVAL : await this.native.madviseAsync());
  }

  mlock(mapping: number, offset: U64, length: U64): Result {
    this.#range(mapping, offset, length);
    return this.answer(this.native.mlock());
  }

  mlock2(mapping: number, offset: U64, length: U64, flags: number): Result {
    this.#range(mapping, offset, length).i32(3, u32('flags', flags));
    return this.answer(this.native.mlock2());
  }

  getrlimit(resource: number, limit: { cur?: bigint; max?: bigint }): Result {
    this.command.i32(0, i32('resource', resource));
    const result = this.native.getrlimit();
    if (result < 0) return this.answer(result);
    limit.cur = this.command.result(0);
    limit.max = this.command.result(1);
    return result;
  }

  munlock(mapping: number, offset: U64, length: U64): Result {
    this.#range(mapping, offset, length);
    return this.answer(this.native.munlock());
  }

  msync(mapping: number, offset: U64, length: U64, flags: number): Result {
    this.#range(mapping, offset, length).i32(3, i32('flags', flags));
    return this.answer(this.native.msync());
  }

  mbind(mapping: number, offset: U64, length: U64, policy: number, nodes: readonly number[]): Result {
    const wanted = Array.from(nodes, (node) => i32('nodes', node));
    this.#range(mapping, offset, length).i32(3, i32('policy', policy));
    if (wanted.some((node) => node < 0 || node >= 1024)) return this.answer(-ERRNO.EINVAL);
    const words = Array.from({ length: 16 }, () => 0n);
    for (const node of wanted) words[node >> 6] = (words[node >> 6] as bigint) | (1n << BigInt(node & 63));
    this.command.u64(4, wanted.length ? 1025 : 0);
    for (const [index, word] of words.entries()) this.command.u64(5 + index, word);
    return this.answer(this.native.mbind());
  }

  getMempolicy(mapping: number, offset: U64): Result {
    this.#range(mapping, offset, 0);
    return this.answer(this.native.getMempolicy());
  }

  mincore(mapping: number, offset: U64, length: U64, residency: Uint8Array): Result {
    this.#range(mapping, offset, length);
    return this.answer(this.native.mincore(bytes('residency', residency)));
  }

  userfaultfd(flags: number): Result {
    this.command.i32(0, i32('flags', flags));
    return this.opened(this.native.userfaultfd(), () => new OpenFile('uffd'));
  }

  uffdioApi(uffd: number, features: U64): Result {
    this.command.i32(0, this.own(uffd)).u64(1, u64('features', features));
    return this.answer(this.native.uffdioApi());
  }

  uffdioRegister(uffd: number, mapping: number, offset: U64, length: U64, mode: number): Result {
    this.command
      .i32(0, this.own(uffd))
      .u64(1, i32('mapping', mapping) >>> 0)
      .u64(2, u64('offset', offset));
    this.command.u64(3, u64('length', length)).u64(4, i32('mode', mode) >>> 0);
    return this.answer(this.native.uffdioRegister());
  }

  uffdioUnregister(uffd: number, mapping: number, offset: U64, length: U64): Result {
    this.#uffdRange(uffd, mapping, offset).u64(3, u64('length', length));
    return this.answer(this.native.uffdioUnregister());
  }

  uffdioCopy(uffd: number, mapping: number, offset: U64, source: Uint8Array, mode: number): Result {
    const plain = bytes('source', source);
    this.#uffdRange(uffd, mapping, offset).u64(3, i32('mode', mode) >>> 0);
    return this.answer(this.native.uffdioCopy(plain));
  }

  uffdioZeropage(uffd: number, mapping: number, offset: U64, length: U64, mode: number): Result {
    this.#uffdRange(uffd, mapping, offset)
      .u64(3, u64('length', length))
      .u64(4, i32('mode', mode) >>> 0);
    return this.answer(this.native.uffdioZeropage());
  }

  uffdRead(uffd: number, milliseconds: number, addresses: bigint[]): Result {
    const own = this.files.get(i32('uffd', uffd))?.kind === 'uffd' ? uffd : -1;
    this.command.i32(0, own).i32(1, i32('milliseconds', milliseconds));
    if (own < 0 || milliseconds < 0) return this.answer(own < 0 ? -ERRNO.EBADF : -ERRNO.EINVAL);
    const count = this.native.uffdRead();
    addresses.length = 0;
    for (let index = 0; index < count; index++) addresses.push(this.command.result(index));
    return this.answer(count);
  }

  serveFaults(uffd: number): Result {
    return this.answer(this.own(uffd) < 0 ? -ERRNO.EBADF : -ERRNO.EOPNOTSUPP);
  }

  // ── Unix sockets

  socket(type: number): Result {
    this.command.i32(0, i32('type', type));
    return this.opened(this.native.socket(), () => new OpenFile('socket'));
  }

  bind(fd: number, path: string): Result {
    this.command.i32(0, this.own(fd));
    return this.answer(this.native.bind(text('path', path)));
  }

  listen(fd: number, backlog: number): Result {
    this.command.i32(0, this.own(fd)).i32(1, i32('backlog', backlog));
    return this.answer(this.native.listen());
  }

  accept4(fd: number): Result {
    this.command.i32(0, this.own(fd));
    return this.opened(this.native.accept4(), () => new OpenFile('socket'));
  }

  connect(fd: number, path: string): Result {
    this.command.i32(0, this.own(fd));
    return this.answer(this.native.connect(text('path', path)));
  }

  sendmsg(fd: number, source: Uint8Array, fds: readonly number[]): Result {
    const [plain, given] = [bytes('source', source), Array.from(fds, (each) => this.own(each))];
    if (given.length > MESSAGE_FDS) return this.answer(-ERRNO.EINVAL);
    this.command.i32(0, this.own(fd)).u64(1, given.length);
    for (const [index, each] of given.entries()) this.command.i32(2 + index, each);
    return this.answer(this.native.sendmsg(plain));
  }

  recvmsg(fd: number, target: Uint8Array, fds: number[]): Result {
    const plain = bytes('target', target);
    const own = this.own(fd);
    fds.length = 0;
    this.command.i32(0, own);
    const result = this.native.recvmsg(plain);
    const count = result < 0 ? 0 : Number(this.command.result(0));
    const got = Array.from({ length: count }, (_, index) => Number(this.command.result(1 + index)));
    fds.push(...got.map((each) => this.files.put(each, new OpenFile('file'))));
    return this.answer(result);
  }

  unlink(path: string): Result {
    try {
      if (!fs.lstatSync(text('path', path)).isSocket()) return this.answer(-ERRNO.EPERM);
      fs.unlinkSync(path);
      return 0;
    } catch (error) {
      if (error instanceof TypeError) throw error;
      return this.answer(-(ERRNO[(error as NodeJS.ErrnoException).code as ErrnoName] ?? ERRNO.EIO));
    }
  }

  peek(mapping: number, offset: U64, target: Uint8Array): Result {
    this.command.u64(0, i32('mapping', mapping) >>> 0).u64(1, u64('offset', offset));
    return this.answer(this.native.peek(bytes('target', target)));
  }

  poke(mapping: number, offset: U64, source: Uint8Array): Result {
    this.command.u64(0, i32('mapping', mapping) >>> 0).u64(1, u64('offset', offset));
    return this.answer(this.native.poke(bytes('source', source)));
  }

  window(mapping: number, offset: number, length: number, own = false): Uint8Array {
    const found = this.#mappings[i32('mapping', mapping)];
    const inside = found && Number.isSafeInteger(offset) && Number.isSafeInteger(length) && offset >= 0 && length >= 0;
    if (!inside || offset + length > found.length)
      throw new TypeError(`mapping ${mapping} has no bytes ${shown(offset)}, +${shown(length)}`);
    if (own) return new Uint8Array(this.#createWindow(mapping, offset, length));
    const span = Math.floor(offset / WINDOW_STEP) * WINDOW_STEP;
    const spanned = offset + length <= span + WINDOW_MAX;
    const start = spanned ? span : offset;
    let buffer = found.windows.get(start)?.deref();
    if (!buffer || buffer.byteLength < offset - start + length) {
      buffer = this.#createWindow(mapping, start, spanned ? Math.min(WINDOW_MAX, found.length - start) : length);
      found.windows.set(start, new WeakRef(buffer));
    }
    return new Uint8Array(buffer, offset - start, length);
  }

  releaseWindow(view: Uint8Array): void {
    this.native.detach(bytes('view', view).buffer as ArrayBuffer);
  }

  releaseWindows(mapping: number): Result {
    const handle = i32('mapping', mapping);
    this.#mappings[handle]?.windows.clear();
    this.command.u64(0, handle >>> 0);
    return this.answer(this.native.detachAll());
  }

  munmap(mapping: number): Result {
    const handle = i32('mapping', mapping);
    this.command.u64(0, handle >>> 0);
    const result = this.native.munmap();
    if (result < 0) return this.answer(result);
    this.#mappings[handle]?.file?.drop();
    this.#mappings[handle] = undefined;
    return result;
  }

  // ── threads

  shareFile(fd: number): Result {
    this.command.i32(0, this.own(fd));
    return this.answer(this.native.shareFile());
  }

  takeFile(share: number, kind: 'kvm' | 'vm' | 'gmem' | 'uffd'): Result {
    this.command.u64(0, u64('share', share));
    return this.opened(this.native.takeFile(), () => new OpenFile(kind));
  }

  isShared(share: number): boolean {
    this.command.u64(0, u64('share', share));
    return this.native.isShared() === 1;
  }

  shareMapping(mapping: number): Result {
    this.command.u64(0, i32('mapping', mapping) >>> 0);
    return this.answer(this.native.shareMapping());
  }

  takeMapping(share: number): Result {
    this.command.u64(0, u64('share', share));
    const handle = this.native.takeMapping();
    if (handle < 0) return this.answer(handle);
    this.#mappings[handle] = { length: Number(this.command.result(0)), file: undefined, windows: new Map() };
    return handle;
  }

  // ── what the calls share

  #uffdRange(uffd: number, mapping: number, offset: U64): Command {
    return this.command
      .i32(0, this.own(uffd))
      .u64(1, i32('mapping', mapping) >>> 0)
      .u64(2, u64('offset', offset));
  }

  #range(mapping: number, offset: U64, length: U64): Command {
    return this.command
      .u64(0, i32('mapping', mapping) >>> 0)
      .u64(1, u64('offset', offset))
      .u64(2, u64('length', length));
  }

  #setRegion(vm: number, region: UserMemoryRegion, guestMemfdOffset: U64, guestMemfd: number, v1: boolean): Result {
    const request = regionRequest(region, guestMemfdOffset, guestMemfd, v1, (fd) => this.files.get(fd));
    const owner = this.files.vm(vm);
    // The slots of a VM that came from elsewhere are unknown, so nobody could tell which request is dangerous.
    if (!owner && this.files.get(vm)?.kind === 'vm') return this.answer(-ERRNO.EIO);
    if (owner && isDangerous(owner, request)) {
      const violation = check(memslotRules, owner, request);
      this.refusal = violation?.sentence ?? null;
      return -(violation?.errno ?? ERRNO.EINVAL);
    }
    this.command
      .i32(0, this.own(vm))
      .i32(1, (request.addressSpace << 16) | request.id)
      .i32(2, request.flags);
    this.command.u64(3, request.guestPhysAddr).u64(4, request.memorySize).u64(5, request.userspaceAddr);
    if (!v1) this.command.u64(6, request.guestMemfdOffset).i32(7, request.file ? request.guestMemfd : -1);
    const result = v1 ? this.native.setUserMemoryRegion() : this.native.setUserMemoryRegion2();
    if (result < 0 || !owner) return this.refused(result, memslotRules, owner, request);
    if (!isSameRegion(owner, request)) owner.applyRegion(request);
    return result;
  }

  #attributes(vm: number, { address, size, attributes, flags }: MemoryAttributesArgs) {
    const request = {
      address: u64('address', address),
      size: u64('size', size),
      attributes: u64('attributes', attributes),
      flags: u64('flags', flags),
    };
    this.command
      .i32(0, this.own(vm))
      .u64(1, request.address)
      .u64(2, request.size)
      .u64(3, request.attributes)
      .u64(4, request.flags);
    return request;
  }

  #attributesSet(
    result: Result,
    owner: VmFile | undefined,
    request: { address: U64; size: U64; attributes: U64; flags: U64 },
  ): Result {
    if (result < 0 || !owner) return this.refused(result, memoryAttributesRules, owner, request);
    owner.applyAttributes(request.address, request.size, request.attributes);
    return result;
  }

  #fallocateCommand(fd: number, mode: number, offset: U64, length: U64): void {
    this.command
      .i32(0, this.own(fd))
      .i32(1, i32('mode', mode))
      .u64(2, u64('offset', offset))
      .u64(3, u64('length', length));
  }

  #fallocateRefused(result: Result, fd: number, mode: number, offset: U64, length: U64): Result {
    const request = { mode, offset: u64('offset', offset), length: u64('length', length) };
    return this.refused(result, fallocateRules, this.files.gmem(fd), request);
  }

  #createWindow(mapping: number, offset: number, length: number): ArrayBuffer {
    this.command.u64(0, mapping).u64(1, offset).u64(2, length);
    const buffer = this.native.window();
    if (typeof buffer !== 'number') return buffer;
    throw new KvmError({
      code: 'UNSUPPORTED',
      message:
        'this JavaScript runtime cannot show memory of the process in an ArrayBuffer (or not that much of it); copy instead',
    });
  }

  #createsProtected(kvm: number): boolean {
    this.command.i32(0, kvm).u64(1, KVM_VM_TYPE_ARM_PROTECTED);
    const vm = this.native.createVm();
    if (vm < 0) return false;
    this.command.i32(0, vm);
    this.native.close();
    return true;
  }

  /** What the rules need to know of the running kernel, asked of it. */
  #probeMachine(kvm: number): Machine {
    const ask = (capability: number): boolean => this.ioctlWord(kvm, KVM_CHECK_EXTENSION, capability) > 0;
    if (this.#machine) return this.#machine;
    const machine = new Machine({
      arch: this.arch,
      release: this.release,
      pageSize: this.pageSize,
      swProtected: ask(KVM_CAP.MEMORY_ATTRIBUTES),
      tdp: ask(KVM_CAP.PRE_FAULT_MEMORY),
      pkvm: this.arch === 'aarch64' && this.#createsProtected(kvm),
      smm: ask(KVM_CAP.MULTI_ADDRESS_SPACE),
    });
    // What an fd that is not /dev/kvm answers is not to be remembered.
    if (this.files.get(kvm)?.kind === 'kvm') this.#machine = machine;
    return machine;
  }
}

let running: LinuxKernel | undefined;

/**
 * The running kernel, the same object on every call of a thread.
 *
 * @throws KvmError `UNSUPPORTED` where the addon cannot be loaded, saying what was tried
 */
export function linuxKernel(): LinuxKernel {
  try {
    running ??= new LinuxKernel(loadAddon());
  } catch (error) {
    if (!(error instanceof AddonUnavailable)) throw error;
    throw new KvmError({ code: 'UNSUPPORTED', message: error.message, cause: error });
  }
  return running;
}
