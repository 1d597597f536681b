#include "job.h"

#include <fcntl.h>
#include <unistd.h>

namespace {

void Execute(napi_env, void* data) {
  Job* job = static_cast<Job*>(data);
  job->result = job->call(*job);
}

// Also runs while the environment ends: then the promise has no reader left, and the rest still has to go.
void Complete(napi_env env, napi_status status, void* data) {
  Job* job = static_cast<Job*>(data);
  const int64_t result = status == napi_ok ? job->result : -ECANCELED;
  if (job->fd >= 0) close(job->fd);
  if (job->mapping != nullptr) {
    job->mapping->calls--;
    Settle(job->mapping);
  }
  napi_value value = nullptr;
  if (napi_create_int64(env, result, &value) == napi_ok) napi_resolve_deferred(env, job->deferred, value);
  if (job->work != nullptr) napi_delete_async_work(env, job->work);
  delete job;
}

napi_value Start(napi_env env, Job* job, int64_t refused) {
  napi_value promise = nullptr;
  napi_create_promise(env, &job->deferred, &promise);
  job->result = refused;
  if (refused == 0) {
    napi_value name = nullptr;
    napi_create_string_utf8(env, "guest-memfd", NAPI_AUTO_LENGTH, &name);
    if (napi_create_async_work(env, nullptr, name, Execute, Complete, job, &job->work) == napi_ok &&
        napi_queue_async_work(env, job->work) == napi_ok) {
      return promise;
    }
    job->result = -EAGAIN;
  }
  Complete(env, napi_ok, job);
  return promise;
}

}  // namespace

napi_value StartOnFile(Environment& environment, int fd, size_t first, Job::Call call) {
  Job* job = new Job{call};
  for (size_t index = 0; index < 4; index++) job->words[index] = environment.command().u64(first + index);
  job->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
  return Start(environment.env(), job, job->fd < 0 ? -errno : 0);
}

napi_value StartOnRange(Environment& environment, Job::Call call) {
  const Command& command = environment.command();
  Job* job = new Job{call};
  uint8_t* address = environment.Range(command.u64(0), command.u64(1), command.u64(2));
  if (address == nullptr) return Start(environment.env(), job, -ENOMEM);
  job->words[0] = reinterpret_cast<uintptr_t>(address);
  job->words[1] = command.u64(2);
  job->words[2] = command.u64(3);
  job->mapping = environment.FindMapping(command.u64(0));
  job->mapping->calls++;
  return Start(environment.env(), job, 0);
}
