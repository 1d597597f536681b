// Copies by touching the memory, as fast as memcpy: a fault ends the copy, not the process.

#pragma once

#include <cstddef>
#include <cstdint>

// Bytes copied, from the start. Less than `size` means a fault there, or that this process does not let us catch one;
// either way, ask the kernel about the rest.
size_t DirectCopy(uint8_t* target, const uint8_t* source, size_t size);
