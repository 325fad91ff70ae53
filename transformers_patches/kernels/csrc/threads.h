// Shares one call out over the threads of torch's OpenMP pool.
#pragma once

#include "types.h"

namespace partinfer {

struct ActiveRows {
  int64_t prefix = 0;
  const int32_t* index = nullptr;  // [count]
  int64_t count = 0;
};

// x [tokens, hidden] -> out [tokens, hidden] of x's type.
struct FfnCall {
  Type type = Type::F32;
  Matrix gate, up, down;
  const float* column_scales = nullptr;  // [hidden] or null, of quantised weights: what the columns of `down` are multiplied with
  Vector gate_bias, up_bias;
  Activation activation = Activation::SILU;
  ActiveRows rows;
  const char* x = nullptr;
  Type x_type = Type::F32;
  int64_t tokens = 0, hidden = 0;
  char* out = nullptr;
};

// x [tokens, hidden] -> out [tokens, rows] of x's type.
struct LinearCall {
  Type type = Type::F32;
  Matrix weight;
  Vector bias;
  int64_t rows = 0;
  const char* x = nullptr;
  Type x_type = Type::F32;
  int64_t tokens = 0, hidden = 0;
  char* out = nullptr;
};

// For one token: keep the candidates whose |up·x| * size is largest, compute only those. Without `up` (plain FFN) it is
// |act(gate·x + bias)| * size. A neuron whose product is 0 adds nothing and is never kept.
struct ByUpCall {
  FfnCall ffn;
  const float* size = nullptr;  // [rows of the weights]
  int64_t keep = -1;            // how many; below 0: all whose product is above `threshold`
  float threshold = 0.0f;
};

void run_ffn(const Kernels& kernels, const FfnCall& call, int threads);
// out = h · down for all rows of down; call.x is h [tokens, rows], there are neither gate nor up.
void run_weighted_rows(const Kernels& kernels, const FfnCall& call, int threads);
void run_linear(const Kernels& kernels, const LinearCall& call, int threads);
// convert: one of the kernels' conversions.
void run_convert(void (*convert)(const ConvertTask&), const ConvertTask& task, int64_t rows, int threads);
// Products of one token's x, the same for all calls and at most 3, that wait for each other only once.
void run_linears(const Kernels& kernels, const LinearCall* calls, int count, int threads);
// Returns the number of neurons computed.
int64_t run_by_up(const Kernels& kernels, const ByUpCall& call, int threads);

}  // namespace partinfer
