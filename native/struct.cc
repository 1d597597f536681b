// Calls that pass the caller's own bytes: a struct, or a value that a struct points to. How many of them a kernel reads
// or writes depends on the request, on counts inside, sometimes on the hardware. So they are copied to where the kernel
// finds nothing behind them, and what is too short is EFAULT in the kernel itself.

#include <sys/ioctl.h>

#include <algorithm>
#include <cstring>

#include "calls.h"
#include "syscall.h"
#include "uapi.h"
#include "vcpu_run.h"

namespace {

bool IsBusy(const Environment& environment, int fd) {
  const Vcpu* vcpu = environment.FindVcpu(fd);
  return vcpu != nullptr && vcpu->busy();
}

// Calls `call(address)` with a copy of the first bytes, and brings them back, whatever the result is.
template <typename Call>
int64_t OnCopy(Environment& environment, Bytes bytes, Call call) {
  if (IsBusy(environment, environment.command().i32(0))) return -EBUSY;
  const size_t size = std::min(bytes.size, Environment::kScratch);
  uint8_t* copy = environment.Scratch(size);
  if (copy == nullptr) return -ENOMEM;
  if (size > 0) std::memcpy(copy, bytes.data, size);
  const int64_t result = call(copy);
  if (size > 0) std::memcpy(bytes.data, copy, size);
  return result;
}

// ioctl(2) with a struct; all of the bytes where it ends in an array. The caller answers for its having no pointers.
// command: [fd, request, ends in an array]
int64_t IoctlStruct(Environment& environment, Bytes bytes) {
  const Command& command = environment.command();
  const int fd = command.i32(0);
  const uint32_t request = command.u32(1);
  const size_t size = uapi::ArgumentSize(request);
  if (bytes.size < size) return -EFAULT;
  if (command.u32(2) == 0) bytes.size = size;
  return OnCopy(environment, bytes, [=](uint8_t* data) { return Syscall(SYS_ioctl, fd, request, data); });
}

template <uint32_t request>
int64_t OneReg(Environment& environment, Bytes value) {
  const Command& command = environment.command();
  const int fd = command.i32(0);
  const uint64_t id = command.u64(1);
  const size_t size = size_t{1} << (id >> uapi::kRegisterSizeShift & uapi::kRegisterSizeMask);
  if (value.size < size) return -EFAULT;
  value.size = size;
  return OnCopy(environment, value, [=](uint8_t* data) {
    uapi::OneReg args = {id, reinterpret_cast<uintptr_t>(data)};
    return Syscall(SYS_ioctl, fd, request, &args);
  });
}

template <uint32_t request>
int64_t DeviceAttr(Environment& environment, Bytes value) {
  const Command& command = environment.command();
  const int fd = command.i32(0);
  uapi::DeviceAttr args = {command.u32(1), command.u32(2), command.u64(3), 0};
  return OnCopy(environment, value, [=](uint8_t* data) mutable {
    args.addr = reinterpret_cast<uintptr_t>(data);
    return Syscall(SYS_ioctl, fd, request, &args);
  });
}

// KVM_GET_ONE_REG. command: [vcpu, id]
constexpr auto GetOneReg = OneReg<uapi::kGetOneReg>;
// KVM_SET_ONE_REG. command: [vcpu, id]
constexpr auto SetOneReg = OneReg<uapi::kSetOneReg>;
// KVM_GET_DEVICE_ATTR. command: [fd, flags, group, attr]
constexpr auto GetDeviceAttr = DeviceAttr<uapi::kGetDeviceAttr>;
// KVM_SET_DEVICE_ATTR. command: [fd, flags, group, attr]
constexpr auto SetDeviceAttr = DeviceAttr<uapi::kSetDeviceAttr>;

// KVM_HAS_DEVICE_ATTR. command: [fd, flags, group, attr]
int64_t HasDeviceAttr(Environment& environment) {
  const Command& command = environment.command();
  if (IsBusy(environment, command.i32(0))) return -EBUSY;
  uapi::DeviceAttr args = {command.u32(1), command.u32(2), command.u64(3), 0};
  return Syscall(SYS_ioctl, command.i32(0), uapi::kHasDeviceAttr, &args);
}

// KVM_CREATE_DEVICE; the result is its fd, or 0 if it was only asked for. command: [vm, type, flags]
int64_t CreateDevice(Environment& environment) {
  constexpr uint32_t kTest = 1;
  const Command& command = environment.command();
  uapi::CreateDevice args = {command.u32(1), 0, command.u32(2)};
  const int64_t result = Syscall(SYS_ioctl, command.i32(0), uapi::kCreateDevice, &args);
  if (result < 0 || (args.flags & kTest) != 0) return result;
  return environment.Own(args.fd);
}

constexpr Function kTable[] = {
    {"ioctlStruct", Invoke<IoctlStruct>},     {"getOneReg", Invoke<GetOneReg>},
    {"setOneReg", Invoke<SetOneReg>},         {"getDeviceAttr", Invoke<GetDeviceAttr>},
    {"setDeviceAttr", Invoke<SetDeviceAttr>}, {"hasDeviceAttr", Invoke<HasDeviceAttr>},
    {"createDevice", Invoke<CreateDevice>},
};

}  // namespace

const Functions kStruct = kTable;
