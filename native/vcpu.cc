// Calls on a vCPU file descriptor. It is usable on the thread that created it; only kicks come from anywhere.

#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "calls.h"
#include "share.h"
#include "syscall.h"
#include "uapi.h"
#include "vcpu_run.h"

namespace {

int64_t AddVcpu(Environment& environment, int fd, size_t size, uint64_t origin) {
  void* address = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (address == MAP_FAILED) return -errno;
  Vcpu* vcpu = new Vcpu(fd, new Mapping(new Memory{static_cast<uint8_t*>(address), size}), origin);
  environment.AddVcpu(vcpu);
  const int64_t result = Watch(vcpu);
  if (result < 0) environment.RemoveVcpu(fd);
  // Its VM was closed where it comes from before there was anything to stop.
  if (result == 0 && origin != 0 && !Shares::Get().Has(origin)) vcpu->StopIfFrom(origin);
  return result;
}

// KVM_CREATE_VCPU, with its kvm_run mapped. command: [vm, id]
int64_t CreateVcpu(Environment& environment) {
  const Command& command = environment.command();
  const int64_t size = RunPageSize(-1);
  const int64_t fd = Syscall(SYS_ioctl, command.i32(0), uapi::kCreateVcpu, command.u64(1));
  if (fd < 0) return fd;
  const uint64_t origin = environment.Origin(command.i32(0));
  const int64_t result =
      size < 0 ? size : AddVcpu(environment, static_cast<int>(fd), static_cast<size_t>(size), origin);
  if (result == 0) return environment.Own(fd);
  close(static_cast<int>(fd));
  return result;
}

// KVM_RUN until the guest exits, a kick, or `time` nanoseconds from now; 0 completes what is pending and enters no
// guest. command: [vcpu, time]
int64_t Run(Environment& environment) {
  const Command& command = environment.command();
  Vcpu* vcpu = environment.FindVcpu(command.i32(0));
  if (vcpu == nullptr) return -EBADF;
  const uint64_t time = command.u64(1);
  return vcpu->Run(environment, time);
}

// The same on a thread of the vCPU. command: [vcpu, time]
napi_value RunAsync(Environment& environment) {
  napi_env env = environment.env();
  const Command& command = environment.command();
  const uint64_t time = command.u64(1);
  Vcpu* vcpu = environment.FindVcpu(command.i32(0));
  AsyncRun* run = new AsyncRun{nullptr, time == 0 ? 0 : After(time), 0};
  napi_value promise = nullptr;
  napi_create_promise(env, &run->deferred, &promise);
  int64_t refused = -EBADF;
  if (vcpu != nullptr) refused = vcpu->busy() ? -EBUSY : environment.StartRun(vcpu, run);
  if (refused == 0) return promise;
  napi_resolve_deferred(env, run->deferred, ToValue(env, refused));
  delete run;
  return promise;
}

// Ends the run of a vCPU of any thread of this process, or else its next one. command: [vcpu]
int64_t Kick(const Command& command) { return KickVcpu(command.i32(0)); }

// The kvm_run page and those behind it, as an ArrayBuffer that is detached when the vCPU is closed, or -errno. command:
// [vcpu]
napi_value RunPage(Environment& environment) {
  const Vcpu* vcpu = environment.FindVcpu(environment.command().i32(0));
  napi_value buffer = nullptr;
  int64_t result = -EBADF;
  if (vcpu != nullptr) {
    Mapping* page = vcpu->page();
    result = environment.CreateWindow(page, page->address, page->length, &buffer);
  }
  return result < 0 ? ToValue(environment.env(), result) : buffer;
}

// KVM_PRE_FAULT_MEMORY. command: [vcpu, gpa, size, flags]; then words: [gpa, size]
int64_t PreFaultMemory(Environment& environment) {
  const Command& command = environment.command();
  Vcpu* vcpu = environment.FindVcpu(command.i32(0));
  uapi::PreFaultMemory args = {command.u64(1), command.u64(2), command.u64(3), {}};
  // Without a vCPU it is some other file, which has no such request.
  const int64_t result = vcpu != nullptr ? vcpu->PreFault(environment, &args)
                                         : Syscall(SYS_ioctl, command.i32(0), uapi::kPreFaultMemory, &args);
  command.Set(0, args.gpa);
  command.Set(1, args.size);
  return result;
}

constexpr Function kTable[] = {
    {"createVcpu", Invoke<CreateVcpu>}, {"run", Invoke<Run>},
    {"runAsync", Invoke<RunAsync>},     {"kick", Invoke<Kick>},
    {"runPage", Invoke<RunPage>},       {"preFaultMemory", Invoke<PreFaultMemory>},
};

}  // namespace

const Functions kVcpu = kTable;
