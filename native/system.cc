// Calls on /dev/kvm, and those that any fd takes by number.

#include <fcntl.h>
#include <sys/ioctl.h>

#include "calls.h"
#include "syscall.h"
#include "uapi.h"
#include "vcpu_run.h"

namespace {

// ioctl(2). command: [fd, request, argument]. EBUSY for a vCPU that runs: the kernel would wait for it.
int64_t Ioctl(Environment& environment) {
  const Command& command = environment.command();
  const Vcpu* vcpu = environment.FindVcpu(command.i32(0));
  if (vcpu != nullptr && vcpu->busy()) return -EBUSY;
  return Syscall(SYS_ioctl, command.i32(0), command.u32(1), command.u64(2));
}

// open(2). command: [flags, mode]
int64_t Open(Environment& environment, const char* path) {
  const Command& command = environment.command();
  return environment.Own(Syscall(SYS_openat, AT_FDCWD, path, command.i32(0), command.u32(1)));
}

// KVM_CREATE_VM; what its vCPUs will need of /dev/kvm is asked now, while it is at hand. command: [kvm, type]
int64_t CreateVm(Environment& environment) {
  const Command& command = environment.command();
  const int64_t fd = environment.Own(Syscall(SYS_ioctl, command.i32(0), uapi::kCreateVm, command.u64(1)));
  if (fd >= 0) RunPageSize(command.i32(0));
  return fd;
}

// KVM_GET_STATS_FD of a VM or a vCPU. command: [fd]. EBUSY for a vCPU that runs, as above.
int64_t GetStatsFd(Environment& environment) {
  const int fd = environment.command().i32(0);
  const Vcpu* vcpu = environment.FindVcpu(fd);
  if (vcpu != nullptr && vcpu->busy()) return -EBUSY;
  return environment.Own(Syscall(SYS_ioctl, fd, uapi::kGetStatsFd, 0));
}

// prlimit64(2) of this process, read. command: [resource]; then words: [soft, hard]
int64_t Getrlimit(const Command& command) {
  uint64_t limit[2] = {};
  const int64_t result = Syscall(uapi::kSysPrlimit64, 0, command.i32(0), nullptr, limit);
  if (result < 0) return result;
  command.Set(0, limit[0]);
  command.Set(1, limit[1]);
  return 0;
}

constexpr Function kTable[] = {
    {"ioctl", Invoke<Ioctl>}, {"getStatsFd", Invoke<GetStatsFd>}, {"getrlimit", Invoke<Getrlimit>},
    {"open", Invoke<Open>},   {"createVm", Invoke<CreateVm>},
};

}  // namespace

const Functions kSystem = kTable;
