// The typical size of each neuron's product over a prompt's tokens, and what a unit of the other product is worth because of it.
#pragma once

#include "types.h"

namespace partinfer {

// sums[i] = sum over the tokens of values[t][i]^2; values [tokens, neurons]. sums [neurons] is overwritten.
void sum_squares(const Kernels& kernels, Type type, const char* values, int64_t tokens, int64_t neurons, float* sums,
                 int threads);

// scale[i] = sqrt((sums[i] + c prior[i]^2) / (tokens + c)) * norms[i], all [neurons], c = prior_tokens. Without a prior (null) the
// mean of sums / tokens takes the place of its squares.
void typical_scale(const float* sums, int64_t tokens, const float* prior, int64_t prior_tokens, const float* norms,
                   int64_t neurons, float* scale);

}  // namespace partinfer
