#include "copy.h"

#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

#include "direct_copy.h"

namespace {

// One transfer of the kernel ends at 2 GiB - 4 KiB anyway.
constexpr size_t kTransfer = size_t{1} << 30;
// What fits a pipe of default size, so that a write never blocks.
constexpr size_t kPipe = size_t{1} << 16;

#if defined(__aarch64__)
// For these bytes process_vm_readv would take a page from the protected guest that has it, and clear it.
constexpr size_t kDirect = 0;
std::atomic<bool> process_vm_works = false;
#else
// From here on touching the memory is faster than asking the kernel, the questions before it included.
constexpr size_t kDirect = size_t{1} << 12;
std::atomic<bool> process_vm_works = true;
#endif

size_t ToPageEnd(const uint8_t* address) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return page - reinterpret_cast<uintptr_t>(address) % page;
}

// The kernel copies from this process to this process: it looks up the pages of the source and faults on neither side.
int64_t ProcessVmCopy(uint8_t* target, const uint8_t* source, size_t size) {
  size_t done = 0;
  while (done < size) {
    const size_t length = std::min(size - done, kTransfer);
    const iovec local = {target + done, length};
    const iovec remote = {const_cast<uint8_t*>(source) + done, length};
    const ssize_t copied = process_vm_readv(getpid(), &local, 1, &remote, 1, 0);
    if (copied <= 0) return done > 0 ? static_cast<int64_t>(done) : copied < 0 ? -errno : -EFAULT;
    done += static_cast<size_t>(copied);
  }
  return static_cast<int64_t>(done);
}

// write(2) to a pipe and read(2) back, which answer EFAULT too; bytes copied, or -errno.
int64_t PassThroughPipe(Environment& environment, uint8_t* target, const uint8_t* source, size_t size) {
  int ends[2];
  const int64_t opened = environment.Pipe(ends);
  if (opened < 0) return opened;
  const ssize_t written = write(ends[1], source, size);
  if (written < 0) return -errno;
  size_t done = 0;
  while (done < static_cast<size_t>(written)) {
    const ssize_t got = read(ends[0], target + done, static_cast<size_t>(written) - done);
    if (got <= 0) {
      const int64_t error = -errno;
      environment.DropPipe();
      return done > 0 ? static_cast<int64_t>(done) : error;
    }
    done += static_cast<size_t>(got);
  }
  return static_cast<int64_t>(done);
}

// Where process_vm_readv is not built in or not allowed, or not wanted.
int64_t PipeCopy(Environment& environment, uint8_t* target, const uint8_t* source, size_t size) {
  size_t done = 0;
  while (done < size) {
    int64_t copied = PassThroughPipe(environment, target + done, source + done, std::min(size - done, kPipe));
    // A pipe takes nothing of a piece that faults anywhere: try what comes before the next page of either side.
    if (copied <= 0) {
      const size_t piece = std::min(ToPageEnd(target + done), ToPageEnd(source + done));
      if (piece < size - done) copied = PassThroughPipe(environment, target + done, source + done, piece);
    }
    if (copied <= 0) return done > 0 ? static_cast<int64_t>(done) : copied;
    done += static_cast<size_t>(copied);
  }
  return static_cast<int64_t>(done);
}

int64_t KernelCopy(Environment& environment, uint8_t* target, const uint8_t* source, size_t size) {
  if (process_vm_works) {
    const int64_t copied = ProcessVmCopy(target, source, size);
    if (copied != -ENOSYS && copied != -EPERM) return copied;
    process_vm_works = false;
  }
  return PipeCopy(environment, target, source, size);
}

int64_t CopyApart(Environment& environment, uint8_t* target, const uint8_t* source, size_t size) {
  if (size < kDirect) {
    const int64_t copied = KernelCopy(environment, target, source, size);
    // The kernel does not reach secret memory for anybody; its process does.
    if (copied != -EFAULT) return copied;
  }
  const std::optional<size_t> done = DirectCopy(target, source, size);
  if (!done) return KernelCopy(environment, target, source, size);
  return *done > 0 || size == 0 ? static_cast<int64_t>(*done) : -EFAULT;
}

bool Overlap(const uint8_t* a, const uint8_t* b, size_t size) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(a);
  const uintptr_t second = reinterpret_cast<uintptr_t>(b);
  return first < second + size && second < first + size;
}

}  // namespace

int64_t GuardedCopy(Environment& environment, uint8_t* target, const uint8_t* source, size_t size) {
  if (!Overlap(target, source, size)) return CopyApart(environment, target, source, size);
  // A window given as the buffer of a copy of its own mapping: none of the ways above keeps an order.
  const std::unique_ptr<uint8_t[]> apart(new (std::nothrow) uint8_t[size]);
  if (apart == nullptr) return -ENOMEM;
  const int64_t copied = CopyApart(environment, apart.get(), source, size);
  return copied < 0 ? copied : CopyApart(environment, target, apart.get(), static_cast<size_t>(copied));
}
