#include "typical_size.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "shared_ffn.h"

namespace partinfer {

void sum_squares(const Kernels& kernels, Type type, const char* values, int64_t tokens, int64_t neurons, float* sums,
                 int threads) {
  const int useful = useful_threads(tokens * neurons * element_size(type), threads);
  parallel(useful, [&](int worker, int workers) {
    const int computing = std::min(useful, workers);
    if (worker >= computing) return;
    const Range mine = share(neurons, COLUMN_BLOCK, worker, computing);
    std::fill(sums + mine.begin, sums + mine.end, 0.0f);
    kernels.add_squares(type, values + mine.begin * element_size(type), tokens, neurons, mine.end - mine.begin,
                        sums + mine.begin);
  });
}

void typical_scale(const float* sums, int64_t tokens, const float* prior, int64_t prior_tokens, const float* norms,
                   int64_t neurons, float* scale) {
  const float part = 1.0f / float(double(tokens) + double(prior_tokens)), prior_part = float(prior_tokens) * part;
  if (prior != nullptr) {
    for (int64_t i = 0; i < neurons; ++i)
      scale[i] = std::sqrt(sums[i] * part + prior[i] * prior[i] * prior_part) * norms[i];
    return;
  }
  const double all = std::accumulate(sums, sums + neurons, 0.0);
  const float added = float(all / std::max(double(neurons) * double(tokens), 1.0)) * prior_part;
  for (int64_t i = 0; i < neurons; ++i) scale[i] = std::sqrt(sums[i] * part + added) * norms[i];
}

}  // namespace partinfer
