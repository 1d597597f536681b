// A system call on a thread of libuv's pool, as a Promise of its result.

#pragma once

#include "environment.h"

struct Job {
  using Call = int64_t (*)(const Job&);

  Call call;
  int fd = -1;                 // a duplicate of its own, so the caller may close or reuse the number
  Mapping* mapping = nullptr;  // held, so the caller may unmap it
  uint64_t words[4] = {};
  int64_t result = 0;
  napi_async_work work = nullptr;
  napi_deferred deferred = nullptr;
};

// `words` are the command's words from `first` on.
napi_value StartOnFile(Environment& environment, int fd, size_t first, Job::Call call);
// Words of the job: address, length, then the rest of the command.
napi_value StartOnRange(Environment& environment, Job::Call call);
