// A linear layer whose weight is stored by input, for one token that reads only the inputs that matter.
#pragma once

#include "threads.h"

namespace partinfer {

// out [outputs] = constant + the sum of (x - mean) * row over the inputs with |x - mean| * norm > threshold, whose number
// is returned.
int64_t run_by_input(const Kernels& kernels, const ByInput& layer, const char* x, Type x_type, float* out, int threads);

}  // namespace partinfer
