// System calls without the C library between: the kernel's answer, ≥ 0 or -errno, is already what every native function
// returns. It also saves a return, and where the kernel has flushed the processor's return predictor, each one costs.

#pragma once

#include <sys/syscall.h>

#include <cstddef>
#include <cstdint>

namespace syscall_word {
inline long Of(std::nullptr_t) { return 0; }
inline long Of(const void* pointer) { return reinterpret_cast<long>(pointer); }
template <typename Integer>
constexpr long Of(Integer value) {
  return static_cast<long>(value);
}
template <typename Type>
long Of(Type* pointer) {
  return reinterpret_cast<long>(pointer);
}
}  // namespace syscall_word

inline int64_t SyscallWords(long number, long a = 0, long b = 0, long c = 0, long d = 0, long e = 0, long f = 0) {
#if defined(__x86_64__)
  register long r10 __asm__("r10") = d;
  register long r8 __asm__("r8") = e;
  register long r9 __asm__("r9") = f;
  long result;
  __asm__ volatile("syscall"
                   : "=a"(result)
                   : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                   : "rcx", "r11", "memory");
  return result;
#elif defined(__aarch64__)
  register long x8 __asm__("x8") = number;
  register long x0 __asm__("x0") = a;
  register long x1 __asm__("x1") = b;
  register long x2 __asm__("x2") = c;
  register long x3 __asm__("x3") = d;
  register long x4 __asm__("x4") = e;
  register long x5 __asm__("x5") = f;
  __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5) : "memory");
  return x0;
#else
#error "guest_memfd exists on x86-64 and arm64"
#endif
}

template <typename... Arguments>
inline int64_t Syscall(long number, Arguments... arguments) {
  return SyscallWords(number, syscall_word::Of(arguments)...);
}
