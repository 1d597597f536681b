/** Numbers of the Linux ABI, the same on x86-64 and arm64. Contract: the uapi headers of Linux 7.3, in the kernel's names. */

export const KVM_API_VERSION = 12;

// ── ioctl requests
export const KVM_GET_API_VERSION = 0xae00;
export const KVM_CREATE_VM = 0xae01;
export const KVM_CHECK_EXTENSION = 0xae03;
export const KVM_GET_VCPU_MMAP_SIZE = 0xae04;
export const KVM_CREATE_VCPU = 0xae41;
export const KVM_GET_STATS_FD = 0xaece;
export const KVM_GET_DIRTY_LOG = 0x4010ae42;
export const KVM_SET_USER_MEMORY_REGION = 0x4020ae46;
export const KVM_SET_USER_MEMORY_REGION2 = 0x40a0ae49;
export const KVM_ENABLE_CAP = 0x4068aea3;
export const KVM_CLEAR_DIRTY_LOG = 0xc018aec0;
export const KVM_SET_MEMORY_ATTRIBUTES = 0x4020aed2;
export const KVM_CREATE_GUEST_MEMFD = 0xc040aed4;
export const KVM_CREATE_IRQCHIP = 0xae60;
export const KVM_IRQ_LINE = 0x4008ae61;
export const KVM_IRQFD = 0x4020ae76;
export const KVM_IOEVENTFD = 0x4040ae79;
export const KVM_RUN = 0xae80;

export const KVM_IRQFD_FLAG_RESAMPLE = 2;

// ── memslots, guest_memfd, attributes
export const KVM_MEM_LOG_DIRTY_PAGES = 1;
export const KVM_MEM_READONLY = 2;
export const KVM_MEM_GUEST_MEMFD = 4;
export const GUEST_MEMFD_FLAG_MMAP = 1;
export const GUEST_MEMFD_FLAG_INIT_SHARED = 2;
export const KVM_MEMORY_ATTRIBUTE_PRIVATE = 8;
export const KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE = 1;
export const KVM_DIRTY_LOG_INITIALLY_SET = 2;
export const KVM_HC_MAP_GPA_RANGE = 12;

// ── VM types
export const KVM_X86_DEFAULT_VM = 0;
export const KVM_X86_SW_PROTECTED_VM = 1;
export const KVM_X86_SEV_VM = 2;
export const KVM_X86_SEV_ES_VM = 3;
export const KVM_X86_SNP_VM = 4;
export const KVM_X86_TDX_VM = 5;
export const KVM_VM_TYPE_ARM_PROTECTED = 0x80000000;

/** KVM_CAP_* by name. */
export const KVM_CAP = {
  USER_MEMORY: 3,
  NR_MEMSLOTS: 10,
  SYNC_MMU: 16,
  READONLY_MEM: 81,
  CHECK_EXTENSION_VM: 105,
  MULTI_ADDRESS_SPACE: 118,
  ARM_VM_IPA_SIZE: 165,
  MANUAL_DIRTY_LOG_PROTECT2: 168,
  DIRTY_LOG_RING: 192,
  EXIT_HYPERCALL: 201,
  DIRTY_LOG_RING_ACQ_REL: 223,
  DIRTY_LOG_RING_WITH_BITMAP: 225,
  USER_MEMORY2: 231,
  MEMORY_FAULT_INFO: 232,
  MEMORY_ATTRIBUTES: 233,
  GUEST_MEMFD: 234,
  VM_TYPES: 235,
  PRE_FAULT_MEMORY: 236,
  GUEST_MEMFD_FLAGS: 244,
} as const;
export type CapabilityName = keyof typeof KVM_CAP;

// ── files
export const O_RDONLY = 0;
export const O_WRONLY = 1;
export const O_RDWR = 2;
export const O_CREAT = 0o100;
export const O_CLOEXEC = 0o2000000;
export const O_NONBLOCK = 0o4000;
export const EFD_SEMAPHORE = 1;
export const O_PATH = 0o10000000;
export const FIONCLEX = 0x5450;
export const FIOCLEX = 0x5451;
export const F_GETFD = 1;
export const F_SETFD = 2;
export const F_GETFL = 3;
export const F_ADD_SEALS = 1033;
export const F_GET_SEALS = 1034;
export const F_SEAL_WRITE = 8;
export const FD_CLOEXEC = 1;
export const MFD_CLOEXEC = 1;
export const MFD_ALLOW_SEALING = 2;
export const MFD_HUGETLB = 4;
/** log2 of the huge page size goes into the flags of memfd_create and mmap from this bit on. */
export const HUGE_SHIFT = 26;
export const HUGETLBFS_MAGIC = 0x958458f6;
export const TMPFS_MAGIC = 0x01021994;
export const SEEK_SET = 0;
export const SEEK_CUR = 1;
export const SEEK_END = 2;
export const SEEK_DATA = 3;
export const SEEK_HOLE = 4;
export const FALLOC_FL_KEEP_SIZE = 0x01;
export const FALLOC_FL_PUNCH_HOLE = 0x02;
export const FALLOC_FL_COLLAPSE_RANGE = 0x08;
export const FALLOC_FL_ZERO_RANGE = 0x10;
export const FALLOC_FL_INSERT_RANGE = 0x20;
export const FALLOC_FL_UNSHARE_RANGE = 0x40;
export const FALLOC_FL_WRITE_ZEROES = 0x80;
export const SOCK_DGRAM = 2;
export const SOCK_SEQPACKET = 5;
export const POLLIN = 1;
export const POLLOUT = 4;
export const EPOLL_CTL_ADD = 1;
export const EFD_CLOEXEC = 0o2000000;
export const EFD_NONBLOCK = 0o4000;

// ── mappings
export const PROT_NONE = 0;
export const PROT_READ = 1;
export const PROT_WRITE = 2;
export const PROT_EXEC = 4;
export const PROT_SEM = 8;
export const MAP_SHARED = 0x01;
export const MAP_PRIVATE = 0x02;
export const MAP_SHARED_VALIDATE = 0x03;
export const MAP_TYPE = 0x0f;
export const MAP_FIXED = 0x10;
export const MAP_ANONYMOUS = 0x20;
export const MAP_GROWSDOWN = 0x0100;
export const MAP_NORESERVE = 0x4000;
export const MAP_POPULATE = 0x8000;
export const MAP_HUGETLB = 0x40000;
export const MAP_SYNC = 0x80000;
export const MAP_FIXED_NOREPLACE = 0x100000;
export const MADV_NORMAL = 0;
export const MADV_WILLNEED = 3;
export const MADV_DONTNEED = 4;
export const MADV_FREE = 8;
export const MADV_REMOVE = 9;
export const MADV_DONTFORK = 10;
export const MADV_MERGEABLE = 12;
export const MADV_HUGEPAGE = 14;
export const MADV_WIPEONFORK = 18;
export const MADV_COLD = 20;
export const MADV_PAGEOUT = 21;
export const MADV_POPULATE_READ = 22;
export const MADV_POPULATE_WRITE = 23;
export const MADV_DONTNEED_LOCKED = 24;
export const MADV_COLLAPSE = 25;
export const MADV_HWPOISON = 100;
export const MADV_SOFT_OFFLINE = 101;
export const MADV_GUARD_INSTALL = 102;
export const MADV_GUARD_REMOVE = 103;
export const MLOCK_ONFAULT = 1;
export const RLIMIT_MEMLOCK = 8;
export const MS_ASYNC = 1;
export const MS_INVALIDATE = 2;
export const MS_SYNC = 4;
export const MPOL_DEFAULT = 0;
export const MPOL_PREFERRED = 1;
export const MPOL_BIND = 2;
export const MPOL_INTERLEAVE = 3;
export const MPOL_LOCAL = 4;
export const MPOL_PREFERRED_MANY = 5;
export const MPOL_WEIGHTED_INTERLEAVE = 6;
export const UFFDIO_REGISTER_MODE_MISSING = 1;
export const UFFDIO_REGISTER_MODE_WP = 2;
export const UFFDIO_REGISTER_MODE_MINOR = 4;
export const UFFD_FEATURE_MISSING_SHMEM = 1 << 5;
export const UFFD_FEATURE_WP_ASYNC = 1 << 15;

/** Linux error numbers by name: not those of the host, which may be macOS or Windows. */
export const ERRNO = {
  EPERM: 1,
  ENOENT: 2,
  EINTR: 4,
  EIO: 5,
  ENXIO: 6,
  E2BIG: 7,
  ENOEXEC: 8,
  EBADF: 9,
  EAGAIN: 11,
  ENOMEM: 12,
  EACCES: 13,
  EFAULT: 14,
  EBUSY: 16,
  EEXIST: 17,
  EXDEV: 18,
  ENODEV: 19,
  ENOTDIR: 20,
  EISDIR: 21,
  EINVAL: 22,
  ENFILE: 23,
  EMFILE: 24,
  ENOTTY: 25,
  ETXTBSY: 26,
  EFBIG: 27,
  ENOSPC: 28,
  ESPIPE: 29,
  EROFS: 30,
  EPIPE: 32,
  ENAMETOOLONG: 36,
  ENOSYS: 38,
  ELOOP: 40,
  ETIME: 62,
  EOVERFLOW: 75,
  ENOTSOCK: 88,
  EMSGSIZE: 90,
  EPROTOTYPE: 91,
  EPROTONOSUPPORT: 93,
  EOPNOTSUPP: 95,
  EADDRINUSE: 98,
  ECONNRESET: 104,
  EISCONN: 106,
  ENOTCONN: 107,
  ECONNREFUSED: 111,
  EHWPOISON: 133,
} as const;
export type ErrnoName = keyof typeof ERRNO;

const names = new Map<number, string>(Object.entries(ERRNO).map(([name, number]) => [number, name]));

/** 'EINVAL' for 22 or -22; 'E133' style for a number without a name here. */
export function errnoName(errno: number): string {
  return names.get(Math.abs(errno)) ?? `E${Math.abs(errno)}`;
}

export const KiB = 1024;
export const MiB = 1024 * KiB;
export const GiB = 1024 * MiB;
export const TiB = 1024 * GiB;

/** KVM_EXIT_* by name: what kvm_run.exit_reason says. */
export const KVM_EXIT = {
  UNKNOWN: 0,
  IO: 2,
  HYPERCALL: 3,
  HLT: 5,
  MMIO: 6,
  SHUTDOWN: 8,
  INTR: 10,
  INTERNAL_ERROR: 17,
  SYSTEM_EVENT: 24,
  DIRTY_RING_FULL: 31,
  MEMORY_FAULT: 39,
} as const;

export const KVM_GET_REGS = 0x8090ae81;
export const KVM_SET_REGS = 0x4090ae82;
export const KVM_GET_SREGS = 0x8138ae83;
export const KVM_SET_SREGS = 0x4138ae84;
/** struct kvm_regs: 64 bits each, in this order. */
export const KVM_REGS = [
  'rax',
  'rbx',
  'rcx',
  'rdx',
  'rsi',
  'rdi',
  'rsp',
  'rbp',
  'r8',
  'r9',
  'r10',
  'r11',
  'r12',
  'r13',
  'r14',
  'r15',
  'rip',
  'rflags',
] as const;
