// What threads of this process show each other: a file or a mapping of one environment, under a number that another
// environment takes it by. Numbers cannot be guessed, so that only what was handed over is reached.

#pragma once

#include <uv.h>

#include <cstdint>
#include <vector>

#include "environment.h"

class Shares {
 public:
  static Shares& Get();

  // The number of a file or a mapping of the environment, the same at each call; or -errno.
  int64_t OfferFile(const Environment* owner, int fd);
  int64_t OfferMemory(const Environment* owner, Memory* memory);

  // A duplicate of the file, or a reference to the memory; -ENOENT and null when nobody offers it (any more).
  int64_t TakeFile(uint64_t number);
  Memory* TakeMemory(uint64_t number);
  // The number of a file of the environment that others may have; 0 for one that is not offered.
  uint64_t NumberOf(const Environment* owner, int fd);
  // Whether somebody still offers it.
  bool Has(uint64_t number);

  // Before the owner closes it. A VM that others have taken loses its memslots, because the memory they show goes with
  // the owner, and its vCPUs stop.
  void WithdrawFile(const Environment* owner, int fd);
  void WithdrawMemory(const Environment* owner, const Memory* memory);

 private:
  struct Share {
    uint64_t number;
    const Environment* owner;
    int fd;
    Memory* memory;
    bool taken;
  };

  Shares();
  Share* Find(uint64_t number);
  int64_t Offer(const Share& wanted);
  // Ends the offer; what it was, with number 0 when there was none.
  Share Withdraw(const Environment* owner, int fd, const Memory* memory);

  uv_mutex_t mutex_;
  std::vector<Share> shares_;
};
