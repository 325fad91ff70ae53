#include "core_counts.h"

#include <algorithm>
#include <functional>
#include <vector>

#include "shared_ffn.h"

namespace partinfer {

void count_core_neurons(const Kernels& kernels, Type type, const char* h, int64_t tokens, int64_t neurons,
                        double token_sparsity, int64_t* counts, int threads) {
  std::fill(counts, counts + neurons, 0);
  const int64_t row_bytes = neurons * element_size(type);
  const int useful = useful_threads(tokens * row_bytes, threads);
  const std::vector<int32_t> none(static_cast<size_t>(neurons));
  std::vector<std::vector<int32_t>> parts(static_cast<size_t>(useful), none);
  std::vector<int64_t> positives(static_cast<size_t>(useful));
  parallel(useful, [&](int worker, int workers) {
    const int computing = std::min(useful, workers);
    const Range mine = worker < computing ? share(tokens, 1, worker, computing) : Range{0, 0};
    if (mine.begin < mine.end)
      positives[size_t(worker)] =
          kernels.count_positive(type, h + mine.begin * row_bytes, (mine.end - mine.begin) * neurons);
    wait_for_all(workers);
    int64_t all = 0;
    for (int64_t part : positives) all += part;
    const int64_t k = std::min(neurons, int64_t(token_sparsity * double(all) / double(tokens)));
    if (mine.begin == mine.end || k < 1) return;
    std::vector<uint32_t> space(static_cast<size_t>(neurons));
    for (int64_t t = mine.begin; t < mine.end; ++t)
      kernels.mark_largest(type, h + t * row_bytes, neurons, k, space.data(), parts[size_t(worker)].data());
  });
  for (const auto& part : parts)
    for (int64_t i = 0; i < neurons; ++i) counts[i] += part[size_t(i)];
}

void choose_most_marked(const int64_t* counts, const int64_t* priority, int64_t neurons, int64_t first, int64_t wanted,
                        int32_t* chosen) {
  if (wanted == 0) return;
  const int64_t places = *std::max_element(priority, priority + neurons) + 1;
  const auto key = [&](int64_t i) { return counts[i] * places - priority[i]; };
  std::vector<int64_t> keys;
  keys.reserve(size_t(neurons - first));
  for (int64_t i = first; i < neurons; ++i) keys.push_back(key(i));
  std::nth_element(keys.begin(), keys.begin() + (wanted - 1), keys.end(), std::greater<int64_t>());
  const int64_t least = keys[size_t(wanted - 1)];
  int64_t found = 0;
  for (int64_t i = first; i < neurons && found < wanted; ++i)
    if (key(i) >= least) chosen[found++] = int32_t(i);
}

}  // namespace partinfer
