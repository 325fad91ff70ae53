// How many tokens mark each neuron as one of their most active ones (CoreInfer's core neurons), and which of them are marked most.
#pragma once

#include "types.h"

namespace partinfer {

// h [tokens, neurons]; a token marks its k largest values above 0, of equal ones the first, k = floor(token_sparsity *
// values above 0 / tokens). counts [neurons] is overwritten.
void count_core_neurons(const Kernels& kernels, Type type, const char* h, int64_t tokens, int64_t neurons,
                        double token_sparsity, int64_t* counts, int threads);

// The `wanted` neurons from `first` on with the largest counts, of equal ones those with the lowest priority (each has its
// own, from 0 on), in order.
void choose_most_marked(const int64_t* counts, const int64_t* priority, int64_t neurons, int64_t first, int64_t wanted,
                        int32_t* chosen);

}  // namespace partinfer
