// The module: one JavaScript function per native function, each with its environment as callback data.

#include <napi.h>
#include <unistd.h>

#include "calls.h"

namespace {

Napi::Object Init(Napi::Env env, Napi::Object exports) {
  Environment* environment = new Environment(env);
  env.SetInstanceData<Environment>(environment);
  for (const Functions& functions :
       {kSystem, kVm, kVcpu, kStruct, kGuestMemfd, kFile, kMapping, kShare, kSocket, kUnicorn}) {
    for (const Function& function : functions) {
      napi_value value = nullptr;
      napi_create_function(env, function.name, NAPI_AUTO_LENGTH, function.callback, environment, &value);
      exports.Set(function.name, value);
    }
  }
  exports.Set("command", environment->CommandBuffer());
  exports.Set("pageSize", Napi::Number::New(env, static_cast<double>(sysconf(_SC_PAGESIZE))));
  return exports;
}

}  // namespace

NODE_API_MODULE(NODE_GYP_MODULE_NAME, Init)
