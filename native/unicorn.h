// Engines of the Unicorn CPU emulator, a library that is looked for at run time.

#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

class Engine;

// The engines of one environment, by handle; those still open end with it.
class Engines {
 public:
  Engines();
  ~Engines();
  size_t Add(std::unique_ptr<Engine> engine);
  // Null for a handle that is not in use.
  Engine* Find(uint64_t handle) const;
  bool Remove(uint64_t handle);

 private:
  std::vector<std::unique_ptr<Engine>> engines_;
};
