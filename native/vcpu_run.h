// Virtual CPUs: who may run one, and how a run is ended from outside.

#pragma once

#include <node_api.h>
#include <sys/types.h>
#include <uv.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "uapi.h"

class Environment;
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
  // `origin`: the number its VM was taken by from another thread, or 0.
  Vcpu(int fd, Mapping* page, uint64_t origin);
  // Ends a run on the vCPU's own thread, and the thread. After this nobody else has the vCPU any more.
  ~Vcpu();
  Vcpu(const Vcpu&) = delete;
  Vcpu& operator=(const Vcpu&) = delete;

  int fd() const { return fd_; }
  Mapping* page() const { return page_; }
  uint64_t origin() const { return origin_; }
  bool busy() const { return phase_.load(std::memory_order_acquire) != kIdle; }

  // KVM_RUN on the thread of the environment until the guest exits, a kick, `time` nanoseconds from now, or the end of
  // the environment; at a time of 0 no guest is entered. ETIME when it was the time, EINTR when it was something else.
  int64_t Run(Environment& environment, uint64_t time);
  // The same on the vCPU's own thread, which passes the run to `ended`. 0 if it will.
  int64_t Start(AsyncRun* run, napi_threadsafe_function ended);
  // KVM_PRE_FAULT_MEMORY on the thread of the environment; EAGAIN when in a second it mapped nothing. Kicks stay.
  int64_t PreFault(Environment& environment, uapi::PreFaultMemory* range);

  // Ends the run in progress, or else the next one. The callers of these three take turns.
  int64_t Kick();
  // The same, and there are no others, if its VM was taken by this number.
  void StopIfFrom(uint64_t origin);
  // Ends a run whose deadline has passed. When to ask again.
  uint64_t Expire(uint64_t now);

 private:
  // Claimed: by a run that has not begun, or has ended and has not returned. Interrupted: running, and may not end
  // until the signal is sent, so that none comes later than the run.
  enum Phase : uint32_t { kIdle, kClaimed, kRunning, kInterrupted };
  // Why a run must end. A kick without a run stays until the next one.
  enum Reason : uint32_t { kKicked = 1, kExpired = 2 };

  int64_t Claim();
  // A run with an environment comes out at the end of a slice to look after it.
  int64_t RunClaimed(pid_t thread, uint64_t deadline, uint64_t slice, const Environment* environment);
  void EndSlice(bool asked, uint64_t deadline);
  // From running to claimed, as soon as nobody interrupts it.
  void Hold();
  void Leave();
  int64_t Stop(Reason reason);
  void Serve();

  const int fd_;
  Mapping* const page_;
  const uint64_t origin_;
  volatile uint8_t* const immediate_exit_;
  std::atomic<uint32_t> phase_ = kIdle;
  std::atomic<uint32_t> reasons_ = 0;
  std::atomic<uint64_t> deadline_ = kNever;
  std::atomic<pid_t> thread_ = 0;
  std::atomic<bool> stopped_ = false;
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
// How many vCPUs run whose VM was taken by this number.
int64_t CountRunning(uint64_t origin);
// Ends the runs of vCPUs whose VM was taken by this number from a thread that closes it, for good.
void StopVcpus(uint64_t origin);
