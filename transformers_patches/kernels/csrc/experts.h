// The experts of a mixture that a router chose for one token, in one pass over the rows of all of them.
#pragma once

#include "threads.h"

namespace partinfer {

struct Expert {
  int64_t neurons = 0;
  Matrix gate, up, down;                 // [neurons, hidden]
  const float* column_scales = nullptr;  // [hidden] or null, of quantised weights
  Vector gate_bias, up_bias;             // [neurons]
  const float* down_bias = nullptr;      // [hidden] or null
  const float* size = nullptr;           // [neurons] or null: all neurons are computed, else the best
};

// out = sum over the chosen experts of share * FFN(x). x, out: [hidden]. With CLAMPED_SILU, up·x is cut off at -CLAMP and
// CLAMP, and 1 is added (gpt-oss).
struct ExpertsCall {
  Type type = Type::F32;
  Activation activation = Activation::SILU;
  int64_t neurons = 0, hidden = 0;  // neurons: of an expert at most
  const Expert* const* experts = nullptr;  // [count]
  const float* shares = nullptr;           // [count]
  int64_t count = 0;
  int64_t keep = -1;  // of an expert with `size`: its `keep` neurons with the largest |up·x| * size are computed
  const char* x = nullptr;
  Type x_type = Type::F32;
  float* out = nullptr;
};

// Returns how many neurons were computed.
int64_t run_experts(const Kernels& kernels, const ExpertsCall& call, int threads);

}  // namespace partinfer
