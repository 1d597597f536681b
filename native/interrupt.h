// Getting a thread out of KVM_RUN: a signal whose handler does nothing, sent to that thread alone and only while it is
// on its way in, inside or on its way out.

#pragma once

#include <sys/types.h>

#include <cstdint>
#include <vector>

// A signal in the kernel's mask of signals.
constexpr uint64_t SignalBit(int signal) { return uint64_t{1} << (signal - 1); }

// The signal as it is now; 0 before the first.
int InterruptSignal();
// All that it could become.
std::vector<int> InterruptSignals();

// Takes a signal that nobody handles, or another one if somebody has taken ours since. Callers take turns. 0 or -errno.
int64_t PrepareInterrupt();

// Lets this thread be interrupted by `signal`, whatever mask it was started with.
void AllowInterrupt(int signal);

// Interrupts a thread of this process. Callers take turns. 0 or -errno.
int64_t Interrupt(pid_t thread);
