import type { Arch } from '../model_options.ts';
import type { ReadonlyRangeMap } from '../ranges.ts';

/**
 * An unsigned 64-bit value: safe integers as number, the whole range as bigint. A negative integer stands for its two's
 * complement, as in C, so an offset of -1 can be sent to a call that reads it as signed.
 */
export type U64 = number | bigint;
/** ≥ 0, or -errno. */
export type Result = number;

/** struct kvm_userspace_memory_region. */
export interface UserMemoryRegion {
  slot: number;
  flags: number;
  guestPhysAddr: U64;
  memorySize: U64;
  userspaceAddr: U64;
}

/** struct kvm_userspace_memory_region2. */
export interface UserMemoryRegion2 extends UserMemoryRegion {
  guestMemfdOffset: U64;
  guestMemfd: number;
}

/** struct kvm_memory_attributes. */
export interface MemoryAttributesArgs {
  address: U64;
  size: U64;
  attributes: U64;
  flags: U64;
}

/** struct kvm_memory_attributes2, without what is reserved. */
export interface MemoryAttributes2Args {
  /** Bytes of the file. */
  offset: U64;
  size: U64;
  attributes: U64;
  flags: U64;
  /** Set when the call is refused because of a page that is in use: where it is in the file. */
  errorOffset?: bigint;
}

/** What fstat(2) fills in. */
export interface FileStatus {
  mode?: number;
  size?: bigint;
  blocks?: bigint;
  blksize?: number;
  ino?: bigint;
  nlink?: number;
}

/** What cachestat(2) fills in: pages of the file in the page cache. */
export interface CacheStatus {
  cache?: number;
  dirty?: number;
  writeback?: number;
  evicted?: number;
  recentlyEvicted?: number;
}

/** struct kvm_device_attr, without the address of the value. */
export interface DeviceAttr {
  flags: number;
  group: number;
  attr: U64;
}

/**
 * The boundary: one method per system call, the same for the running Linux kernel and for the software kernel.
 *
 * Every method returns the call's result, ≥ 0, or `-errno`. Nothing throws, except a `TypeError` for an argument that could
 * not be a system call's argument at all (a string for a size, NaN, a fraction, more than 64 bits).
 *
 * File descriptors are those this kernel opened: any other number is `-EBADF`, so a wrong one can never close or write to a
 * file of the rest of the process. Mappings are handles; a range that leaves its mapping is `-ENOMEM` (`-EFAULT` for
 * copies), as for an address where nothing is mapped.
 *
 * Four requests never reach a kernel and are refused alike by every backend: setting or dropping GUEST_MEMFD on an existing slot
 * (a use-after-free before Linux 6.19), binding beyond 2^63 (accepted by mistake before 7.2), MAP_FIXED (would replace
 * memory of the process), and MADV_HWPOISON / MADV_SOFT_OFFLINE (would poison memory of the machine): all `-EINVAL`.
 */
export interface Kernel {
  readonly name: 'linux' | 'software';
  readonly arch: Arch;
  /** `uname -r`, or the version the model plays. */
  readonly release: string;
  readonly pageSize: number;

  /** Why the most recent call of this kernel that was refused was refused: the rule it broke, in a sentence; null where no rule is known. */
  explain(): string | null;
  /**
   * The private ranges of a VM in units of pages (gfn), as set through this kernel: Linux has no getter. Live and read-only; undefined
   * when `vm` is not a VM fd.
   */
  privateGfns(vm: number): ReadonlyRangeMap<true> | undefined;
  /**
   * The pages of a guest_memfd that are the guest's alone: as it was created, and as converted through this kernel. Live and read-only;
   * undefined when `fd` is not a guest_memfd that this kernel created.
   */
  privatePages(fd: number): ReadonlyRangeMap<true> | undefined;

  // ── any fd
  /**
   * ioctl(2) with a request by number. An argument ≥ 4096 is accepted only for KVM requests that pass it by value, because any other
   * would be taken for an address: EFAULT. KVM_RUN is EINVAL: a run has a deadline.
   */
  ioctl(fd: number, request: number, argument: U64): Result;

  // ── /dev/kvm
  /** open(2) of /dev/kvm, or of `path`, with O_RDWR | O_CLOEXEC. */
  openKvm(path?: string): Result;
  getApiVersion(kvm: number): Result;
  getVcpuMmapSize(kvm: number): Result;
  /** On a /dev/kvm or a VM fd. */
  checkExtension(fd: number, capability: number): Result;
  createVm(kvm: number, type: U64): Result;

  // ── VM fds
  /** The new fd has FD_CLOEXEC set, which KVM itself does not do. */
  createGuestMemfd(vm: number, args: { size: U64; flags: U64 }): Result;
  setUserMemoryRegion(vm: number, region: UserMemoryRegion): Result;
  setUserMemoryRegion2(vm: number, region: UserMemoryRegion2): Result;
  setMemoryAttributes(vm: number, args: MemoryAttributesArgs): Result;
  /** The same call on a thread of its own: it is uninterruptible and costs by the page. The VM stays open until it ends. */
  setMemoryAttributesAsync(vm: number, args: MemoryAttributesArgs): Promise<Result>;
  enableCap(fd: number, args: { cap: number; flags: number; args: readonly U64[] }): Result;
  /** A bitmap shorter than the slot needs is passed on as NULL: EFAULT, after the kernel's other checks. */
  getDirtyLog(vm: number, args: { slot: number; dirtyBitmap: Uint8Array | null }): Result;
  clearDirtyLog(
    vm: number,
    args: { slot: number; numPages: number; firstPage: U64; dirtyBitmap: Uint8Array | null },
  ): Result;

  createVcpu(vm: number, id: number): Result;
  /** How many vCPUs of the VM run now, on whatever thread of this process. */
  runningVcpus(vm: number): Result;
  /** KVM_CREATE_IRQCHIP (x86). */
  createIrqchip(vm: number): Result;
  /** KVM_IRQ_LINE: `irq` and `level` of struct kvm_irq_level. */
  irqLine(vm: number, irq: number, level: number): Result;

  // ── guest_memfd fds
  /**
   * KVM_SET_MEMORY_ATTRIBUTES2, which is proposed and in no released kernel: ENOTTY there. Converts pages in place. To private: `-EAGAIN` with
   * `errorOffset` while one of them is mapped, pinned or in use otherwise, and nothing has changed. Never sent to a file of another kind.
   */
  setMemoryAttributes2(fd: number, args: MemoryAttributes2Args): Result;

  /**
   * KVM_LINK_GUEST_MEMFD, which is proposed and in no released kernel: a new fd for the pages of another VM's guest_memfd, as a file of this VM.
   * Never sent to a running kernel, which may mean something else by its number: ENOTTY, on arm64 EINVAL.
   */
  linkGuestMemfd(vm: number, args: { fd: number; flags: U64 }): Result;

  // ── vCPU fds: for run, runAsync and runPage the very fd that createVcpu returned; a duplicate of it is EBADF
  /**
   * KVM_RUN on this thread. 0 when the guest exits; `-EINTR` when kicked, or when `deadline` milliseconds have passed, never earlier. The
   * deadline is required: on some hosts some guest instructions never leave KVM_RUN by themselves. A deadline of 0 completes the exit that is
   * answered and enters no guest. One run of a vCPU at a time: EBUSY; also for other requests while runAsync runs it.
   */
  run(vcpu: number, deadline: number): Result;
  /** Whether it was the deadline that ended the latest run with `-EINTR`, and not a kick. */
  deadlinePassed(vcpu: number): boolean;
  /** The same on a thread that the kernel keeps for this vCPU. close of the fd ends it: `-EINTR`. */
  runAsync(vcpu: number, deadline: number): Promise<Result>;
  /**
   * Makes a run of the vCPU, on whatever thread, the one in progress or else the next one, end with `-EINTR`. Kicks before one end count as
   * one. The fd may be of another worker.
   */
  kick(vcpu: number): Result;
  /** KVM_PRE_FAULT_MEMORY; gpa and size are updated as the kernel updates them. */
  preFaultMemory(vcpu: number, args: { gpa: bigint; size: bigint; flags: U64 }): Result;
  /**
   * The kvm_run page and what is mapped behind it, live; detached by close of the vCPU fd. What it says of an exit holds as Linux has it: an
   * exit reason from before may stand there after `-EINTR`.
   */
  runPage(vcpu: number): Uint8Array;
  /** KVM_GET_ONE_REG. `id` says the register's size, 1 to 2048 bytes; `value` is that long, or it is EFAULT. */
  getOneReg(vcpu: number, id: U64, value: Uint8Array): Result;
  setOneReg(vcpu: number, id: U64, value: Uint8Array): Result;

  // ── any KVM fd
  /**
   * An ioctl that reads or writes one struct of plain data: KVM_GET_REGS, KVM_SET_SREGS, KVM_SET_CPUID2, KVM_IRQFD … `data` is the struct, as
   * long as the request number says (longer for the ones that end in an array, up to 1 MiB). Too short is EFAULT. So is any request whose
   * struct holds pointers, or that is not known to hold none. An eventfd in a struct must be one that `eventfd` opened: EBADF.
   */
  ioctlStruct(fd: number, request: number, data: Uint8Array): Result;

  /** KVM_GET_STATS_FD, on a VM or a vCPU fd, Linux 5.14: a file that pread(2) reads statistics from. */
  getStatsFd(fd: number): Result;

  // ── devices in the kernel, and what they signal
  /** KVM_CREATE_DEVICE: its fd; 0 with KVM_CREATE_DEVICE_TEST. */
  createDevice(vm: number, type: number, flags: number): Result;
  /** KVM_GET_DEVICE_ATTR, on a device, VM or vCPU fd. A value shorter than the attribute is EFAULT. */
  getDeviceAttr(fd: number, attr: DeviceAttr, value: Uint8Array): Result;
  setDeviceAttr(fd: number, attr: DeviceAttr, value: Uint8Array): Result;
  hasDeviceAttr(fd: number, attr: DeviceAttr): Result;
  /** eventfd2(2), close-on-exec. */
  eventfd(initial: number, flags: number): Result;

  // ── files
  open(path: string, flags: number, mode?: number): Result;
  fallocate(fd: number, mode: number, offset: U64, length: U64): Result;
  /** The same call on a thread of its own; the file stays open until it ends. */
  fallocateAsync(fd: number, mode: number, offset: U64, length: U64): Promise<Result>;
  ftruncate(fd: number, length: U64): Result;
  fstat(fd: number, status: FileStatus): Result;
  fstatfs(fd: number, status: { type?: number; bsize?: number }): Result;
  /** cachestat(2), Linux 6.5: how much of the file's range is in memory, without mapping it. Length 0 means to the end. */
  cachestat(fd: number, offset: U64, length: U64, status: CacheStatus): Result;
  fsync(fd: number): Result;
  read(fd: number, target: Uint8Array): Result;
  write(fd: number, source: Uint8Array): Result;
  pread(fd: number, target: Uint8Array, offset: U64): Result;
  pwrite(fd: number, source: Uint8Array, offset: U64): Result;
  lseek(fd: number, offset: U64, whence: number): Result;
  memfdCreate(name: string, flags: number): Result;
  /** memfd_secret(2), Linux 5.14: a file whose pages are in nobody's page tables but those of processes that map it. */
  memfdSecret(flags: number): Result;
  fcntlGetFd(fd: number): Result;
  /** fcntl(2) with F_GETFD, F_SETFD, F_GETFL, F_ADD_SEALS or F_GET_SEALS; any other command is EINVAL. */
  fcntl(fd: number, command: number, argument: number): Result;
  /** poll(2) on one fd without waiting: the returned events. */
  poll(fd: number, events: number): Result;
  epollCreate1(flags: number): Result;
  epollCtl(epoll: number, operation: number, fd: number, events: number): Result;
  /** F_DUPFD_CLOEXEC. */
  dup(fd: number): Result;
  close(fd: number): Result;

  // ── Unix sockets: calls do not wait, so what would is EAGAIN. On the software kernel they connect the kernels of one thread
  /** socket(2) of AF_UNIX: SOCK_STREAM, SOCK_DGRAM or SOCK_SEQPACKET; close-on-exec. */
  socket(type: number): Result;
  /** bind(2). A leading @ is the abstract namespace. */
  bind(fd: number, path: string): Result;
  listen(fd: number, backlog: number): Result;
  accept4(fd: number): Result;
  connect(fd: number, path: string): Result;
  /** sendmsg(2), with SCM_RIGHTS for at most 32 fds. Bytes sent. */
  sendmsg(fd: number, source: Uint8Array, fds: readonly number[]): Result;
  /** recvmsg(2): the bytes of a message, and its fds, close-on-exec. 0 when the other side is gone; EMSGSIZE, and lost, when it does not fit. */
  recvmsg(fd: number, target: Uint8Array, fds: number[]): Result;
  /** unlink(2) of a bound socket's name; of any other file EPERM. */
  unlink(path: string): Result;

  // ── mappings: a mapping is a handle; the address is there for struct fields, the window for speed
  /** A handle ≥ 0. fd -1 with MAP_ANONYMOUS. */
  mmap(args: { length: U64; prot: number; flags: number; fd: number; offset: U64 }): Result;
  addressOf(mapping: number): bigint;
  mprotect(mapping: number, offset: U64, length: U64, prot: number): Result;
  madvise(mapping: number, offset: U64, length: U64, advice: number): Result;
  /** The same call on a thread of its own; the mapping stays until it ends. */
  madviseAsync(mapping: number, offset: U64, length: U64, advice: number): Promise<Result>;
  mlock(mapping: number, offset: U64, length: U64): Result;
  /** With MLOCK_ONFAULT (1) pages stay from their first touch on, and are not touched now. Linux 4.4. */
  mlock2(mapping: number, offset: U64, length: U64, flags: number): Result;
  munlock(mapping: number, offset: U64, length: U64): Result;
  /** getrlimit(2) of this process: soft and hard, 2^64-1 for none. */
  getrlimit(resource: number, limit: { cur?: bigint; max?: bigint }): Result;
  msync(mapping: number, offset: U64, length: U64, flags: number): Result;
  mbind(mapping: number, offset: U64, length: U64, policy: number, nodes: readonly number[]): Result;
  /** get_mempolicy(2) with MPOL_F_ADDR: the policy of the page at `offset`. */
  getMempolicy(mapping: number, offset: U64): Result;
  /** One byte per page, bit 0 = resident. A residency array shorter than the range is EFAULT. */
  mincore(mapping: number, offset: U64, length: U64, residency: Uint8Array): Result;
  userfaultfd(flags: number): Result;
  /** UFFDIO_API with these features. */
  uffdioApi(uffd: number, features: U64): Result;
  /** UFFDIO_REGISTER of a range of a mapping. */
  uffdioRegister(uffd: number, mapping: number, offset: U64, length: U64, mode: number): Result;
  /** UFFDIO_UNREGISTER: who waits for a page of the range wakes, and finds what the mapping has. */
  uffdioUnregister(uffd: number, mapping: number, offset: U64, length: U64): Result;
  /** UFFDIO_COPY: makes pages of these bytes and wakes who waits for them. Bytes copied, possibly short; EEXIST for a page that is there. */
  uffdioCopy(uffd: number, mapping: number, offset: U64, source: Uint8Array, mode: number): Result;
  /** UFFDIO_ZEROPAGE: the same with pages of zeros. */
  uffdioZeropage(uffd: number, mapping: number, offset: U64, length: U64, mode: number): Result;
  /** poll(2), for so many milliseconds, and read(2): where threads wait for missing pages, at most 32 addresses. How many; 0 when none came. */
  uffdRead(uffd: number, milliseconds: number, addresses: bigint[]): Result;
  /**
   * What runs when an access has to wait for a missing page, on a kernel that lives on one thread: `serve` reads the userfaultfd and makes
   * the page, or the access is EFAULT. EOPNOTSUPP on Linux, where another thread does that.
   */
  serveFaults(uffd: number, serve: (() => void) | null): Result;
  /** Copy out, guarded: -EFAULT where a touch would be SIGBUS or SIGSEGV. Bytes copied, possibly short. */
  peek(mapping: number, offset: U64, target: Uint8Array): Result;
  /** Copy in, guarded. */
  poke(mapping: number, offset: U64, source: Uint8Array): Result;
  /**
   * A live view of the mapping's bytes, detached by munmap; at most 4 GiB. The caller answers for what it touches. Views of one mapping
   * share their ArrayBuffer, unless `own` asks for one that `releaseWindow` can detach by itself. On the software kernel windows of the same
   * memory always share it, since plain JavaScript cannot have one memory in two buffers: one that goes takes the others along.
   */
  window(mapping: number, offset: number, length: number, own?: boolean): Uint8Array;
  /** Detaches a view made with `own`. */
  releaseWindow(view: Uint8Array): void;
  /** Detaches every view of the mapping that this thread has. */
  releaseWindows(mapping: number): Result;
  munmap(mapping: number): Result;

  // ── threads: each has its own fds and mappings, also where the process has them all. A share is a number that cannot be guessed, ends
  // when its fd or mapping is closed, and is EOPNOTSUPP on the software kernel, which lives on one thread.
  /** The number by which another thread takes an fd. Closing a VM that others took removes its memslots and stops their vCPUs. */
  shareFile(fd: number): Result;
  /** An fd of this thread for the same file; ENOENT for a number that nobody shares. The memslots of a VM cannot be changed through it. */
  takeFile(share: number, kind: 'kvm' | 'vm' | 'gmem' | 'uffd'): Result;
  /** Whether it can still be taken. */
  isShared(share: number): boolean;
  shareMapping(mapping: number): Result;
  /** A mapping of this thread for the same memory, which stays until both are unmapped. */
  takeMapping(share: number): Result;
}
