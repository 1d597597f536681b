// The Linux ABI the addon needs, in our own definitions: distributions ship older headers than the kernels they run on.

#pragma once

#include <sys/syscall.h>

#include <cstddef>
#include <cstdint>

namespace uapi {

// _IO, _IOW, _IOR and _IOWR of asm-generic/ioctl.h, which x86-64 and arm64 share.
enum : uint32_t { kNone = 0, kWrite = 1, kRead = 2 };
template <typename Argument>
constexpr uint32_t Request(uint32_t direction, uint32_t type, uint32_t number) {
  return direction << 30 | static_cast<uint32_t>(sizeof(Argument)) << 16 | type << 8 | number;
}
constexpr size_t ArgumentSize(uint32_t request) { return request >> 16 & ((1u << 14) - 1); }
constexpr uint32_t kKvm = 0xae;
constexpr uint32_t kUserfaultfd = 0xaa;

struct UserspaceMemoryRegion {
  uint32_t slot;
  uint32_t flags;
  uint64_t guest_phys_addr;
  uint64_t memory_size;
  uint64_t userspace_addr;
};
static_assert(sizeof(UserspaceMemoryRegion) == 32);
static_assert(offsetof(UserspaceMemoryRegion, slot) == 0 && offsetof(UserspaceMemoryRegion, flags) == 4);
static_assert(offsetof(UserspaceMemoryRegion, guest_phys_addr) == 8);
static_assert(offsetof(UserspaceMemoryRegion, memory_size) == 16);
static_assert(offsetof(UserspaceMemoryRegion, userspace_addr) == 24);

struct UserspaceMemoryRegion2 {
  uint32_t slot;
  uint32_t flags;
  uint64_t guest_phys_addr;
  uint64_t memory_size;
  uint64_t userspace_addr;
  uint64_t guest_memfd_offset;
  uint32_t guest_memfd;
  uint32_t pad1;
  uint64_t pad2[14];
};
static_assert(sizeof(UserspaceMemoryRegion2) == 160);
static_assert(offsetof(UserspaceMemoryRegion2, slot) == 0 && offsetof(UserspaceMemoryRegion2, flags) == 4);
static_assert(offsetof(UserspaceMemoryRegion2, guest_phys_addr) == 8);
static_assert(offsetof(UserspaceMemoryRegion2, memory_size) == 16);
static_assert(offsetof(UserspaceMemoryRegion2, userspace_addr) == 24);
static_assert(offsetof(UserspaceMemoryRegion2, guest_memfd_offset) == 32);
static_assert(offsetof(UserspaceMemoryRegion2, guest_memfd) == 40);
static_assert(offsetof(UserspaceMemoryRegion2, pad1) == 44 && offsetof(UserspaceMemoryRegion2, pad2) == 48);

struct CreateGuestMemfd {
  uint64_t size;
  uint64_t flags;
  uint64_t reserved[6];
};
static_assert(sizeof(CreateGuestMemfd) == 64);
static_assert(offsetof(CreateGuestMemfd, size) == 0 && offsetof(CreateGuestMemfd, flags) == 8);
static_assert(offsetof(CreateGuestMemfd, reserved) == 16);

struct MemoryAttributes {
  uint64_t address;
  uint64_t size;
  uint64_t attributes;
  uint64_t flags;
};
static_assert(sizeof(MemoryAttributes) == 32);
static_assert(offsetof(MemoryAttributes, address) == 0 && offsetof(MemoryAttributes, size) == 8);
static_assert(offsetof(MemoryAttributes, attributes) == 16 && offsetof(MemoryAttributes, flags) == 24);

struct MemoryAttributes2 {
  uint64_t offset;
  uint64_t size;
  uint64_t attributes;
  uint64_t flags;
  uint64_t error_offset;
  uint64_t reserved[11];
};
static_assert(sizeof(MemoryAttributes2) == 128);
static_assert(offsetof(MemoryAttributes2, offset) == 0 && offsetof(MemoryAttributes2, size) == 8);
static_assert(offsetof(MemoryAttributes2, attributes) == 16 && offsetof(MemoryAttributes2, flags) == 24);
static_assert(offsetof(MemoryAttributes2, error_offset) == 32 && offsetof(MemoryAttributes2, reserved) == 40);

struct DirtyLog {
  uint32_t slot;
  uint32_t padding1;
  uint64_t dirty_bitmap;
};
static_assert(sizeof(DirtyLog) == 16);
static_assert(offsetof(DirtyLog, slot) == 0 && offsetof(DirtyLog, padding1) == 4);
static_assert(offsetof(DirtyLog, dirty_bitmap) == 8);

struct ClearDirtyLog {
  uint32_t slot;
  uint32_t num_pages;
  uint64_t first_page;
  uint64_t dirty_bitmap;
};
static_assert(sizeof(ClearDirtyLog) == 24);
static_assert(offsetof(ClearDirtyLog, slot) == 0 && offsetof(ClearDirtyLog, num_pages) == 4);
static_assert(offsetof(ClearDirtyLog, first_page) == 8 && offsetof(ClearDirtyLog, dirty_bitmap) == 16);

struct EnableCap {
  uint32_t cap;
  uint32_t flags;
  uint64_t args[4];
  uint8_t pad[64];
};
static_assert(sizeof(EnableCap) == 104);
static_assert(offsetof(EnableCap, cap) == 0 && offsetof(EnableCap, flags) == 4);
static_assert(offsetof(EnableCap, args) == 8 && offsetof(EnableCap, pad) == 40);

struct PreFaultMemory {
  uint64_t gpa;
  uint64_t size;
  uint64_t flags;
  uint64_t padding[5];
};
static_assert(sizeof(PreFaultMemory) == 64);
static_assert(offsetof(PreFaultMemory, size) == 8 && offsetof(PreFaultMemory, flags) == 16);

struct OneReg {
  uint64_t id;
  uint64_t addr;
};
static_assert(sizeof(OneReg) == 16 && offsetof(OneReg, addr) == 8);

struct CreateDevice {
  uint32_t type;
  uint32_t fd;
  uint32_t flags;
};
static_assert(sizeof(CreateDevice) == 12);
static_assert(offsetof(CreateDevice, fd) == 4 && offsetof(CreateDevice, flags) == 8);

struct DeviceAttr {
  uint32_t flags;
  uint32_t group;
  uint64_t attr;
  uint64_t addr;
};
static_assert(sizeof(DeviceAttr) == 24);
static_assert(offsetof(DeviceAttr, group) == 4 && offsetof(DeviceAttr, attr) == 8 && offsetof(DeviceAttr, addr) == 16);

// Bits of a register's id: log2 of its size in bytes.
constexpr uint32_t kRegisterSizeShift = 52;
constexpr uint32_t kRegisterSizeMask = 15;

constexpr int kCapNrMemslots = 10;
constexpr int kCapMultiAddressSpace = 118;

constexpr uint32_t kCreateVm = kKvm << 8 | 0x01;
constexpr uint32_t kCheckExtension = kKvm << 8 | 0x03;
constexpr uint32_t kGetVcpuMmapSize = kKvm << 8 | 0x04;
constexpr uint32_t kCreateVcpu = kKvm << 8 | 0x41;
constexpr uint32_t kRun = kKvm << 8 | 0x80;
constexpr uint32_t kGetStatsFd = kKvm << 8 | 0xce;
constexpr uint32_t kSetUserMemoryRegion = Request<UserspaceMemoryRegion>(kWrite, kKvm, 0x46);
constexpr uint32_t kSetUserMemoryRegion2 = Request<UserspaceMemoryRegion2>(kWrite, kKvm, 0x49);
constexpr uint32_t kGetDirtyLog = Request<DirtyLog>(kWrite, kKvm, 0x42);
constexpr uint32_t kClearDirtyLog = Request<ClearDirtyLog>(kWrite | kRead, kKvm, 0xc0);
constexpr uint32_t kEnableCap = Request<EnableCap>(kWrite, kKvm, 0xa3);
constexpr uint32_t kSetMemoryAttributes = Request<MemoryAttributes>(kWrite, kKvm, 0xd2);
constexpr uint32_t kSetMemoryAttributes2 = Request<MemoryAttributes2>(kWrite | kRead, kKvm, 0xd2);
constexpr uint32_t kCreateGuestMemfd = Request<CreateGuestMemfd>(kWrite | kRead, kKvm, 0xd4);
constexpr uint32_t kPreFaultMemory = Request<PreFaultMemory>(kWrite | kRead, kKvm, 0xd5);
constexpr uint32_t kGetOneReg = Request<OneReg>(kWrite, kKvm, 0xab);
constexpr uint32_t kSetOneReg = Request<OneReg>(kWrite, kKvm, 0xac);
constexpr uint32_t kCreateDevice = Request<CreateDevice>(kWrite | kRead, kKvm, 0xe0);
constexpr uint32_t kSetDeviceAttr = Request<DeviceAttr>(kWrite, kKvm, 0xe1);
constexpr uint32_t kGetDeviceAttr = Request<DeviceAttr>(kWrite, kKvm, 0xe2);
constexpr uint32_t kHasDeviceAttr = Request<DeviceAttr>(kWrite, kKvm, 0xe3);
static_assert(kCreateVm == 0xae01);
static_assert(kCheckExtension == 0xae03 && kGetVcpuMmapSize == 0xae04 && kCreateVcpu == 0xae41 && kRun == 0xae80);
static_assert(kGetStatsFd == 0xaece);
static_assert(kPreFaultMemory == 0xc040aed5);
static_assert(kGetOneReg == 0x4010aeab && kSetOneReg == 0x4010aeac);
static_assert(kCreateDevice == 0xc00caee0);
static_assert(kSetDeviceAttr == 0x4018aee1 && kGetDeviceAttr == 0x4018aee2 && kHasDeviceAttr == 0x4018aee3);
static_assert(kSetUserMemoryRegion == 0x4020ae46);
static_assert(kSetUserMemoryRegion2 == 0x40a0ae49);
static_assert(kGetDirtyLog == 0x4010ae42);
static_assert(kClearDirtyLog == 0xc018aec0);
static_assert(kEnableCap == 0x4068aea3);
static_assert(kSetMemoryAttributes == 0x4020aed2);
static_assert(kSetMemoryAttributes2 == 0xc080aed2);
static_assert(kCreateGuestMemfd == 0xc040aed4);

struct UffdioApi {
  uint64_t api;
  uint64_t features;
  uint64_t ioctls;
};
static_assert(sizeof(UffdioApi) == 24);
static_assert(offsetof(UffdioApi, features) == 8 && offsetof(UffdioApi, ioctls) == 16);

struct UffdioRegister {
  uint64_t start;
  uint64_t len;
  uint64_t mode;
  uint64_t ioctls;
};
static_assert(sizeof(UffdioRegister) == 32);
static_assert(offsetof(UffdioRegister, len) == 8 && offsetof(UffdioRegister, mode) == 16);

struct UffdioRange {
  uint64_t start;
  uint64_t len;
};
static_assert(sizeof(UffdioRange) == 16 && offsetof(UffdioRange, len) == 8);

struct UffdioCopy {
  uint64_t dst;
  uint64_t src;
  uint64_t len;
  uint64_t mode;
  int64_t copy;
};
static_assert(sizeof(UffdioCopy) == 40);
static_assert(offsetof(UffdioCopy, len) == 16 && offsetof(UffdioCopy, copy) == 32);

struct UffdioZeropage {
  UffdioRange range;
  uint64_t mode;
  int64_t zeropage;
};
static_assert(sizeof(UffdioZeropage) == 32 && offsetof(UffdioZeropage, zeropage) == 24);

// struct uffd_msg of a page fault.
struct UffdMessage {
  uint8_t event;
  uint8_t reserved[7];
  uint64_t flags;
  uint64_t address;
  uint64_t ptid;
};
static_assert(sizeof(UffdMessage) == 32);
static_assert(offsetof(UffdMessage, flags) == 8 && offsetof(UffdMessage, address) == 16);

constexpr uint8_t kUffdEventPagefault = 0x12;
constexpr uint64_t kUffdApiVersion = 0xaa;
constexpr uint32_t kUffdioApi = Request<UffdioApi>(kWrite | kRead, kUserfaultfd, 0x3f);
constexpr uint32_t kUffdioRegister = Request<UffdioRegister>(kWrite | kRead, kUserfaultfd, 0x00);
constexpr uint32_t kUffdioUnregister = Request<UffdioRange>(kRead, kUserfaultfd, 0x01);
constexpr uint32_t kUffdioCopy = Request<UffdioCopy>(kWrite | kRead, kUserfaultfd, 0x03);
constexpr uint32_t kUffdioZeropage = Request<UffdioZeropage>(kWrite | kRead, kUserfaultfd, 0x04);
static_assert(kUffdioApi == 0xc018aa3f);
static_assert(kUffdioRegister == 0xc020aa00);
static_assert(kUffdioUnregister == 0x8010aa01);
static_assert(kUffdioCopy == 0xc028aa03);
static_assert(kUffdioZeropage == 0xc020aa04);

struct CachestatRange {
  uint64_t off;
  uint64_t len;
};
struct Cachestat {
  uint64_t nr_cache;
  uint64_t nr_dirty;
  uint64_t nr_writeback;
  uint64_t nr_evicted;
  uint64_t nr_recently_evicted;
};
static_assert(sizeof(CachestatRange) == 16 && sizeof(Cachestat) == 40);

// MPOL_F_ADDR of get_mempolicy(2).
constexpr unsigned long kPolicyOfAddress = 1 << 1;

// HUGETLBFS_MAGIC and MAP_HUGE_SHIFT.
constexpr int64_t kHugetlbfs = 0x958458f6;
constexpr int kHugeShift = 26;
constexpr uint32_t kHugeMask = 0x3f;

// System calls by number: cachestat is newer than the headers, the others have no wrapper in the oldest glibc we load
// on.
constexpr long kSysCachestat = 451;
constexpr long kSysMemfdSecret = 447;
#if defined(__x86_64__)
constexpr long kSysMbind = 237;
constexpr long kSysGetMempolicy = 239;
constexpr long kSysMemfdCreate = 319;
constexpr long kSysUserfaultfd = 323;
constexpr long kSysMlock2 = 325;
constexpr long kSysPrlimit64 = 302;
#elif defined(__aarch64__)
constexpr long kSysMbind = 235;
constexpr long kSysGetMempolicy = 236;
constexpr long kSysMemfdCreate = 279;
constexpr long kSysUserfaultfd = 282;
constexpr long kSysMlock2 = 284;
constexpr long kSysPrlimit64 = 261;
#else
#error "guest_memfd exists on x86-64 and arm64"
#endif
static_assert(kSysMbind == SYS_mbind && kSysGetMempolicy == SYS_get_mempolicy);
static_assert(kSysMlock2 == SYS_mlock2 && kSysPrlimit64 == SYS_prlimit64);
static_assert(kSysMemfdCreate == SYS_memfd_create && kSysUserfaultfd == SYS_userfaultfd);

}  // namespace uapi
