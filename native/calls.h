// The native functions, by the kind of file descriptor they work on.

#pragma once

#include "invoke.h"

extern const Functions kSystem;      // system.cc: /dev/kvm
extern const Functions kVm;          // vm.cc
extern const Functions kVcpu;        // vcpu.cc
extern const Functions kStruct;      // struct.cc
extern const Functions kGuestMemfd;  // guest_memfd.cc
extern const Functions kFile;        // file.cc
extern const Functions kMapping;     // mapping.cc
extern const Functions kShare;       // share.cc
extern const Functions kSocket;      // socket.cc
extern const Functions kUnicorn;     // unicorn.cc
