#include "vcpu_run.h"

#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <vector>

#include "environment.h"
#include "interrupt.h"
#include "syscall.h"
#include "uapi.h"

// How a run ends from outside. KVM_RUN returns EINTR for a pending signal, and for the byte immediate_exit of kvm_run.
// A signal alone would be lost just before KVM_RUN, the byte alone would not be seen inside: so the byte is set first,
// then the signal is sent, and only while the thread is between the two ends of a run.
//
// A deadline is a kick by one thread of the process that sleeps until the earliest of all deadlines. A run only wakes
// it to be earlier than what it sleeps for, so a loop of runs with the same time limit does not: it costs a few stores.

namespace {

constexpr size_t kImmediateExit = 1;
constexpr size_t kStack = size_t{1} << 18;
// A run that goes on after its deadline is interrupted again.
constexpr uint64_t kAgain = 10'000'000;
// Nobody tells a thread inside a system call that it is to end, as a worker that is terminated, so it comes out to
// look.
constexpr uint64_t kSlice = 50'000'000;
// Before Linux 6.18 a vCPU whose page tables are those of a memslot that has gone waits in KVM_PRE_FAULT_MEMORY for
// ones that only KVM_RUN gives it.
constexpr uint64_t kPreFault = 1'000'000'000;

// When the sleeping thread looks next.
std::atomic<uint64_t> next_look = kNever;

// Every vCPU of the process, and the thread that watches their deadlines. Never destroyed: threads may outlive exit().
class Watcher {
 public:
  static Watcher& Get() {
    static Watcher* watcher = new Watcher;
    return *watcher;
  }

  int64_t Add(Vcpu* vcpu) {
    uv_mutex_lock(&mutex_);
    const int64_t result = Begin();
    if (result == 0) vcpus_.push_back(vcpu);
    uv_mutex_unlock(&mutex_);
    return result;
  }

  void Remove(Vcpu* vcpu) {
    uv_mutex_lock(&mutex_);
    vcpus_.erase(std::remove(vcpus_.begin(), vcpus_.end(), vcpu), vcpus_.end());
    uv_mutex_unlock(&mutex_);
  }

  int64_t Kick(int fd) {
    int64_t result = -EBADF;
    uv_mutex_lock(&mutex_);
    for (Vcpu* vcpu : vcpus_) {
      if (vcpu->fd() == fd) result = vcpu->Kick();
    }
    uv_mutex_unlock(&mutex_);
    return result;
  }

  int64_t CountRunning(uint64_t origin) {
    uv_mutex_lock(&mutex_);
    const int64_t count = std::count_if(vcpus_.begin(), vcpus_.end(),
                                        [=](const Vcpu* vcpu) { return vcpu->origin() == origin && vcpu->busy(); });
    uv_mutex_unlock(&mutex_);
    return count;
  }

  void Stop(uint64_t origin) {
    uv_mutex_lock(&mutex_);
    for (Vcpu* vcpu : vcpus_) vcpu->StopIfFrom(origin);
    uv_mutex_unlock(&mutex_);
  }

  void LookBy(uint64_t deadline) {
    uv_mutex_lock(&mutex_);
    if (deadline < next_look) {
      next_look = deadline;
      uv_cond_signal(&changed_);
    }
    uv_mutex_unlock(&mutex_);
  }

 private:
  Watcher() {
    uv_mutex_init(&mutex_);
    uv_cond_init(&changed_);
  }

  int64_t Begin();
  void Look();

  uv_mutex_t mutex_;
  uv_cond_t changed_;
  std::vector<Vcpu*> vcpus_;
  bool begun_ = false;
};

// Starts a thread that takes no signal of the process, except those of its own faults and whatever may interrupt a run.
int StartThread(uv_thread_t* thread, uv_thread_cb entry, void* argument) {
  uint64_t blocked = ~uint64_t{0}, before = 0;
  for (const int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS}) blocked &= ~SignalBit(signal);
  for (const int signal : InterruptSignals()) blocked &= ~SignalBit(signal);
  Syscall(SYS_rt_sigprocmask, SIG_SETMASK, &blocked, &before, sizeof blocked);
  uv_thread_options_t options = {};
  options.flags = UV_THREAD_HAS_STACK_SIZE;
  options.stack_size = kStack;
  const int result = uv_thread_create_ex(thread, &options, entry, argument);
  Syscall(SYS_rt_sigprocmask, SIG_SETMASK, &before, nullptr, sizeof before);
  return result;
}

int64_t Watcher::Begin() {
  const int64_t prepared = PrepareInterrupt();
  if (prepared < 0 || begun_) return prepared;
  uv_thread_t thread;
  const int started = StartThread(&thread, [](void* self) { static_cast<Watcher*>(self)->Look(); }, this);
  begun_ = started == 0;
  return started;
}

void Watcher::Look() {
  uv_mutex_lock(&mutex_);
  for (;;) {
    // Before looking: a run that begins from here on wakes us, one that began earlier is seen.
    next_look = kNever;
    const uint64_t now = Now();
    uint64_t next = kNever;
    for (Vcpu* vcpu : vcpus_) next = std::min(next, vcpu->Expire(now));
    next_look = next;
    if (next == kNever) {
      uv_cond_wait(&changed_, &mutex_);
    } else if (next > now) {
      uv_cond_timedwait(&changed_, &mutex_, next - now);
    }
  }
}

}  // namespace

uint64_t Now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<uint64_t>(time.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(time.tv_nsec);
}

uint64_t After(uint64_t duration) {
  const uint64_t now = Now();
  return duration < kNever - now ? now + duration : kNever;
}

int64_t RunPageSize(int kvm) {
  static std::atomic<int64_t> known = 0;
  if (known > 0) return known;
  const int64_t fd = kvm >= 0 ? kvm : Syscall(SYS_openat, AT_FDCWD, "/dev/kvm", O_RDWR | O_CLOEXEC, 0);
  if (fd < 0) return fd;
  const int64_t size = Syscall(SYS_ioctl, fd, uapi::kGetVcpuMmapSize, 0);
  if (kvm < 0) close(static_cast<int>(fd));
  if (size > 0) known = size;
  return size;
}

int64_t Watch(Vcpu* vcpu) { return Watcher::Get().Add(vcpu); }

void Unwatch(Vcpu* vcpu) { Watcher::Get().Remove(vcpu); }

int64_t KickVcpu(int fd) { return Watcher::Get().Kick(fd); }

int64_t CountRunning(uint64_t origin) { return Watcher::Get().CountRunning(origin); }

void StopVcpus(uint64_t origin) { Watcher::Get().Stop(origin); }

Vcpu::Vcpu(int fd, Mapping* page, uint64_t origin)
    : fd_(fd), page_(page), origin_(origin), immediate_exit_(page->address + kImmediateExit) {}

Vcpu::~Vcpu() {
  if (serving_) {
    quit_ = true;
    KickVcpu(fd_);
    uv_sem_post(&work_);
    uv_thread_join(&server_);
    uv_sem_destroy(&work_);
  }
  Unwatch(this);
}

int64_t Vcpu::Claim() {
  if (stopped_.load(std::memory_order_relaxed)) return -EBADF;
  uint32_t idle = kIdle;
  return phase_.compare_exchange_strong(idle, kClaimed) ? 0 : -EBUSY;
}

int64_t Vcpu::Run(Environment& environment, uint64_t time) {
  const int64_t refused = Claim();
  if (refused < 0) return refused;
  const uint64_t now = Now();
  const uint64_t deadline = time == 0 ? 0 : time < kNever - now ? now + time : kNever;
  return RunClaimed(environment.RunnerThread(), deadline, std::min(deadline, now + kSlice), &environment);
}

int64_t Vcpu::RunClaimed(pid_t thread, uint64_t deadline, uint64_t slice, const Environment* environment) {
  const bool at_once = deadline == 0;
  thread_.store(thread, std::memory_order_relaxed);
  deadline_.store(at_once ? kNever : slice, std::memory_order_relaxed);
  // Others write there only while the run is in progress, so this is the program's own wish.
  const bool asked = *immediate_exit_ != 0;
  // From here on a kick sends a signal; an earlier one is seen below. The same holds for the deadline and next_look.
  phase_ = kRunning;
  if (!at_once && slice < next_look) Watcher::Get().LookBy(slice);

  if (at_once || reasons_ != 0) *immediate_exit_ = 1;
  int64_t result;
  do {
    result = Syscall(SYS_ioctl, fd_, uapi::kRun, 0);
    if (result != -EINTR) break;
    if (reasons_ == kExpired && environment != nullptr && !environment->IsStopping()) EndSlice(asked, deadline);
    // A signal that was not for us, unless one of the four says so.
  } while (reasons_ == 0 && *immediate_exit_ == 0 && Now() < deadline);
  Leave();

  const uint32_t reasons = reasons_;
  if (reasons != 0 || at_once) {
    // A kick that did not end this run is still there for the next.
    reasons_ &= ~(result == -EINTR ? reasons : uint32_t{kExpired});
    // What the program wrote there itself stays, as it does in the kernel.
    if (!asked) *immediate_exit_ = 0;
  }
  if (result == -EINTR && (reasons & kKicked) == 0 && !asked && Now() >= deadline) result = -ETIME;
  phase_.store(kIdle, std::memory_order_release);
  return result;
}

int64_t Vcpu::PreFault(Environment& environment, uapi::PreFaultMemory* range) {
  const int64_t refused = Claim();
  if (refused < 0) return refused;
  const bool asked = *immediate_exit_ != 0;
  const uint64_t deadline = Now() + kPreFault;
  thread_.store(environment.RunnerThread(), std::memory_order_relaxed);
  deadline_.store(deadline, std::memory_order_relaxed);
  phase_ = kRunning;
  if (deadline < next_look) Watcher::Get().LookBy(deadline);

  int64_t result = Syscall(SYS_ioctl, fd_, uapi::kPreFaultMemory, range);
  Leave();

  const bool expired = (reasons_.fetch_and(~uint32_t{kExpired}) & kExpired) != 0;
  // A kick that came meanwhile is kept in reasons_ for the next run.
  if (!asked) *immediate_exit_ = 0;
  if (result == -EINTR && expired) result = -EAGAIN;
  phase_.store(kIdle, std::memory_order_release);
  return result;
}

void Vcpu::EndSlice(bool asked, uint64_t deadline) {
  const uint64_t now = Now();
  if (now >= deadline) return;
  const uint64_t slice = std::min(deadline, now + kSlice);
  // Whoever is about to end the run has to be through with it, or the byte would be written after it is cleared.
  Hold();
  deadline_ = slice;
  reasons_ &= ~uint32_t{kExpired};
  *immediate_exit_ = asked ? 1 : 0;
  phase_ = kRunning;
  // A kick says so before it looks at the phase.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (reasons_ != 0) *immediate_exit_ = 1;
  if (slice < next_look) Watcher::Get().LookBy(slice);
}

void Vcpu::Hold() {
  uint32_t running = kRunning;
  while (!phase_.compare_exchange_weak(running, kClaimed)) {
    running = kRunning;
    sched_yield();
  }
}

void Vcpu::Leave() {
  Hold();
  if (!interrupted_) return;
  interrupted_ = false;
  // A signal that was sent is delivered no later than at the end of a system call.
  sched_yield();
}

int64_t Vcpu::Stop(Reason reason) {
  uint32_t running = kRunning;
  if (!phase_.compare_exchange_strong(running, kInterrupted)) return 0;
  int64_t result = 0;
  // This may be a later run than the one that the caller saw expire.
  if (reason == kKicked || deadline_.load(std::memory_order_relaxed) <= Now()) {
    reasons_ |= reason;
    *immediate_exit_ = 1;
    interrupted_ = true;
    result = Interrupt(thread_.load(std::memory_order_relaxed));
  }
  phase_ = kRunning;
  return result;
}

int64_t Vcpu::Kick() {
  // One is enough: a storm of signals would keep the run from ending.
  const bool already = (reasons_.fetch_or(kKicked) & kKicked) != 0;
  return already ? 0 : Stop(kKicked);
}

void Vcpu::StopIfFrom(uint64_t origin) {
  if (origin_ != origin) return;
  stopped_ = true;
  Kick();
}

uint64_t Vcpu::Expire(uint64_t now) {
  if (phase_ != kRunning) return kNever;
  const uint64_t deadline = deadline_.load(std::memory_order_relaxed);
  if (deadline > now) return deadline;
  Stop(kExpired);
  return now + kAgain;
}

int64_t Vcpu::Start(AsyncRun* run, napi_threadsafe_function ended) {
  const int64_t refused = Claim();
  if (refused < 0) return refused;
  if (!serving_) {
    uv_sem_init(&work_, 0);
    const int started = StartThread(&server_, [](void* self) { static_cast<Vcpu*>(self)->Serve(); }, this);
    if (started < 0) {
      uv_sem_destroy(&work_);
      phase_ = kIdle;
      return started;
    }
    serving_ = true;
  }
  ended_ = ended;
  next_ = run;
  uv_sem_post(&work_);
  return 0;
}

void Vcpu::Serve() {
  const pid_t thread = static_cast<pid_t>(Syscall(SYS_gettid));
  for (;;) {
    uv_sem_wait(&work_);
    AsyncRun* run = next_.exchange(nullptr);
    if (run == nullptr) {
      if (quit_) return;
      continue;
    }
    const napi_threadsafe_function ended = ended_;
    run->result = RunClaimed(thread, run->deadline, run->deadline, nullptr);
    napi_call_threadsafe_function(ended, run, napi_tsfn_nonblocking);
  }
}
