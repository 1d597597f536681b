// Every native function by the kind of fd it works on. Each is documented where it is defined, with the words of its
// command.

#pragma once

#include "command.h"
#include "environment.h"

// system.cc
int64_t Ioctl(const Command& command);
int64_t Open(Environment& environment, const char* path);
int64_t CreateVm(Environment& environment);

// vm.cc
int64_t SetUserMemoryRegion(const Command& command);
int64_t SetUserMemoryRegion2(const Command& command);
int64_t SetMemoryAttributes(const Command& command);
napi_value SetMemoryAttributesAsync(Environment& environment);
int64_t EnableCap(const Command& command);
int64_t GetDirtyLog(const Command& command, OptionalBytes bitmap);
int64_t ClearDirtyLog(const Command& command, OptionalBytes bitmap);

// guest_memfd.cc
int64_t CreateGuestMemfd(Environment& environment);

// file.cc
int64_t Fallocate(const Command& command);
napi_value FallocateAsync(Environment& environment);
int64_t Ftruncate(const Command& command);
int64_t Fstat(const Command& command);
int64_t Fstatfs(const Command& command);
int64_t Cachestat(const Command& command);
int64_t Fsync(const Command& command);
int64_t Read(const Command& command, Bytes target);
int64_t Write(const Command& command, Bytes source);
int64_t Pread(const Command& command, Bytes target);
int64_t Pwrite(const Command& command, Bytes source);
int64_t Lseek(const Command& command);
int64_t MemfdCreate(Environment& environment, const char* name);
int64_t Fcntl(const Command& command);
int64_t Poll(const Command& command);
int64_t EpollCreate1(Environment& environment);
int64_t EpollCtl(const Command& command);
int64_t Dup(Environment& environment);
int64_t Close(Environment& environment);

// mapping.cc
int64_t Mmap(Environment& environment);
int64_t Address(Environment& environment);
int64_t Mprotect(Environment& environment);
int64_t Madvise(Environment& environment);
napi_value MadviseAsync(Environment& environment);
int64_t Mlock(Environment& environment);
int64_t Munlock(Environment& environment);
int64_t Msync(Environment& environment);
int64_t Mbind(Environment& environment);
int64_t GetMempolicy(Environment& environment);
int64_t Mincore(Environment& environment, Bytes residency);
int64_t Userfaultfd(Environment& environment);
int64_t UffdioApi(const Command& command);
int64_t UffdioRegister(Environment& environment);
int64_t Peek(Environment& environment, Bytes target);
int64_t Poke(Environment& environment, Bytes source);
napi_value CreateWindow(Environment& environment);
int64_t DetachWindow(Environment& environment, napi_value buffer);
int64_t Munmap(Environment& environment);
