// Which variants were compiled, which of them this processor can run, and which one is in use.
#pragma once

#include "types.h"

namespace partinfer {

constexpr int MAX_VARIANTS = 8;

// The variants that this processor runs, slowest first. Returns their number.
int usable_variants(const Kernels* (&variants)[MAX_VARIANTS]);

// Null if there is none of that name that this processor runs.
const Kernels* find_variant(const char* name);

const Kernels* fastest_variant();

}  // namespace partinfer
