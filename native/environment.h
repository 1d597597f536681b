// What one JavaScript environment (the main thread, or a worker) owns: its command buffer, file descriptors and
// mappings.

#pragma once

#include <node_api.h>
#include <sys/types.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "command.h"
#include "unicorn.h"

// The bytes of a Uint8Array argument.
struct Bytes {
  uint8_t* data = nullptr;
  size_t size = 0;
};

// The same, or nothing for null.
struct OptionalBytes : Bytes {};

struct Mapping;
class Vcpu;
struct AsyncRun;

// An ArrayBuffer over a part of a mapping, from its creation to the finalizer of its backing store.
struct Window {
  Mapping* mapping;
  napi_ref buffer;  // weak
  uint8_t* data;
  size_t size;
  size_t index;   // in mapping->windows
  bool detached;  // by us, hence out of reach of JavaScript
};

// Memory mapped by mmap(2), for as long as an environment has a mapping of it.
struct Memory {
  uint8_t* const address;
  const size_t length;  // whole pages
  std::atomic<uint32_t> references{1};

  void Release();
};

// A mapping of an environment. It outlives its handle while a call on another thread uses it or JavaScript may still
// reach it.
struct Mapping {
  explicit Mapping(Memory* memory) : memory(memory), address(memory->address), length(memory->length) {}

  Memory* const memory;
  uint8_t* const address;
  const size_t length;
  bool open = true;
  bool mapped = true;
  bool blanked = false;
  uint32_t calls = 0;
  std::vector<Window*> windows;
};

// Ends a call or a window of a mapping: unmaps and deletes it if that was the last thing that held it.
void Settle(Mapping* mapping);

class Environment {
 public:
  explicit Environment(napi_env env);
  Environment(const Environment&) = delete;
  Environment& operator=(const Environment&) = delete;

  napi_env env() const { return env_; }
  const Command& command() const { return command_; }
  napi_value CommandBuffer() const;

  // Records a new file descriptor, if it is one; the result of the call that opened it, ≥ 0 or -errno.
  int64_t Own(int64_t fd);
  // Forgets a file descriptor; false if it is not one of ours.
  bool Disown(int fd);
  bool Owns(int fd) const { return static_cast<size_t>(fd) < fds_.size() && fds_[static_cast<size_t>(fd)]; }
  // The number that a file of another environment was taken by; 0 for our own.
  void SetOrigin(int fd, uint64_t number);
  uint64_t Origin(int fd) const;
  // Whether the thread is to end, so that whoever keeps it must let go.
  bool IsStopping() const;

  // Takes over a reference to the memory.
  int64_t AddMapping(Memory* memory);
  // Null for a handle that is not in use.
  Mapping* FindMapping(uint64_t handle) const {
    return handle < mappings_.size() ? mappings_[static_cast<size_t>(handle)] : nullptr;
  }
  // The address of a range of a mapping; null if the range leaves the mapping, or if there is no such mapping.
  uint8_t* Range(uint64_t handle, uint64_t offset, uint64_t length) const;
  int64_t RemoveMapping(uint64_t handle);
  // Detaches the windows of a mapping and lets go of it.
  void CloseMapping(Mapping* mapping);

  void AddVcpu(Vcpu* vcpu);
  // Null for an fd that is not a vCPU created here.
  Vcpu* FindVcpu(int fd) const {
    return static_cast<size_t>(fd) < vcpus_.size() ? vcpus_[static_cast<size_t>(fd)] : nullptr;
  }
  // Ends its runs and forgets it, if the fd is a vCPU's.
  void RemoveVcpu(int fd);
  // This thread's number; its runs can be interrupted from now on.
  pid_t RunnerThread();
  // Starts a run on the vCPU's own thread, and keeps the event loop alive until its promise is resolved; 0 or -errno.
  int64_t StartRun(Vcpu* vcpu, AsyncRun* run);

  // `size` bytes just before a page that nobody may touch; null if they cannot be had. The same memory at each call.
  uint8_t* Scratch(size_t size);
  static constexpr size_t kScratch = size_t{1} << 20;

  // Bytes of a mapping as an ArrayBuffer, detached with the mapping; 0 or -errno.
  int64_t CreateWindow(Mapping* mapping, uint8_t* data, size_t size, napi_value* result);
  // Detaches an ArrayBuffer made by CreateWindow; 0 or -errno.
  int64_t DetachWindow(napi_value buffer);

  // Detaches all of a mapping; 0 or -errno.
  int64_t DetachWindows(uint64_t handle);

  Engines& engines() { return engines_; }

  // A pipe of this environment for copies, empty; 0 or -errno.
  int64_t Pipe(int ends[2]);
  // Closes the pipe with whatever is in it.
  void DropPipe();

 private:
  static void CleanUp(void* self);
  static void EndRun(napi_env env, napi_value, void* self, void* run);
  void Detach(Window* window);
  // Runs our hook before all that were added so far; hooks run last in, first out.
  void MoveCleanUpFirst();

  napi_env env_;
  Command command_;
  napi_ref command_buffer_ = nullptr;
  std::vector<bool> fds_;
  std::vector<std::pair<int, uint64_t>> origins_;
  std::vector<Mapping*> mappings_;
  std::vector<uint32_t> free_handles_;
  std::vector<Vcpu*> vcpus_;  // by fd
  pid_t thread_ = 0;
  int interruptible_ = 0;  // the signal that this thread lets through
  napi_threadsafe_function ended_runs_ = nullptr;
  size_t expected_runs_ = 0;
  uint8_t* scratch_ = nullptr;
  int pipe_[2] = {-1, -1};
  Engines engines_;
};
