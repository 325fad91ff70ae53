#include "core_counts.h"

#include <algorithm>
#include <vector>

#include "shared_ffn.h"

namespace partinfer {

void count_core_neurons(const Kernels& kernels, Type type, const char* h, int64_t tokens, int64_t neurons, int64_t k,
                        int64_t* counts, int threads) {
  const int64_t row_bytes = neurons * element_size(type);
  const int useful = useful_threads(tokens * row_bytes, threads);
  const std::vector<int32_t> none(static_cast<size_t>(neurons));
  std::vector<std::vector<int32_t>> parts(static_cast<size_t>(useful), none);
  parallel(useful, [&](int worker, int workers) {
    const int computing = std::min(useful, workers);
    std::vector<uint32_t> space(static_cast<size_t>(neurons));
    for (int64_t t = worker; worker < computing && t < tokens; t += computing)
      kernels.mark_largest(type, h + t * row_bytes, neurons, k, space.data(), parts[size_t(worker)].data());
  });
  std::fill(counts, counts + neurons, 0);
  for (const auto& part : parts)
    for (int64_t i = 0; i < neurons; ++i) counts[i] += part[size_t(i)];
}

}  // namespace partinfer
