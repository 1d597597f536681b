// From JavaScript to a native function and back, as directly as Node-API allows: one call for the environment and the
// argument, one for the result.

#pragma once

#include <node_api.h>

#include <climits>
#include <cstring>

#include "environment.h"

inline napi_value ToValue(napi_env env, int64_t result) {
  napi_value value = nullptr;
  if (result == static_cast<int32_t>(result)) {
    napi_create_int32(env, static_cast<int32_t>(result), &value);
  } else {
    napi_create_double(env, static_cast<double>(result), &value);
  }
  return value;
}

inline napi_value ToValue(napi_env, napi_value result) { return result; }

// The argument of a call as the type its signature asks for, or the errno of a value that is none.
struct Path {
  char text[PATH_MAX + 1];
};

inline int64_t Convert(napi_env, napi_value value, napi_value* argument) {
  *argument = value;
  return 0;
}

inline int64_t Convert(napi_env env, napi_value value, Bytes* argument) {
  napi_typedarray_type type;
  void* data = nullptr;
  if (napi_get_typedarray_info(env, value, &type, &argument->size, &data, nullptr, nullptr) != napi_ok) return -EINVAL;
  argument->data = static_cast<uint8_t*>(data);
  return type == napi_uint8_array ? 0 : -EINVAL;
}

inline int64_t Convert(napi_env env, napi_value value, OptionalBytes* argument) {
  napi_valuetype type;
  if (napi_typeof(env, value, &type) == napi_ok && type == napi_null) return 0;
  return Convert(env, value, static_cast<Bytes*>(argument));
}

inline int64_t Convert(napi_env env, napi_value value, Path* argument) {
  size_t length = 0;
  if (napi_get_value_string_utf8(env, value, argument->text, sizeof argument->text, &length) != napi_ok) return -EINVAL;
  if (std::strlen(argument->text) != length) return -EINVAL;
  return length < PATH_MAX ? 0 : -ENAMETOOLONG;
}

inline Environment& EnvironmentOf(napi_env env, napi_callback_info info, napi_value* argument) {
  size_t count = argument == nullptr ? 0 : 1;
  void* data = nullptr;
  napi_get_cb_info(env, info, &count, argument, nullptr, &data);
  return *static_cast<Environment*>(data);
}

template <typename Argument, typename Call>
inline int64_t Apply(napi_env env, napi_callback_info info, Call call) {
  napi_value value = nullptr;
  Environment& environment = EnvironmentOf(env, info, &value);
  Argument argument;
  const int64_t refused = Convert(env, value, &argument);
  return refused < 0 ? refused : call(environment, argument);
}

// What each signature of a native function is called with.
inline int64_t Apply(napi_env env, napi_callback_info info, int64_t (*call)(const Command&)) {
  return call(EnvironmentOf(env, info, nullptr).command());
}

inline int64_t Apply(napi_env env, napi_callback_info info, int64_t (*call)(Environment&)) {
  return call(EnvironmentOf(env, info, nullptr));
}

inline napi_value Apply(napi_env env, napi_callback_info info, napi_value (*call)(Environment&)) {
  return call(EnvironmentOf(env, info, nullptr));
}

inline int64_t Apply(napi_env env, napi_callback_info info, int64_t (*call)(Environment&, napi_value)) {
  return Apply<napi_value>(env, info, call);
}

inline int64_t Apply(napi_env env, napi_callback_info info, int64_t (*call)(Environment&, Bytes)) {
  return Apply<Bytes>(env, info, call);
}

inline int64_t Apply(napi_env env, napi_callback_info info, int64_t (*call)(const Command&, Bytes)) {
  return Apply<Bytes>(env, info, [=](Environment& e, Bytes bytes) { return call(e.command(), bytes); });
}

inline int64_t Apply(napi_env env, napi_callback_info info, int64_t (*call)(const Command&, OptionalBytes)) {
  return Apply<OptionalBytes>(env, info, [=](Environment& e, OptionalBytes bytes) { return call(e.command(), bytes); });
}

inline int64_t Apply(napi_env env, napi_callback_info info, int64_t (*call)(Environment&, const char*)) {
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

// A table of native functions. Each file defines its functions and their table, so that a call is inlined into its
// callback.
struct Functions {
  const Function* first;
  size_t count;

  template <size_t size>
  constexpr Functions(const Function (&table)[size]) : first(table), count(size) {}
  const Function* begin() const { return first; }
  const Function* end() const { return first + count; }
};
