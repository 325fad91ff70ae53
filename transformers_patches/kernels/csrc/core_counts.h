// How many tokens mark each neuron as one of their k most active ones (CoreInfer's core neurons).
#pragma once

#include "types.h"

namespace partinfer {

// h [tokens, neurons]; only values above 0 are marked, at most k by a token, of equal ones the first. counts [neurons]
// is overwritten.
void count_core_neurons(const Kernels& kernels, Type type, const char* h, int64_t tokens, int64_t neurons, int64_t k,
                        int64_t* counts, int threads);

}  // namespace partinfer
