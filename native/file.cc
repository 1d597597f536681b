// Calls on any file descriptor.

#include <fcntl.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "calls.h"
#include "job.h"
#include "share.h"
#include "syscall.h"
#include "uapi.h"

namespace {

// fallocate(2). command: [fd, mode, offset, length]
int64_t Fallocate(const Command& command) {
  return Syscall(SYS_fallocate, command.i32(0), command.i32(1), command.i64(2), command.i64(3));
}

// The same on a thread of its own.
napi_value FallocateAsync(Environment& environment) {
  return StartOnFile(environment, environment.command().i32(0), 1, [](const Job& job) {
    return Syscall(SYS_fallocate, job.fd, static_cast<int>(job.words[0]), static_cast<int64_t>(job.words[1]),
                   static_cast<int64_t>(job.words[2]));
  });
}

// ftruncate(2). command: [fd, length]
int64_t Ftruncate(const Command& command) { return Syscall(SYS_ftruncate, command.i32(0), command.i64(1)); }

// fstat(2). command: [fd]; then words: [mode, size, blocks, blksize, ino, nlink]. statx(2), because the fstat of a new
// glibc is a symbol that older ones lack.
int64_t Fstat(const Command& command) {
  struct statx status;
  const int64_t result = Syscall(SYS_statx, command.i32(0), "", AT_EMPTY_PATH, STATX_BASIC_STATS, &status);
  if (result < 0) return result;
  command.Set(0, status.stx_mode);
  command.Set(1, status.stx_size);
  command.Set(2, status.stx_blocks);
  command.Set(3, status.stx_blksize);
  command.Set(4, status.stx_ino);
  command.Set(5, status.stx_nlink);
  return 0;
}

// fstatfs(2). command: [fd]; then words: [type, bsize]
int64_t Fstatfs(const Command& command) {
  struct statfs status;
  const int64_t result = Syscall(SYS_fstatfs, command.i32(0), &status);
  if (result < 0) return result;
  command.Set(0, static_cast<uint64_t>(status.f_type));
  command.Set(1, static_cast<uint64_t>(status.f_bsize));
  return 0;
}

// cachestat(2). command: [fd, offset, length]; then words: [cache, dirty, writeback, evicted, recently evicted]
int64_t Cachestat(const Command& command) {
  uapi::CachestatRange range = {command.u64(1), command.u64(2)};
  uapi::Cachestat status = {};
  const int64_t result = Syscall(uapi::kSysCachestat, command.i32(0), &range, &status, 0);
  if (result < 0) return result;
  command.Set(0, status.nr_cache);
  command.Set(1, status.nr_dirty);
  command.Set(2, status.nr_writeback);
  command.Set(3, status.nr_evicted);
  command.Set(4, status.nr_recently_evicted);
  return 0;
}

// fsync(2). command: [fd]
int64_t Fsync(const Command& command) { return Syscall(SYS_fsync, command.i32(0)); }

// read(2). command: [fd]
int64_t Read(const Command& command, Bytes target) {
  return Syscall(SYS_read, command.i32(0), target.data, target.size);
}

// write(2). command: [fd]
int64_t Write(const Command& command, Bytes source) {
  return Syscall(SYS_write, command.i32(0), source.data, source.size);
}

// pread(2). command: [fd, offset]
int64_t Pread(const Command& command, Bytes target) {
  return Syscall(SYS_pread64, command.i32(0), target.data, target.size, command.i64(1));
}

// pwrite(2). command: [fd, offset]
int64_t Pwrite(const Command& command, Bytes source) {
  return Syscall(SYS_pwrite64, command.i32(0), source.data, source.size, command.i64(1));
}

// lseek(2). command: [fd, offset, whence]
int64_t Lseek(const Command& command) { return Syscall(SYS_lseek, command.i32(0), command.i64(1), command.i32(2)); }

// memfd_create(2). command: [flags]
int64_t MemfdCreate(Environment& environment, const char* name) {
  return environment.Own(Syscall(uapi::kSysMemfdCreate, name, environment.command().u32(0)));
}

// memfd_secret(2). command: [flags]
int64_t MemfdSecret(Environment& environment) {
  return environment.Own(Syscall(uapi::kSysMemfdSecret, environment.command().u32(0)));
}

// fcntl(2). command: [fd, cmd, argument]
int64_t Fcntl(const Command& command) {
  return Syscall(SYS_fcntl, command.i32(0), command.i32(1), static_cast<unsigned long>(command.u64(2)));
}

// poll(2) of one fd, without waiting. command: [fd, events]
int64_t Poll(const Command& command) {
  pollfd entry = {command.i32(0), static_cast<int16_t>(command.i32(1)), 0};
  return poll(&entry, 1, 0) < 0 ? -errno : static_cast<uint16_t>(entry.revents);
}

// epoll_create1(2). command: [flags]
int64_t EpollCreate1(Environment& environment) {
  return environment.Own(Syscall(SYS_epoll_create1, environment.command().i32(0)));
}

// epoll_ctl(2). command: [epoll, op, fd, events]
int64_t EpollCtl(const Command& command) {
  epoll_event event = {};
  event.events = command.u32(3);
  return Syscall(SYS_epoll_ctl, command.i32(0), command.i32(1), command.i32(2), &event);
}

// dup(2), close-on-exec. command: [fd]
int64_t Dup(Environment& environment) {
  return environment.Own(Syscall(SYS_fcntl, environment.command().i32(0), F_DUPFD_CLOEXEC, 0));
}

// Takes over an fd that is open but was not opened here; close-on-exec from now on. command: [fd]
int64_t Adopt(Environment& environment) {
  const int fd = environment.command().i32(0);
  const int64_t result = Syscall(SYS_fcntl, fd, F_SETFD, FD_CLOEXEC);
  return result < 0 ? result : environment.Own(fd);
}

// eventfd2(2). command: [initval, flags]
int64_t Eventfd(Environment& environment) {
  const Command& command = environment.command();
  return environment.Own(Syscall(SYS_eventfd2, command.u32(0), command.i32(1)));
}

// close(2) of an fd this environment opened; of any other: EBADF. A run of a vCPU ends before its fd does. command:
// [fd]
int64_t Close(Environment& environment) {
  const int fd = environment.command().i32(0);
  if (!environment.Disown(fd)) return -EBADF;
  environment.RemoveVcpu(fd);
  Shares::Get().WithdrawFile(&environment, fd);
  return Syscall(SYS_close, fd);
}

constexpr Function kTable[] = {
    {"fallocate", Invoke<Fallocate>},
    {"fallocateAsync", Invoke<FallocateAsync>},
    {"ftruncate", Invoke<Ftruncate>},
    {"fstat", Invoke<Fstat>},
    {"fstatfs", Invoke<Fstatfs>},
    {"cachestat", Invoke<Cachestat>},
    {"fsync", Invoke<Fsync>},
    {"read", Invoke<Read>},
    {"write", Invoke<Write>},
    {"pread", Invoke<Pread>},
    {"pwrite", Invoke<Pwrite>},
    {"lseek", Invoke<Lseek>},
    {"memfdCreate", Invoke<MemfdCreate>},
    {"memfdSecret", Invoke<MemfdSecret>},
    {"fcntl", Invoke<Fcntl>},
    {"poll", Invoke<Poll>},
    {"epollCreate1", Invoke<EpollCreate1>},
    {"epollCtl", Invoke<EpollCtl>},
    {"eventfd", Invoke<Eventfd>},
    {"dup", Invoke<Dup>},
    {"adopt", Invoke<Adopt>},
    {"close", Invoke<Close>},
};

}  // namespace

const Functions kFile = kTable;
