#include "direct_copy.h"

#include <signal.h>
#include <ucontext.h>

#include <algorithm>

#include "syscall.h"

// The kernel can copy between two ranges of this process and answer EFAULT, but it looks up every page to do so, and
// takes three times as long as memcpy. So large copies are made here by a loop of our own, and a signal handler does
// what the kernel does for its own copies: a fault at an instruction of this loop goes on at its end. Nothing else is
// recovered from: any other SIGSEGV or SIGBUS goes to whoever had the signal before us, V8's WebAssembly handler among
// them.

extern "C" {
// Copies blocks of 64 bytes, and the rest byte by byte; returns how many bytes it did not copy. The instructions from
// `first` to before `end` may fault: with the program counter set to `end`, the function returns what is left.
size_t guest_memfd_copy(uint8_t* target, const uint8_t* source, size_t size);
extern const char guest_memfd_copy_first[];
extern const char guest_memfd_copy_end[];
}

__asm__(
    ".text\n"
    ".p2align 6\n"
    ".hidden guest_memfd_copy, guest_memfd_copy_first, guest_memfd_copy_end\n"
    ".globl guest_memfd_copy, guest_memfd_copy_first, guest_memfd_copy_end\n"
    ".type guest_memfd_copy, %function\n"
    "guest_memfd_copy:\n"
    ".cfi_startproc\n"
#if defined(__x86_64__)
    "  endbr64\n"
    "  mov %rdx, %rax\n"
    "guest_memfd_copy_first:\n"
    "  cmp $64, %rax\n"
    "  jb 2f\n"
    "1:\n"
    "  movups (%rsi), %xmm0\n"
    "  movups 16(%rsi), %xmm1\n"
    "  movups 32(%rsi), %xmm2\n"
    "  movups 48(%rsi), %xmm3\n"
    "  movups %xmm0, (%rdi)\n"
    "  movups %xmm1, 16(%rdi)\n"
    "  movups %xmm2, 32(%rdi)\n"
    "  movups %xmm3, 48(%rdi)\n"
    "  add $64, %rsi\n"
    "  add $64, %rdi\n"
    "  sub $64, %rax\n"
    "  cmp $64, %rax\n"
    "  jae 1b\n"
    "2:\n"
    "  test %rax, %rax\n"
    "  jz guest_memfd_copy_end\n"
    "3:\n"
    "  movzbl (%rsi), %ecx\n"
    "  movb %cl, (%rdi)\n"
    "  inc %rsi\n"
    "  inc %rdi\n"
    "  dec %rax\n"
    "  jnz 3b\n"
    "guest_memfd_copy_end:\n"
    "  ret\n"
#elif defined(__aarch64__)
    "  hint #34\n"  // bti c
    "guest_memfd_copy_first:\n"
    "  cmp x2, #64\n"
    "  b.lo 2f\n"
    "1:\n"
    "  ldp q0, q1, [x1]\n"
    "  ldp q2, q3, [x1, #32]\n"
    "  stp q0, q1, [x0]\n"
    "  stp q2, q3, [x0, #32]\n"
    "  add x1, x1, #64\n"
    "  add x0, x0, #64\n"
    "  sub x2, x2, #64\n"
    "  cmp x2, #64\n"
    "  b.hs 1b\n"
    "2:\n"
    "  cbz x2, guest_memfd_copy_end\n"
    "3:\n"
    "  ldrb w3, [x1], #1\n"
    "  strb w3, [x0], #1\n"
    "  subs x2, x2, #1\n"
    "  b.ne 3b\n"
    "guest_memfd_copy_end:\n"
    "  mov x0, x2\n"
    "  ret\n"
#else
#error "guest_memfd exists on x86-64 and arm64"
#endif
    ".cfi_endproc\n"
    ".size guest_memfd_copy, . - guest_memfd_copy\n");

namespace {

constexpr int kSignals[] = {SIGSEGV, SIGBUS};
struct sigaction previous[2];

template <typename Context>
auto& ProgramCounter(Context* context) {
#if defined(__x86_64__)
  return context->uc_mcontext.gregs[REG_RIP];
#else
  return context->uc_mcontext.pc;
#endif
}

// Async-signal-safe: it reads what was written once before the handler existed.
void OnFault(int signal, siginfo_t* info, void* context) {
  auto& counter = ProgramCounter(static_cast<ucontext_t*>(context));
  // Not sent by somebody, and not the news of a bad page that nothing has touched.
  const bool fault = info->si_code > 0 && !(signal == SIGBUS && info->si_code == BUS_MCEERR_AO);
  const uintptr_t at = static_cast<uintptr_t>(counter);
  if (fault && at >= reinterpret_cast<uintptr_t>(guest_memfd_copy_first) &&
      at < reinterpret_cast<uintptr_t>(guest_memfd_copy_end)) {
    counter = reinterpret_cast<uintptr_t>(guest_memfd_copy_end);
    return;
  }

  const struct sigaction& before = previous[signal == SIGBUS];
  if (before.sa_handler == SIG_IGN && !fault) return;
  if (before.sa_handler == SIG_DFL || before.sa_handler == SIG_IGN) {
    // As if we had never been here: the instruction faults again, or the signal comes again, and ends the process.
    struct sigaction action = {};
    action.sa_handler = SIG_DFL;
    sigaction(signal, &action, nullptr);
    if (!fault) raise(signal);
    return;
  }
  if ((before.sa_flags & SA_RESETHAND) != 0) {
    // The kernel would have taken it off before calling it.
    struct sigaction action = {};
    action.sa_handler = SIG_DFL;
    sigaction(signal, &action, nullptr);
  }
  if ((before.sa_flags & SA_SIGINFO) != 0) {
    before.sa_sigaction(signal, info, context);
  } else {
    before.sa_handler(signal);
  }
}

bool Install() {
  for (size_t index = 0; index < 2; index++) {
    if (sigaction(kSignals[index], nullptr, &previous[index]) < 0) return false;
  }
  for (size_t index = 0; index < 2; index++) {
    struct sigaction action = {};
    action.sa_sigaction = OnFault;
    action.sa_mask = previous[index].sa_mask;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | (previous[index].sa_flags & (SA_NODEFER | SA_RESTART));
    if (sigaction(kSignals[index], &action, nullptr) < 0) return false;
  }
  return true;
}

// A fault would reach our handler: nobody has taken the signals since, and this thread does not block them.
bool CanCatch() {
  static const bool installed = Install();
  if (!installed) return false;
  uint64_t blocked = 0;
  if (Syscall(SYS_rt_sigprocmask, SIG_BLOCK, nullptr, &blocked, sizeof blocked) < 0) return false;
  for (const int signal : kSignals) {
    struct sigaction current;
    if ((blocked >> (signal - 1) & 1) != 0 || sigaction(signal, nullptr, &current) < 0) return false;
    if ((current.sa_flags & SA_SIGINFO) == 0 || current.sa_sigaction != OnFault) return false;
  }
  return true;
}

}  // namespace

std::optional<size_t> DirectCopy(uint8_t* target, const uint8_t* source, size_t size) {
  constexpr size_t kLessThanABlock = 63;
  if (!CanCatch()) return std::nullopt;
  const size_t done = size - guest_memfd_copy(target, source, size);
  // What comes before the fault in the block that had it.
  const size_t rest = std::min(size - done, kLessThanABlock);
  return done + rest - guest_memfd_copy(target + done, source + done, rest);
}
