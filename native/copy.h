// Copies between memory that may fault at any byte, on either side.

#pragma once

#include "environment.h"

// Bytes copied, possibly short; -EFAULT if not even the first could be. A touch that would be SIGSEGV or SIGBUS ends
// the copy.
int64_t GuardedCopy(Environment& environment, uint8_t* target, const uint8_t* source, size_t size);
