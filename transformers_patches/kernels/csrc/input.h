// The input vectors in the form that the kernels for one weight type want.
#pragma once

#include "scratch.h"
#include "types.h"

namespace partinfer {

// Upper bound for what prepare() takes from the scratch buffer.
size_t input_bytes(int64_t tokens, int64_t hidden);

// Tokens first … first + tokens - 1 of x [*, hidden].
Input prepare(const Kernels& kernels, Type weights, const char* x, Type x_type, int64_t first, int64_t tokens,
              int64_t hidden, Scratch& scratch);

// `count` floats from `values` on as float32: themselves, or a copy in the scratch buffer.
const float* as_float32(const Kernels& kernels, const char* values, Type type, int64_t count, Scratch& scratch);

}  // namespace partinfer
