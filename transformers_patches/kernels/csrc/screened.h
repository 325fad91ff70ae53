// A linear layer with many outputs of which few matter: the output projection. A coarse weight of 4 bits gives all of
// them roughly, and what may be large is computed again with the exact weight (after SVD-softmax, Shim et al. 2017).
#pragma once

#include "layer.h"

namespace partinfer {

// x [tokens, hidden] -> out [tokens, rows] of x's type.
struct ScreenedCall {
  Planes planes;                   // the high plane is the coarse weight; both are the exact one,
  Matrix whole;                    // unless this is it, in one of the float types
  Type whole_type = Type::F32;
  const float* errors = nullptr;   // [hidden / 32]: mean square error of the coarse weights in a group of columns
  // Above 0: only so many of the largest outputs have to be right. Else the softmax of all of them divided by the
  // temperature, up to `tolerance`: the KL divergence from the exact one, in nats, that is expected from `errors`.
  int64_t wanted = 0;
  float tolerance = 0.0f, temperature = 1.0f;
  int64_t rows = 0;
  const char* x = nullptr;
  Type x_type = Type::F32;
  int64_t tokens = 0, hidden = 0;
  char* out = nullptr;
  int64_t* exact = nullptr;  // [tokens]: how many rows were computed with the exact weight
};

void run_screened(const Kernels& kernels, const ScreenedCall& call, int threads);

}  // namespace partinfer
