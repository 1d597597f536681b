#include "share.h"

#include <fcntl.h>
#include <sys/ioctl.h>

#include <algorithm>

#include "calls.h"
#include "syscall.h"
#include "uapi.h"
#include "vcpu_run.h"

namespace {

// A number that JavaScript has room for.
constexpr uint64_t kNumberMask = (uint64_t{1} << 52) - 1;

int64_t CheckExtension(int vm, int capability) { return Syscall(SYS_ioctl, vm, uapi::kCheckExtension, capability); }

// Only the kernel knows which memslots there are, and it only tells when asked to remove them.
void RemoveMemslots(int vm) {
  const int64_t spaces = std::max(int64_t{1}, CheckExtension(vm, uapi::kCapMultiAddressSpace));
  const int64_t slots = CheckExtension(vm, uapi::kCapNrMemslots);
  for (int64_t space = 0; space < spaces; space++) {
    for (int64_t slot = 0; slot < slots; slot++) {
      uapi::UserspaceMemoryRegion region = {static_cast<uint32_t>(space << 16 | slot), 0, 0, 0, 0};
      // Not a VM: /dev/kvm knows the capability too.
      if (Syscall(SYS_ioctl, vm, uapi::kSetUserMemoryRegion, &region) == -ENOTTY) return;
    }
  }
}

}  // namespace

// Never destroyed: threads may outlive exit().
Shares& Shares::Get() {
  static Shares* shares = new Shares;
  return *shares;
}

Shares::Shares() { uv_mutex_init(&mutex_); }

Shares::Share* Shares::Find(uint64_t number) {
  for (Share& share : shares_) {
    if (share.number == number) return &share;
  }
  return nullptr;
}

int64_t Shares::Offer(const Share& wanted) {
  uint64_t number = 0;
  const int64_t read = Syscall(SYS_getrandom, &number, sizeof number, 0);
  if (read != sizeof number) return read < 0 ? read : -EAGAIN;
  number = (number & kNumberMask) | 1;
  uv_mutex_lock(&mutex_);
  const Share* known = nullptr;
  for (const Share& share : shares_) {
    if (share.owner == wanted.owner && share.fd == wanted.fd && share.memory == wanted.memory) known = &share;
  }
  if (known != nullptr) {
    number = known->number;
  } else {
    shares_.push_back(wanted);
    shares_.back().number = number;
  }
  uv_mutex_unlock(&mutex_);
  return static_cast<int64_t>(number);
}

int64_t Shares::OfferFile(const Environment* owner, int fd) { return Offer({0, owner, fd, nullptr, false}); }

int64_t Shares::OfferMemory(const Environment* owner, Memory* memory) { return Offer({0, owner, -1, memory, false}); }

int64_t Shares::TakeFile(uint64_t number) {
  uv_mutex_lock(&mutex_);
  Share* share = Find(number);
  int64_t result = -ENOENT;
  if (share != nullptr && share->fd >= 0) {
    result = Syscall(SYS_fcntl, share->fd, F_DUPFD_CLOEXEC, 0);
    share->taken |= result >= 0;
  }
  uv_mutex_unlock(&mutex_);
  return result;
}

Memory* Shares::TakeMemory(uint64_t number) {
  uv_mutex_lock(&mutex_);
  Share* share = Find(number);
  Memory* memory = share == nullptr ? nullptr : share->memory;
  if (memory != nullptr) memory->references++;
  uv_mutex_unlock(&mutex_);
  return memory;
}

Shares::Share Shares::Withdraw(const Environment* owner, int fd, const Memory* memory) {
  Share found = {};
  uv_mutex_lock(&mutex_);
  for (size_t index = 0; index < shares_.size(); index++) {
    const Share& share = shares_[index];
    if (share.owner != owner || share.fd != fd || share.memory != memory) continue;
    found = share;
    shares_.erase(shares_.begin() + static_cast<ptrdiff_t>(index));
    break;
  }
  uv_mutex_unlock(&mutex_);
  return found;
}

void Shares::WithdrawFile(const Environment* owner, int fd) {
  const Share share = Withdraw(owner, fd, nullptr);
  if (!share.taken) return;
  StopVcpus(share.number);
  RemoveMemslots(fd);
}

uint64_t Shares::NumberOf(const Environment* owner, int fd) {
  uint64_t number = 0;
  uv_mutex_lock(&mutex_);
  for (const Share& share : shares_) {
    if (share.owner == owner && share.fd == fd) number = share.number;
  }
  uv_mutex_unlock(&mutex_);
  return number;
}

bool Shares::Has(uint64_t number) {
  uv_mutex_lock(&mutex_);
  const bool found = Find(number) != nullptr;
  uv_mutex_unlock(&mutex_);
  return found;
}

void Shares::WithdrawMemory(const Environment* owner, const Memory* memory) { Withdraw(owner, -1, memory); }

namespace {

// The number by which another thread takes a file of ours. command: [fd]
int64_t ShareFile(Environment& environment) {
  const int fd = environment.command().i32(0);
  return environment.Owns(fd) ? Shares::Get().OfferFile(&environment, fd) : -EBADF;
}

// A file that another thread shares. command: [number]
int64_t TakeFile(Environment& environment) {
  const uint64_t number = environment.command().u64(0);
  const int64_t fd = environment.Own(Shares::Get().TakeFile(number));
  if (fd >= 0) environment.SetOrigin(static_cast<int>(fd), number);
  return fd;
}

// Whether somebody still shares it: 1 or 0. command: [number]
int64_t IsShared(const Command& command) { return Shares::Get().Has(command.u64(0)) ? 1 : 0; }

// How many vCPUs of a VM of ours run on other threads. command: [vm]
int64_t CountRunningElsewhere(Environment& environment) {
  const uint64_t number = Shares::Get().NumberOf(&environment, environment.command().i32(0));
  return number == 0 ? 0 : CountRunning(number);
}

// The number by which another thread takes a mapping of ours. command: [mapping]
int64_t ShareMapping(Environment& environment) {
  const Mapping* mapping = environment.FindMapping(environment.command().u64(0));
  return mapping == nullptr ? -ENOMEM : Shares::Get().OfferMemory(&environment, mapping->memory);
}

// The same memory as a mapping of ours. command: [number]; then words: [length]
int64_t TakeMapping(Environment& environment) {
  Memory* memory = Shares::Get().TakeMemory(environment.command().u64(0));
  if (memory == nullptr) return -ENOENT;
  environment.command().Set(0, memory->length);
  return environment.AddMapping(memory);
}

constexpr Function kTable[] = {
    {"shareFile", Invoke<ShareFile>},       {"takeFile", Invoke<TakeFile>},
    {"isShared", Invoke<IsShared>},         {"countRunningElsewhere", Invoke<CountRunningElsewhere>},
    {"shareMapping", Invoke<ShareMapping>}, {"takeMapping", Invoke<TakeMapping>},
};

}  // namespace

const Functions kShare = kTable;
