#include "interrupt.h"

#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>

#include "syscall.h"

namespace {

std::atomic<int> chosen = 0;

void OnInterrupt(int) {}

// Ours already, or free: a signal somebody handles is left to them, so that their handler never sees one of ours.
bool Take(int signal) {
  struct sigaction current;
  if (sigaction(signal, nullptr, &current) < 0) return false;
  if ((current.sa_flags & SA_SIGINFO) != 0) return false;
  if (current.sa_handler == OnInterrupt) return true;
  if (current.sa_handler != SIG_DFL && current.sa_handler != SIG_IGN) return false;
  struct sigaction action = {};
  action.sa_handler = OnInterrupt;
  sigfillset(&action.sa_mask);
  // KVM_RUN is never restarted. Any other call would be: one that comes from elsewhere interrupts nothing.
  action.sa_flags = SA_RESTART | SA_ONSTACK;
  return sigaction(signal, &action, nullptr) == 0;
}

}  // namespace

int InterruptSignal() { return chosen.load(std::memory_order_relaxed); }

// SIGURG first: nobody minds one, and debuggers let it pass.
std::vector<int> InterruptSignals() {
  std::vector<int> signals = {SIGURG};
  for (int signal = SIGRTMAX; signal >= SIGRTMIN; signal--) signals.push_back(signal);
  return signals;
}

int64_t PrepareInterrupt() {
  if (chosen != 0 && Take(chosen)) return 0;
  for (const int signal : InterruptSignals()) {
    if (!Take(signal)) continue;
    chosen = signal;
    return 0;
  }
  return -EBUSY;
}

void AllowInterrupt(int signal) {
  const uint64_t mask = SignalBit(signal);
  Syscall(SYS_rt_sigprocmask, SIG_UNBLOCK, &mask, nullptr, sizeof mask);
}

int64_t Interrupt(pid_t thread) {
  const int64_t ready = PrepareInterrupt();
  return ready < 0 ? ready : Syscall(SYS_tgkill, getpid(), thread, chosen.load());
}
