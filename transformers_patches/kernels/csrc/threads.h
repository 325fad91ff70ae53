// Shares one call out over the threads of torch's OpenMP pool.
#pragma once

#include "fetch.h"
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

// A linear layer stored by input, of which a token reads the inputs that matter; see by_input.h. No inputs: there is none.
struct ByInput {
  Type type = Type::F32;
  Matrix weight;                                 // [inputs, outputs]
  const float* column_scales = nullptr;          // [outputs] or null, of quantised weights
  const float *mean = nullptr, *norm = nullptr;  // [inputs]
  const float* constant = nullptr;               // [outputs]: the bias, and the product with the mean
  float threshold = -1.0f;                       // below 0: all inputs are read
  int64_t inputs = 0, outputs = 0;
};

// What one token has read of a layer.
struct Read {
  int64_t attention = 0, output = 0, ffn = 0;  // inputs of q, k and v; of o; of up
  int64_t neurons = 0, down = 0;               // rows of gate and of down
};

// For one token: keep the candidates whose |up·x| * size is largest, compute only those. Without `up` (plain FFN) it is
// |act(gate·x + bias)| * size. A neuron whose product is 0 adds nothing and is never kept.
struct ByUpCall {
  FfnCall ffn;
  const float* size = nullptr;  // [rows of the weights]
  int64_t keep = -1;            // how many; below 0: all whose product is above `threshold`
  float threshold = 0.0f;
  ByInput up;                         // in place of ffn.up; all neurons are candidates then
  const float* down_size = nullptr;   // [rows of the weights] or null
  float down_threshold = -1.0f;       // with down_size: rows of down with |h| * size above it are read
  Fetch* fetch = nullptr;             // gate and down are rows of this layer of it: units apart, numbered by it
  int64_t fetch_layer = 0;
};

void run_ffn(const Kernels& kernels, const FfnCall& call, int threads);
// out = h · down for all rows of down; call.x is h [tokens, rows], there are neither gate nor up.
void run_weighted_rows(const Kernels& kernels, const FfnCall& call, int threads);
void run_linear(const Kernels& kernels, const LinearCall& call, int threads);
// convert: one of the kernels' conversions.
void run_convert(void (*convert)(const ConvertTask&), const ConvertTask& task, int64_t rows, int threads);
// Products of one token's x, the same for all calls and at most 3, that wait for each other only once.
void run_linears(const Kernels& kernels, const LinearCall* calls, int count, int threads);
// Returns the number of neurons computed. read: also told, if it is there.
int64_t run_by_up(const Kernels& kernels, const ByUpCall& call, int threads, Read* read = nullptr);

}  // namespace partinfer
