// Calls on /dev/kvm, and those that any fd takes by number.

#include <fcntl.h>
#include <sys/ioctl.h>

#include "calls.h"
#include "uapi.h"

// ioctl(2). command: [fd, request, argument]
int64_t Ioctl(const Command& command) { return ReturnErrno(ioctl(command.i32(0), command.u32(1), command.u64(2))); }

// open(2). command: [flags, mode]
int64_t Open(Environment& environment, const char* path) {
  const Command& command = environment.command();
  return environment.Own(ReturnErrno(open(path, command.i32(0), command.u32(1))));
}

// KVM_CREATE_VM. command: [kvm, type]
int64_t CreateVm(Environment& environment) {
  const Command& command = environment.command();
  return environment.Own(ReturnErrno(ioctl(command.i32(0), uapi::kCreateVm, command.u64(1))));
}
