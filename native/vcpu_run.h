// Virtual CPUs: who may run one, and how a run is ended from outside.

#pragma once

#include <node_api.h>
#include <sys/types.h>
#include <uv.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

struct Mapping;

// A point in time is nanoseconds of CLOCK_MONOTONIC.
constexpr uint64_t kNever = UINT64_MAX;
uint64_t Now();
// `duration` from now.
uint64_t After(uint64_t duration);

// A run on the vCPU's own thread, whose result is a promise.
struct AsyncRun {
  napi_deferred deferred;
  uint64_t deadline;
  int64_t result;
};

// One vCPU. It belongs to the environment that created it; threads of others may kick it for as long as it is watched.
class Vcpu {
 public:
  Vcpu(int fd, Mapping* page);
  // Ends a run on the vCPU's own thread, and the thread. After this nobody else has the vCPU any more.
  ~Vcpu();
  Vcpu(const Vcpu&) = delete;
  Vcpu& operator=(const Vcpu&) = delete;

  int fd() const { return fd_; }
  Mapping* page() const { return page_; }
  bool busy() const { return phase_.load(std::memory_order_acquire) != kIdle; }

  // KVM_RUN on this thread, whose number is `thread`, until the guest exits, a kick or the deadline; a deadline of 0
  // has passed already.
  int64_t Run(pid_t thread, uint64_t deadline);
  // The same on the vCPU's own thread, which passes the run to `ended`. 0 if it will.
  int64_t Start(AsyncRun* run, napi_threadsafe_function ended);

  // Ends the run in progress, or else the next one. The callers of these two take turns.
  int64_t Kick();
  // Ends a run whose deadline has passed. When to ask again.
  uint64_t Expire(uint64_t now);

 private:
  // Claimed: by a run that has not begun, or has ended and has not returned. Interrupted: running, and may not end
  // until the signal is sent, so that none comes later than the run.
  enum Phase : uint32_t { kIdle, kClaimed, kRunning, kInterrupted };
  // Why a run must end. A kick without a run stays until the next one.
  enum Reason : uint32_t { kKicked = 1, kExpired = 2 };

  bool Claim();
  int64_t RunClaimed(pid_t thread, uint64_t deadline);
  void Leave();
  int64_t Stop(Reason reason);
  void Serve();

  const int fd_;
  Mapping* const page_;
  volatile uint8_t* const immediate_exit_;
  std::atomic<uint32_t> phase_ = kIdle;
  std::atomic<uint32_t> reasons_ = 0;
  std::atomic<uint64_t> deadline_ = kNever;
  std::atomic<pid_t> thread_ = 0;
  bool interrupted_ = false;  // written in the phase of that name, read after it

  bool serving_ = false;
  uv_thread_t server_;
  uv_sem_t work_;
  std::atomic<AsyncRun*> next_ = nullptr;
  std::atomic<bool> quit_ = false;
  napi_threadsafe_function ended_ = nullptr;
};

// KVM_GET_VCPU_MMAP_SIZE, as /dev/kvm said when it was asked first. `kvm` is it, or -1 to ask only if nobody has. Or
// -errno.
int64_t RunPageSize(int kvm);

// Makes a vCPU known to kicks and deadlines; 0 or -errno.
int64_t Watch(Vcpu* vcpu);
void Unwatch(Vcpu* vcpu);
// Kicks a vCPU of whatever thread of this process by its fd. EBADF if there is none.
int64_t KickVcpu(int fd);
