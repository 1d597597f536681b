// Calls on a VM file descriptor.

#include <sys/ioctl.h>

#include "calls.h"
#include "job.h"
#include "syscall.h"
#include "uapi.h"

namespace {

// KVM_SET_USER_MEMORY_REGION. command: [vm, slot, flags, guest_phys_addr, memory_size, userspace_addr]
int64_t SetUserMemoryRegion(const Command& command) {
  uapi::UserspaceMemoryRegion region = {command.u32(1), command.u32(2), command.u64(3), command.u64(4), command.u64(5)};
  return Syscall(SYS_ioctl, command.i32(0), uapi::kSetUserMemoryRegion, &region);
}

// KVM_SET_USER_MEMORY_REGION2. command: [vm, slot, flags, guest_phys_addr, memory_size, userspace_addr,
// guest_memfd_offset, guest_memfd]
int64_t SetUserMemoryRegion2(const Command& command) {
  uapi::UserspaceMemoryRegion2 region = {};
  region.slot = command.u32(1);
  region.flags = command.u32(2);
  region.guest_phys_addr = command.u64(3);
  region.memory_size = command.u64(4);
  region.userspace_addr = command.u64(5);
  region.guest_memfd_offset = command.u64(6);
  region.guest_memfd = command.u32(7);
  return Syscall(SYS_ioctl, command.i32(0), uapi::kSetUserMemoryRegion2, &region);
}

// KVM_SET_MEMORY_ATTRIBUTES. command: [vm, address, size, attributes, flags]
int64_t SetMemoryAttributes(const Command& command) {
  uapi::MemoryAttributes args = {command.u64(1), command.u64(2), command.u64(3), command.u64(4)};
  return Syscall(SYS_ioctl, command.i32(0), uapi::kSetMemoryAttributes, &args);
}

// The same on a thread of its own: it cannot be interrupted and takes its time by the page.
napi_value SetMemoryAttributesAsync(Environment& environment) {
  return StartOnFile(environment, environment.command().i32(0), 1, [](const Job& job) {
    uapi::MemoryAttributes args = {job.words[0], job.words[1], job.words[2], job.words[3]};
    return Syscall(SYS_ioctl, job.fd, uapi::kSetMemoryAttributes, &args);
  });
}

// KVM_ENABLE_CAP. command: [fd, cap, flags, args[0], args[1], args[2], args[3]]
int64_t EnableCap(const Command& command) {
  uapi::EnableCap args = {command.u32(1), command.u32(2), {}, {}};
  for (size_t index = 0; index < 4; index++) args.args[index] = command.u64(3 + index);
  return Syscall(SYS_ioctl, command.i32(0), uapi::kEnableCap, &args);
}

// KVM_GET_DIRTY_LOG. command: [vm, slot]. The kernel takes the bitmap's length from the slot: the caller answers for
// it.
int64_t GetDirtyLog(const Command& command, OptionalBytes bitmap) {
  uapi::DirtyLog args = {command.u32(1), 0, reinterpret_cast<uintptr_t>(bitmap.data)};
  return Syscall(SYS_ioctl, command.i32(0), uapi::kGetDirtyLog, &args);
}

// KVM_CLEAR_DIRTY_LOG. command: [vm, slot, num_pages, first_page]. A bitmap that is too short is passed on as NULL.
int64_t ClearDirtyLog(const Command& command, OptionalBytes bitmap) {
  const uint64_t needed = (uint64_t{command.u32(2)} + 63) / 64 * 8;
  uapi::ClearDirtyLog args = {command.u32(1), command.u32(2), command.u64(3),
                              bitmap.size < needed ? 0 : reinterpret_cast<uintptr_t>(bitmap.data)};
  return Syscall(SYS_ioctl, command.i32(0), uapi::kClearDirtyLog, &args);
}

constexpr Function kTable[] = {
    {"setUserMemoryRegion", Invoke<SetUserMemoryRegion>},
    {"setUserMemoryRegion2", Invoke<SetUserMemoryRegion2>},
    {"setMemoryAttributes", Invoke<SetMemoryAttributes>},
    {"setMemoryAttributesAsync", Invoke<SetMemoryAttributesAsync>},
    {"enableCap", Invoke<EnableCap>},
    {"getDirtyLog", Invoke<GetDirtyLog>},
    {"clearDirtyLog", Invoke<ClearDirtyLog>},
};

}  // namespace

const Functions kVm = kTable;
