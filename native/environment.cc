#include "environment.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

#include "interrupt.h"
#include "share.h"
#include "syscall.h"
#include "vcpu_run.h"

namespace {

size_t PageSize() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

// Runs once the backing store of a window is gone, on the thread of its environment.
void FinalizeWindow(napi_env env, void*, void* hint) {
  Window* window = static_cast<Window*>(hint);
  Mapping* mapping = window->mapping;
  if (window->buffer != nullptr) napi_delete_reference(env, window->buffer);
  Window* last = mapping->windows.back();
  mapping->windows[window->index] = last;
  last->index = window->index;
  mapping->windows.pop_back();
  delete window;
  Settle(mapping);
}

}  // namespace

void Memory::Release() {
  if (--references > 0) return;
  munmap(address, length);
  delete this;
}

void Settle(Mapping* mapping) {
  if (mapping->open || mapping->calls > 0) return;
  bool reachable = false;
  for (const Window* window : mapping->windows) reachable |= !window->detached;
  if (reachable) {
    // ArrayBuffer.prototype.transfer() has moved a window into an ArrayBuffer we do not know. It must not see the
    // memory any more, but a touch must not be a signal either: zero pages take the place until the backing store is
    // gone. Memory that another thread has is left to it.
    if (!mapping->blanked && mapping->memory->references == 1) {
      mmap(mapping->address, mapping->length, PROT_READ | PROT_WRITE,
           MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      mapping->blanked = true;
    }
    return;
  }
  if (mapping->mapped) {
    mapping->memory->Release();
    mapping->mapped = false;
  }
  if (mapping->windows.empty()) delete mapping;
}

Environment::Environment(napi_env env) : env_(env) {
  void* words = nullptr;
  napi_value buffer = nullptr;
  napi_create_arraybuffer(env, Command::kWords * sizeof(uint64_t), &words, &buffer);
  napi_create_reference(env, buffer, 1, &command_buffer_);
  command_ = Command(static_cast<uint64_t*>(words));
  napi_add_env_cleanup_hook(env, CleanUp, this);
}

napi_value Environment::CommandBuffer() const {
  napi_value buffer = nullptr;
  napi_get_reference_value(env_, command_buffer_, &buffer);
  return buffer;
}

// The environment ends: a worker was terminated, or the process exits. What is still open goes now.
void Environment::CleanUp(void* self) {
  Environment& environment = *static_cast<Environment*>(self);
  napi_handle_scope scope = nullptr;
  napi_open_handle_scope(environment.env_, &scope);
  for (size_t fd = 0; fd < environment.vcpus_.size(); fd++) environment.RemoveVcpu(static_cast<int>(fd));
  // Before the mappings: a VM that lives on in another thread must not show them to its guest.
  for (size_t fd = 0; fd < environment.fds_.size(); fd++) {
    if (environment.fds_[fd]) Shares::Get().WithdrawFile(&environment, static_cast<int>(fd));
  }
  for (size_t handle = 0; handle < environment.mappings_.size(); handle++) environment.RemoveMapping(handle);
  napi_close_handle_scope(environment.env_, scope);
  for (size_t fd = 0; fd < environment.fds_.size(); fd++) {
    if (environment.fds_[fd]) close(static_cast<int>(fd));
  }
  environment.fds_.clear();
  environment.DropPipe();
  if (environment.scratch_ != nullptr) munmap(environment.scratch_, kScratch + PageSize());
  environment.scratch_ = nullptr;
}

int64_t Environment::Own(int64_t fd) {
  if (fd < 0) return fd;
  const size_t index = static_cast<size_t>(fd);
  if (index >= fds_.size()) fds_.resize(index + 1);
  fds_[index] = true;
  return fd;
}

bool Environment::Disown(int fd) {
  const size_t index = static_cast<size_t>(fd);
  if (fd < 0 || index >= fds_.size() || !fds_[index]) return false;
  fds_[index] = false;
  for (size_t known = origins_.size(); known-- > 0;) {
    if (origins_[known].first == fd) origins_.erase(origins_.begin() + static_cast<ptrdiff_t>(known));
  }
  return true;
}

void Environment::SetOrigin(int fd, uint64_t number) { origins_.emplace_back(fd, number); }

uint64_t Environment::Origin(int fd) const {
  for (const auto& [taken, number] : origins_) {
    if (taken == fd) return number;
  }
  return 0;
}

// A call that could run JavaScript is refused once the thread is to end. This one cannot: nobody can put a Proxy behind
// Object.prototype.
bool Environment::IsStopping() const {
  napi_handle_scope scope = nullptr;
  napi_value object = nullptr;
  bool unused = false;
  napi_open_handle_scope(env_, &scope);
  const bool stopping =
      napi_create_object(env_, &object) != napi_ok || napi_has_named_property(env_, object, "0", &unused) != napi_ok;
  napi_close_handle_scope(env_, scope);
  return stopping;
}

int64_t Environment::AddMapping(Memory* memory) {
  Mapping* mapping = new Mapping(memory);
  if (free_handles_.empty()) {
    mappings_.push_back(mapping);
    return static_cast<int64_t>(mappings_.size() - 1);
  }
  const uint32_t handle = free_handles_.back();
  free_handles_.pop_back();
  mappings_[handle] = mapping;
  return handle;
}

uint8_t* Environment::Range(uint64_t handle, uint64_t offset, uint64_t length) const {
  const Mapping* mapping = FindMapping(handle);
  if (mapping == nullptr || offset > mapping->length || length > mapping->length - offset) return nullptr;
  return mapping->address + offset;
}

int64_t Environment::RemoveMapping(uint64_t handle) {
  Mapping* mapping = FindMapping(handle);
  if (mapping == nullptr) return -ENOMEM;
  mappings_[static_cast<size_t>(handle)] = nullptr;
  free_handles_.push_back(static_cast<uint32_t>(handle));
  const auto same = [=](const Mapping* other) { return other != nullptr && other->memory == mapping->memory; };
  if (mapping->memory->references == 1 || std::none_of(mappings_.begin(), mappings_.end(), same)) {
    Shares::Get().WithdrawMemory(this, mapping->memory);
  }
  CloseMapping(mapping);
  return 0;
}

void Environment::CloseMapping(Mapping* mapping) {
  // From the end, because a finalizer that runs at once puts the last window in its own place.
  for (size_t index = mapping->windows.size(); index-- > 0;) Detach(mapping->windows[index]);
  mapping->open = false;
  Settle(mapping);
}

void Environment::AddVcpu(Vcpu* vcpu) {
  const size_t index = static_cast<size_t>(vcpu->fd());
  if (index >= vcpus_.size()) vcpus_.resize(index + 1);
  vcpus_[index] = vcpu;
}

void Environment::RemoveVcpu(int fd) {
  Vcpu* vcpu = FindVcpu(fd);
  if (vcpu == nullptr) return;
  vcpus_[static_cast<size_t>(fd)] = nullptr;
  Mapping* page = vcpu->page();
  delete vcpu;
  CloseMapping(page);
}

pid_t Environment::RunnerThread() {
  if (thread_ == 0) thread_ = static_cast<pid_t>(Syscall(SYS_gettid));
  const int signal = InterruptSignal();
  if (interruptible_ != signal) AllowInterrupt(interruptible_ = signal);
  return thread_;
}

int64_t Environment::StartRun(Vcpu* vcpu, AsyncRun* run) {
  if (ended_runs_ == nullptr) {
    napi_value name = nullptr;
    napi_create_string_utf8(env_, "guest-memfd", NAPI_AUTO_LENGTH, &name);
    if (napi_create_threadsafe_function(env_, nullptr, nullptr, name, 0, 1, nullptr, nullptr, this, EndRun,
                                        &ended_runs_) != napi_ok) {
      return -EAGAIN;
    }
    napi_unref_threadsafe_function(env_, ended_runs_);
    // No thread may call it after its own hook.
    MoveCleanUpFirst();
  }
  const int64_t result = vcpu->Start(run, ended_runs_);
  if (result == 0 && expected_runs_++ == 0) napi_ref_threadsafe_function(env_, ended_runs_);
  return result;
}

// Without an env when the environment has ended: then the promise has no reader left.
void Environment::EndRun(napi_env env, napi_value, void* self, void* run) {
  AsyncRun* ended = static_cast<AsyncRun*>(run);
  if (env != nullptr) {
    Environment& environment = *static_cast<Environment*>(self);
    napi_value value = nullptr;
    if (napi_create_int64(env, ended->result, &value) == napi_ok) napi_resolve_deferred(env, ended->deferred, value);
    if (--environment.expected_runs_ == 0) napi_unref_threadsafe_function(env, environment.ended_runs_);
  }
  delete ended;
}

uint8_t* Environment::Scratch(size_t size) {
  if (scratch_ == nullptr) {
    void* memory = mmap(nullptr, kScratch + PageSize(), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return nullptr;
    scratch_ = static_cast<uint8_t*>(memory);
    mprotect(scratch_ + kScratch, PageSize(), PROT_NONE);
  }
  return scratch_ + kScratch - size;
}

int64_t Environment::CreateWindow(Mapping* mapping, uint8_t* data, size_t size, napi_value* result) {
  // V8 gives an empty buffer no address, so there would be nothing to detach.
  if (size == 0) return napi_create_arraybuffer(env_, 0, nullptr, result) == napi_ok ? 0 : -ENOMEM;

  Window* window = new Window{mapping, nullptr, data, size, mapping->windows.size(), false};
  mapping->windows.push_back(window);
  const napi_status status = napi_create_external_arraybuffer(env_, data, size, FinalizeWindow, window, result);
  if (status == napi_no_external_buffers_allowed) {
    FinalizeWindow(env_, data, window);
    return -EOPNOTSUPP;
  }
  if (status != napi_ok) {
    // Longer than this Node's longest buffer. Node has run the finalizer, or will.
    napi_value exception;
    napi_get_and_clear_last_exception(env_, &exception);
    return -EFBIG;
  }
  napi_create_reference(env_, *result, 0, &window->buffer);

  // Node detaches every external buffer when the environment ends. Our hook has to come before, to see which of them
  // had been moved away by then.
  MoveCleanUpFirst();
  return 0;
}

int64_t Environment::DetachWindows(uint64_t handle) {
  Mapping* mapping = FindMapping(handle);
  if (mapping == nullptr) return -ENOMEM;
  // From the end, because a finalizer that runs at once puts the last window in its own place.
  for (size_t index = mapping->windows.size(); index-- > 0;) Detach(mapping->windows[index]);
  return 0;
}

void Environment::MoveCleanUpFirst() {
  napi_remove_env_cleanup_hook(env_, CleanUp, this);
  napi_add_env_cleanup_hook(env_, CleanUp, this);
}

int64_t Environment::DetachWindow(napi_value buffer) {
  bool is_arraybuffer = false;
  void* data = nullptr;
  size_t size = 0;
  if (napi_is_arraybuffer(env_, buffer, &is_arraybuffer) != napi_ok || !is_arraybuffer) return -EINVAL;
  if (napi_get_arraybuffer_info(env_, buffer, &data, &size) != napi_ok) return -EINVAL;
  for (const Mapping* mapping : mappings_) {
    if (mapping == nullptr || data < mapping->address || data >= mapping->address + mapping->length) continue;
    for (Window* window : mapping->windows) {
      if (window->detached || window->data != data || window->size != size) continue;
      napi_value candidate = nullptr;
      bool same = false;
      napi_get_reference_value(env_, window->buffer, &candidate);
      if (candidate == nullptr || napi_strict_equals(env_, candidate, buffer, &same) != napi_ok || !same) continue;
      Detach(window);
      return 0;
    }
  }
  return -EINVAL;
}

// Sets `detached` only if it was us: a buffer that is detached already, or collected, may have given its memory to
// another.
void Environment::Detach(Window* window) {
  if (window->detached) return;
  napi_value buffer = nullptr;
  bool already = true;
  if (napi_get_reference_value(env_, window->buffer, &buffer) != napi_ok || buffer == nullptr) return;
  if (napi_is_detached_arraybuffer(env_, buffer, &already) != napi_ok || already) return;
  window->detached = true;  // before, because the finalizer may run at once, and deletes the window
  if (napi_detach_arraybuffer(env_, buffer) != napi_ok) window->detached = false;
}

int64_t Environment::Pipe(int ends[2]) {
  if (pipe_[0] < 0 && pipe2(pipe_, O_CLOEXEC | O_NONBLOCK) < 0) return -errno;
  ends[0] = pipe_[0];
  ends[1] = pipe_[1];
  return 0;
}

void Environment::DropPipe() {
  for (int& end : pipe_) {
    if (end >= 0) close(end);
    end = -1;
  }
}
