// Calls on a mapping. A mapping is a handle of its environment; a range that leaves it is -ENOMEM, as for an address
// where nothing is mapped.

#include <poll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>

#include "calls.h"
#include "copy.h"
#include "job.h"
#include "syscall.h"
#include "uapi.h"

namespace {

// Calls `call(address, length)` for the range in the command's first words: [mapping, offset, length].
template <typename Call>
int64_t OnRange(Environment& environment, Call call) {
  const Command& command = environment.command();
  const uint64_t length = command.u64(2);
  uint8_t* address = environment.Range(command.u64(0), command.u64(1), length);
  return address == nullptr ? -ENOMEM : call(address, length);
}

size_t HugePageSize(int fd) {
  struct statfs status;
  if (fstatfs(fd, &status) < 0 || static_cast<int64_t>(status.f_type) != uapi::kHugetlbfs) return 0;
  return static_cast<size_t>(status.f_bsize);
}

// The page size the kernel rounds a mapping's length to; munmap of huge pages insists on it.
size_t PageSizeOf(int flags, int fd) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  if ((flags & MAP_ANONYMOUS) == 0) return std::max(page, HugePageSize(fd));
  if ((flags & MAP_HUGETLB) == 0) return page;
  const uint32_t shift = static_cast<uint32_t>(flags) >> uapi::kHugeShift & uapi::kHugeMask;
  if (shift != 0) return size_t{1} << shift;
  const int probe = static_cast<int>(Syscall(uapi::kSysMemfdCreate, "", MFD_HUGETLB | MFD_CLOEXEC));
  if (probe < 0) return page;
  const size_t huge = HugePageSize(probe);
  close(probe);
  return std::max(page, huge);
}

// The part of `bytes` that lies in the mapping from `offset` on; null if none does.
uint8_t* Clip(Environment& environment, Bytes* bytes) {
  const Command& command = environment.command();
  const Mapping* mapping = environment.FindMapping(command.u64(0));
  const uint64_t offset = command.u64(1);
  if (mapping == nullptr || offset > mapping->length || (offset == mapping->length && bytes->size > 0)) return nullptr;
  bytes->size = std::min(bytes->size, static_cast<size_t>(mapping->length - offset));
  return mapping->address + offset;
}

// mmap(2); the result is a handle. command: [length, prot, flags, fd, offset]. There is no word for an address, so
// MAP_FIXED would mean address 0 and everything above it: EINVAL.
int64_t Mmap(Environment& environment) {
  const Command& command = environment.command();
  const size_t length = command.u64(0);
  const int flags = command.i32(2);
  const int fd = command.i32(3);
  if ((flags & MAP_FIXED) != 0) return -EINVAL;
  void* address = mmap(nullptr, length, command.i32(1), flags, fd, command.i64(4));
  if (address == MAP_FAILED) return -errno;
  const size_t page = PageSizeOf(flags, fd);
  return environment.AddMapping(new Memory{static_cast<uint8_t*>(address), (length + page - 1) / page * page});
}

// command: [mapping]; then words: [address]
int64_t Address(Environment& environment) {
  const Command& command = environment.command();
  const Mapping* mapping = environment.FindMapping(command.u64(0));
  if (mapping == nullptr) return -ENOMEM;
  command.Set(0, reinterpret_cast<uintptr_t>(mapping->address));
  return 0;
}

// mprotect(2). command: [mapping, offset, length, prot]
int64_t Mprotect(Environment& environment) {
  const int prot = environment.command().i32(3);
  return OnRange(environment,
                 [=](void* address, uint64_t length) { return Syscall(SYS_mprotect, address, length, prot); });
}

// madvise(2). command: [mapping, offset, length, advice]
int64_t Madvise(Environment& environment) {
  const int advice = environment.command().i32(3);
  return OnRange(environment,
                 [=](void* address, uint64_t length) { return Syscall(SYS_madvise, address, length, advice); });
}

// The same on a thread of its own.
napi_value MadviseAsync(Environment& environment) {
  return StartOnRange(environment, [](const Job& job) {
    return Syscall(SYS_madvise, job.words[0], job.words[1], static_cast<int>(job.words[2]));
  });
}

// mlock(2). command: [mapping, offset, length]
int64_t Mlock(Environment& environment) {
  return OnRange(environment, [](void* address, uint64_t length) { return Syscall(SYS_mlock, address, length); });
}

// mlock2(2). command: [mapping, offset, length, flags]
int64_t Mlock2(Environment& environment) {
  const uint32_t flags = environment.command().u32(3);
  return OnRange(environment,
                 [=](void* address, uint64_t length) { return Syscall(uapi::kSysMlock2, address, length, flags); });
}

// munlock(2). command: [mapping, offset, length]
int64_t Munlock(Environment& environment) {
  return OnRange(environment, [](void* address, uint64_t length) { return Syscall(SYS_munlock, address, length); });
}

// msync(2). command: [mapping, offset, length, flags]
int64_t Msync(Environment& environment) {
  const int flags = environment.command().i32(3);
  return OnRange(environment,
                 [=](void* address, uint64_t length) { return Syscall(SYS_msync, address, length, flags); });
}

// mbind(2) without flags. command: [mapping, offset, length, policy, maxnode, mask…]; the mask is NULL when maxnode is
// 0.
int64_t Mbind(Environment& environment) {
  constexpr size_t kFirst = 5;
  constexpr size_t kBits = (Command::kWords - kFirst) * 64;
  const Command& command = environment.command();
  const int policy = command.i32(3);
  const uint64_t maxnode = command.u64(4);
  if (maxnode > kBits) return -EINVAL;
  uint64_t mask[Command::kWords - kFirst];
  for (size_t index = 0; index < Command::kWords - kFirst; index++) mask[index] = command.u64(kFirst + index);
  return OnRange(environment, [&](void* address, uint64_t length) {
    return Syscall(uapi::kSysMbind, address, length, policy, maxnode == 0 ? nullptr : mask, maxnode, 0);
  });
}

// get_mempolicy(2) with MPOL_F_ADDR; the result is the policy. command: [mapping, offset]
int64_t GetMempolicy(Environment& environment) {
  const Command& command = environment.command();
  uint8_t* address = environment.Range(command.u64(0), command.u64(1), 1);
  if (address == nullptr) return -ENOMEM;
  int policy = 0;
  const int64_t result = Syscall(uapi::kSysGetMempolicy, &policy, nullptr, 0, address, uapi::kPolicyOfAddress);
  return result < 0 ? result : policy;
}

// mincore(2). command: [mapping, offset, length]. A residency array that is too short is passed on as NULL.
int64_t Mincore(Environment& environment, Bytes residency) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return OnRange(environment, [=](void* address, uint64_t length) {
    return Syscall(SYS_mincore, address, length,
                   residency.size < (length + page - 1) / page ? nullptr : residency.data);
  });
}

// userfaultfd(2). command: [flags]
int64_t Userfaultfd(Environment& environment) {
  return environment.Own(Syscall(uapi::kSysUserfaultfd, environment.command().i32(0)));
}

// UFFDIO_API. command: [uffd, features]
int64_t UffdioApi(const Command& command) {
  uapi::UffdioApi args = {uapi::kUffdApiVersion, command.u64(1), 0};
  return Syscall(SYS_ioctl, command.i32(0), uapi::kUffdioApi, &args);
}

// UFFDIO_REGISTER. command: [uffd, mapping, offset, length, mode]
int64_t UffdioRegister(Environment& environment) {
  const Command& command = environment.command();
  uint8_t* address = environment.Range(command.u64(1), command.u64(2), command.u64(3));
  if (address == nullptr) return -ENOMEM;
  uapi::UffdioRegister args = {reinterpret_cast<uintptr_t>(address), command.u64(3), command.u64(4), 0};
  return Syscall(SYS_ioctl, command.i32(0), uapi::kUffdioRegister, &args);
}

// UFFDIO_UNREGISTER, which wakes who waits. command: [uffd, mapping, offset, length]
int64_t UffdioUnregister(Environment& environment) {
  const Command& command = environment.command();
  uint8_t* address = environment.Range(command.u64(1), command.u64(2), command.u64(3));
  if (address == nullptr) return -ENOMEM;
  uapi::UffdioRange args = {reinterpret_cast<uintptr_t>(address), command.u64(3)};
  return Syscall(SYS_ioctl, command.i32(0), uapi::kUffdioUnregister, &args);
}

// UFFDIO_COPY; bytes copied, possibly short. command: [uffd, mapping, offset, mode]
int64_t UffdioCopy(Environment& environment, Bytes source) {
  const Command& command = environment.command();
  uint8_t* address = environment.Range(command.u64(1), command.u64(2), source.size);
  if (address == nullptr) return -ENOMEM;
  uapi::UffdioCopy args = {reinterpret_cast<uintptr_t>(address), reinterpret_cast<uintptr_t>(source.data), source.size,
                           command.u64(3), 0};
  const int64_t result = Syscall(SYS_ioctl, command.i32(0), uapi::kUffdioCopy, &args);
  return result < 0 && args.copy <= 0 ? result : args.copy;
}

// UFFDIO_ZEROPAGE; bytes made, possibly short. command: [uffd, mapping, offset, length, mode]
int64_t UffdioZeropage(Environment& environment) {
  const Command& command = environment.command();
  const uint64_t length = command.u64(3);
  uint8_t* address = environment.Range(command.u64(1), command.u64(2), length);
  if (address == nullptr) return -ENOMEM;
  uapi::UffdioZeropage args = {{reinterpret_cast<uintptr_t>(address), length}, command.u64(4), 0};
  const int64_t result = Syscall(SYS_ioctl, command.i32(0), uapi::kUffdioZeropage, &args);
  return result < 0 && args.zeropage <= 0 ? result : args.zeropage;
}

// poll(2) of a userfaultfd for so many milliseconds, and read(2): the page faults that came. command: [uffd,
// milliseconds]; then words: [address…]
int64_t UffdRead(Environment& environment) {
  constexpr size_t kMessages = 32;
  const Command& command = environment.command();
  const int fd = command.i32(0);
  pollfd entry = {fd, POLLIN, 0};
  const int ready = poll(&entry, 1, command.i32(1));
  if (ready < 0) return errno == EINTR ? 0 : -errno;
  if (ready == 0) return 0;
  // One that would wait for a message in read(2) says POLLERR.
  if ((entry.revents & POLLIN) == 0) return -EINVAL;
  uapi::UffdMessage messages[kMessages];
  const int64_t got = Syscall(SYS_read, fd, messages, sizeof messages);
  // What woke us may have been served, or woken, since.
  if (got < 0) return got == -EAGAIN ? 0 : got;
  int64_t count = 0;
  for (size_t index = 0; index < static_cast<size_t>(got) / sizeof(uapi::UffdMessage); index++) {
    if (messages[index].event == uapi::kUffdEventPagefault) {
      command.Set(static_cast<size_t>(count++), messages[index].address);
    }
  }
  return count;
}

// A guarded copy out of a mapping, up to its end; bytes copied, or EFAULT. command: [mapping, offset]
int64_t Peek(Environment& environment, Bytes target) {
  const uint8_t* source = Clip(environment, &target);
  return source == nullptr ? -EFAULT : GuardedCopy(environment, target.data, source, target.size);
}

// A guarded copy into a mapping, up to its end; bytes copied, or EFAULT. command: [mapping, offset]
int64_t Poke(Environment& environment, Bytes source) {
  uint8_t* target = Clip(environment, &source);
  return target == nullptr ? -EFAULT : GuardedCopy(environment, target, source.data, source.size);
}

// Bytes of a mapping as an ArrayBuffer, or -errno: EOPNOTSUPP where this Node has no external buffers, EFBIG beyond its
// longest buffer. command: [mapping, offset, length]
napi_value CreateWindow(Environment& environment) {
  const Command& command = environment.command();
  const uint64_t length = command.u64(2);
  uint8_t* data = environment.Range(command.u64(0), command.u64(1), length);
  napi_value buffer = nullptr;
  const int64_t result = data == nullptr ? -ENOMEM
                                         : environment.CreateWindow(environment.FindMapping(command.u64(0)), data,
                                                                    static_cast<size_t>(length), &buffer);
  if (result < 0) napi_create_int64(environment.env(), result, &buffer);
  return buffer;
}

// Detaches one window. Any other ArrayBuffer: EINVAL.
int64_t DetachWindow(Environment& environment, napi_value buffer) { return environment.DetachWindow(buffer); }

// Detaches every window of a mapping. command: [mapping]
int64_t DetachAll(Environment& environment) { return environment.DetachWindows(environment.command().u64(0)); }

// munmap(2); detaches the windows first. command: [mapping]
int64_t Munmap(Environment& environment) { return environment.RemoveMapping(environment.command().u64(0)); }

constexpr Function kTable[] = {
    {"mmap", Invoke<Mmap>},
    {"address", Invoke<Address>},
    {"mprotect", Invoke<Mprotect>},
    {"madvise", Invoke<Madvise>},
    {"madviseAsync", Invoke<MadviseAsync>},
    {"mlock", Invoke<Mlock>},
    {"mlock2", Invoke<Mlock2>},
    {"munlock", Invoke<Munlock>},
    {"msync", Invoke<Msync>},
    {"mbind", Invoke<Mbind>},
    {"getMempolicy", Invoke<GetMempolicy>},
    {"mincore", Invoke<Mincore>},
    {"userfaultfd", Invoke<Userfaultfd>},
    {"uffdioApi", Invoke<UffdioApi>},
    {"uffdioRegister", Invoke<UffdioRegister>},
    {"uffdioUnregister", Invoke<UffdioUnregister>},
    {"uffdioCopy", Invoke<UffdioCopy>},
    {"uffdioZeropage", Invoke<UffdioZeropage>},
    {"uffdRead", Invoke<UffdRead>},
    {"peek", Invoke<Peek>},
    {"poke", Invoke<Poke>},
    {"window", Invoke<CreateWindow>},
    {"detach", Invoke<DetachWindow>},
    {"detachAll", Invoke<DetachAll>},
    {"munmap", Invoke<Munmap>},
};

}  // namespace

const Functions kMapping = kTable;
