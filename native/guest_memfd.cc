// The creation of guest_memfd files; what is done with them afterwards are the calls of file.cc and mapping.cc.

#include <fcntl.h>
#include <sys/ioctl.h>

#include "calls.h"
#include "syscall.h"
#include "uapi.h"

namespace {

// KVM_CREATE_GUEST_MEMFD. command: [vm, size, flags]
int64_t CreateGuestMemfd(Environment& environment) {
  const Command& command = environment.command();
  uapi::CreateGuestMemfd args = {command.u64(1), command.u64(2), {}};
  const int64_t fd = environment.Own(Syscall(SYS_ioctl, command.i32(0), uapi::kCreateGuestMemfd, &args));
  // KVM has no flag for it, unlike for every other fd it makes.
  if (fd >= 0) fcntl(static_cast<int>(fd), F_SETFD, FD_CLOEXEC);
  return fd;
}

// KVM_SET_MEMORY_ATTRIBUTES2, as proposed. command: [gmem, offset, size, attributes, flags] → [error_offset]
int64_t SetMemoryAttributes2(const Command& command) {
  uapi::MemoryAttributes2 args = {command.u64(1), command.u64(2), command.u64(3), command.u64(4), 0, {}};
  const int64_t result = Syscall(SYS_ioctl, command.i32(0), uapi::kSetMemoryAttributes2, &args);
  command.Set(0, args.error_offset);
  return result;
}

constexpr Function kTable[] = {
    {"createGuestMemfd", Invoke<CreateGuestMemfd>},
    {"setMemoryAttributes2", Invoke<SetMemoryAttributes2>},
};

}  // namespace

const Functions kGuestMemfd = kTable;
