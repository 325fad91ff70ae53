// Attention of one token over the key-value cache, shared out over the threads.
#pragma once

#include "layer.h"

namespace partinfer {

// Every head over the cache, which holds the new token already: q [heads, head_dim] of the call's type -> out, float32.
// Every thread has some of the positions, for all heads.
void attend_all(const Kernels& kernels, const AttentionCall& call, const char* q, float* out, int threads);

}  // namespace partinfer
