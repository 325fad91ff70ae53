// How fast this machine reads memory, and pages that make it faster.
#pragma once

#include "types.h"

namespace partinfer {

// Reads the bytes once with `threads` threads; returns the seconds it took.
double timed_read(const Kernels& kernels, const char* data, int64_t bytes, int threads);

// Asks for huge pages for the whole ones inside a buffer. Returns false where the system has none to give.
bool advise_huge_pages(char* data, int64_t bytes);

}  // namespace partinfer
