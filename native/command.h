// The command buffer: how scalars travel between TypeScript and a system call.

#pragma once

#include <cstddef>
#include <cstdint>

// 64 words of 64 bits, shared with JavaScript. A call reads its arguments from the first ones and leaves more than one
// result there. JavaScript runs again as soon as the call returns, so nobody keeps a pointer into it.
class Command {
 public:
  static constexpr size_t kWords = 64;

  Command() = default;
  explicit Command(uint64_t* words) : words_(words) {}

  uint64_t u64(size_t index) const { return words_[index]; }
  int64_t i64(size_t index) const { return static_cast<int64_t>(words_[index]); }
  uint32_t u32(size_t index) const { return static_cast<uint32_t>(words_[index]); }
  int32_t i32(size_t index) const { return static_cast<int32_t>(words_[index]); }
  void Set(size_t index, uint64_t value) const { words_[index] = value; }

 private:
  uint64_t* words_ = nullptr;
};
