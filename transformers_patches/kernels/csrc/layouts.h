// An 8-bit weight from one layout to the other: rows of bytes, and planes.
#pragma once

#include "types.h"

namespace partinfer {

// values: int8 [rows, hidden], `stride` bytes from row to row, in both.
void split_rows(const int8_t* values, int64_t stride, int64_t rows, int64_t hidden, char* high, char* low, int64_t row_bytes);
void run_join(const Kernels& kernels, const Planes& planes, int64_t rows, int64_t hidden, int8_t* out, int64_t stride,
              int threads);

}  // namespace partinfer
