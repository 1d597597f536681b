// The module: one JavaScript function per native function, each with its environment as callback data.

#include <napi.h>
#include <unistd.h>

#include <climits>
#include <cstring>

#include "calls.h"

namespace {

napi_value ToValue(napi_env env, int64_t result) {
  napi_value value = nullptr;
  if (result == static_cast<int32_t>(result)) {
    napi_create_int32(env, static_cast<int32_t>(result), &value);
  } else {
    napi_create_double(env, static_cast<double>(result), &value);
  }
  return value;
}

napi_value ToValue(napi_env, napi_value result) { return result; }

// The argument of a call as the type its signature asks for, or the errno of a value that is none.
struct Path {
  char text[PATH_MAX + 1];
};

int64_t Convert(napi_env, napi_value value, napi_value* argument) {
  *argument = value;
  return 0;
}

int64_t Convert(napi_env env, napi_value value, Bytes* argument) {
  napi_typedarray_type type;
  void* data = nullptr;
  if (napi_get_typedarray_info(env, value, &type, &argument->size, &data, nullptr, nullptr) != napi_ok) return -EINVAL;
  argument->data = static_cast<uint8_t*>(data);
  return type == napi_uint8_array ? 0 : -EINVAL;
}

int64_t Convert(napi_env env, napi_value value, OptionalBytes* argument) {
  napi_valuetype type;
  if (napi_typeof(env, value, &type) == napi_ok && type == napi_null) return 0;
  return Convert(env, value, static_cast<Bytes*>(argument));
}

int64_t Convert(napi_env env, napi_value value, Path* argument) {
  size_t length = 0;
  if (napi_get_value_string_utf8(env, value, argument->text, sizeof argument->text, &length) != napi_ok) return -EINVAL;
  if (std::strlen(argument->text) != length) return -EINVAL;
  return length < PATH_MAX ? 0 : -ENAMETOOLONG;
}

Environment& EnvironmentOf(napi_env env, napi_callback_info info, napi_value* argument) {
  size_t count = argument == nullptr ? 0 : 1;
  void* data = nullptr;
  napi_get_cb_info(env, info, &count, argument, nullptr, &data);
  return *static_cast<Environment*>(data);
}

template <typename Argument, typename Call>
int64_t Apply(napi_env env, napi_callback_info info, Call call) {
  napi_value value = nullptr;
  Environment& environment = EnvironmentOf(env, info, &value);
  Argument argument;
  const int64_t refused = Convert(env, value, &argument);
  return refused < 0 ? refused : call(environment, argument);
}

// What each signature of a native function is called with.
int64_t Apply(napi_env env, napi_callback_info info, int64_t (*call)(const Command&)) {
  return call(EnvironmentOf(env, info, nullptr).command());
}

int64_t Apply(napi_env env, napi_callback_info info, int64_t (*call)(Environment&)) {
  return call(EnvironmentOf(env, info, nullptr));
}

napi_value Apply(napi_env env, napi_callback_info info, napi_value (*call)(Environment&)) {
  return call(EnvironmentOf(env, info, nullptr));
}

int64_t Apply(napi_env env, napi_callback_info info, int64_t (*call)(Environment&, napi_value)) {
  return Apply<napi_value>(env, info, call);
}

int64_t Apply(napi_env env, napi_callback_info info, int64_t (*call)(Environment&, Bytes)) {
  return Apply<Bytes>(env, info, call);
}

int64_t Apply(napi_env env, napi_callback_info info, int64_t (*call)(const Command&, Bytes)) {
  return Apply<Bytes>(env, info, [=](Environment& e, Bytes bytes) { return call(e.command(), bytes); });
}

int64_t Apply(napi_env env, napi_callback_info info, int64_t (*call)(const Command&, OptionalBytes)) {
  return Apply<OptionalBytes>(env, info, [=](Environment& e, OptionalBytes bytes) { return call(e.command(), bytes); });
}

int64_t Apply(napi_env env, napi_callback_info info, int64_t (*call)(Environment&, const char*)) {
  return Apply<Path>(env, info, [=](Environment& e, const Path& path) { return call(e, path.text); });
}

template <auto Call>
napi_value Invoke(napi_env env, napi_callback_info info) {
  return ToValue(env, Apply(env, info, Call));
}

struct Function {
  const char* name;
  napi_callback callback;
};

constexpr Function kFunctions[] = {
    {"ioctl", Invoke<Ioctl>},
    {"open", Invoke<Open>},
    {"createVm", Invoke<CreateVm>},

    {"setUserMemoryRegion", Invoke<SetUserMemoryRegion>},
    {"setUserMemoryRegion2", Invoke<SetUserMemoryRegion2>},
    {"setMemoryAttributes", Invoke<SetMemoryAttributes>},
    {"setMemoryAttributesAsync", Invoke<SetMemoryAttributesAsync>},
    {"enableCap", Invoke<EnableCap>},
    {"getDirtyLog", Invoke<GetDirtyLog>},
    {"clearDirtyLog", Invoke<ClearDirtyLog>},
    {"createGuestMemfd", Invoke<CreateGuestMemfd>},

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
    {"fcntl", Invoke<Fcntl>},
    {"poll", Invoke<Poll>},
    {"epollCreate1", Invoke<EpollCreate1>},
    {"epollCtl", Invoke<EpollCtl>},
    {"dup", Invoke<Dup>},
    {"close", Invoke<Close>},

    {"mmap", Invoke<Mmap>},
    {"address", Invoke<Address>},
    {"mprotect", Invoke<Mprotect>},
    {"madvise", Invoke<Madvise>},
    {"madviseAsync", Invoke<MadviseAsync>},
    {"mlock", Invoke<Mlock>},
    {"munlock", Invoke<Munlock>},
    {"msync", Invoke<Msync>},
    {"mbind", Invoke<Mbind>},
    {"getMempolicy", Invoke<GetMempolicy>},
    {"mincore", Invoke<Mincore>},
    {"userfaultfd", Invoke<Userfaultfd>},
    {"uffdioApi", Invoke<UffdioApi>},
    {"uffdioRegister", Invoke<UffdioRegister>},
    {"peek", Invoke<Peek>},
    {"poke", Invoke<Poke>},
    {"window", Invoke<CreateWindow>},
    {"detach", Invoke<DetachWindow>},
    {"munmap", Invoke<Munmap>},
};

Napi::Object Init(Napi::Env env, Napi::Object exports) {
  Environment* environment = new Environment(env);
  env.SetInstanceData<Environment>(environment);
  for (const Function& function : kFunctions) {
    napi_value value = nullptr;
    napi_create_function(env, function.name, NAPI_AUTO_LENGTH, function.callback, environment, &value);
    exports.Set(function.name, value);
  }
  exports.Set("command", environment->CommandBuffer());
  exports.Set("pageSize", Napi::Number::New(env, static_cast<double>(sysconf(_SC_PAGESIZE))));
  return exports;
}

}  // namespace

NODE_API_MODULE(NODE_GYP_MODULE_NAME, Init)
