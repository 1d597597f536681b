// Copies by touching the memory, as fast as memcpy: a fault ends the copy, not the process.

#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

// Bytes copied, from the start. Less than `size` means a fault there; nothing at all, that this process does not let us
// catch one: then ask the kernel.
std::optional<size_t> DirectCopy(uint8_t* target, const uint8_t* source, size_t size);
