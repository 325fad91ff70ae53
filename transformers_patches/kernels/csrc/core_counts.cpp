#include "core_counts.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <vector>

#include "shared_ffn.h"

namespace partinfer {
namespace {

// Bits of floats above 0 are ordered as the floats are; all others become 0.
inline uint32_t key_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return value > 0.0f ? bits : 0;
}
inline uint16_t key_of(bf16_t value) { return value.bits > 0x7f80u ? uint16_t(0) : value.bits; }
inline uint16_t key_of(f16_t value) { return value.bits > 0x7c00u ? uint16_t(0) : value.bits; }

// Marked are all keys above `above`, and the first `ties` of those equal to it.
template <class Key>
struct Threshold {
  Key above;
  int64_t ties;
};

// For keys of 15 bits: a histogram of the upper ten finds the bucket of the k-th largest, one of the lower five the key.
// Without branches on values, which no processor could foresee.
Threshold<uint16_t> threshold_of(const std::vector<uint16_t>& keys, int64_t k, std::vector<uint16_t>&) {
  constexpr int LOW = 5, BUCKETS = 1 << (15 - LOW), COPIES = 4;  // neighbours are often equal, and would wait
  int32_t counts[COPIES][BUCKETS] = {};
  for (size_t i = 0; i < keys.size(); ++i) ++counts[i % COPIES][keys[i] >> LOW];
  int bucket = BUCKETS;
  int64_t above = 0, inside = 0;
  while (bucket > 0 && above + inside < k) {
    above += inside;
    inside = 0;
    --bucket;
    for (const auto& copy : counts) inside += copy[bucket];
  }
  int32_t fine[1 << LOW] = {};
  for (uint16_t key : keys) fine[key & ((1 << LOW) - 1)] += key >> LOW == bucket;
  int low = (1 << LOW) - 1;
  while (low > 0 && above + fine[low] < k) above += fine[low--];
  const uint16_t kth = uint16_t(bucket << LOW | low);
  return {kth, kth == 0 ? 0 : k - above};
}

Threshold<uint32_t> threshold_of(const std::vector<uint32_t>& keys, int64_t k, std::vector<uint32_t>& positive) {
  positive.resize(keys.size() + 1);
  size_t count = 0;
  for (uint32_t key : keys) {
    positive[count] = key;
    count += key != 0;
  }
  if (int64_t(count) <= k) return {0, 0};
  std::nth_element(positive.begin(), positive.begin() + (k - 1), positive.begin() + int64_t(count), std::greater<>());
  const uint32_t kth = positive[size_t(k - 1)];
  return {kth, k - std::count_if(positive.begin(), positive.begin() + k, [&](uint32_t key) { return key > kth; })};
}

template <class T>
void count(const T* h, int64_t tokens, int64_t neurons, int64_t k, int64_t* counts, int threads) {
  using Key = decltype(key_of(T()));
  const std::vector<int32_t> none(static_cast<size_t>(neurons));
  std::vector<std::vector<int32_t>> parts(static_cast<size_t>(threads), none);
  parallel(threads, [&](int worker, int workers) {
    std::vector<Key> keys(static_cast<size_t>(neurons)), space;
    const int computing = std::min(threads, workers);
    for (int64_t t = worker; worker < computing && t < tokens; t += computing) {
      const T* values = h + t * neurons;
      int32_t* marks = parts[size_t(worker)].data();
      Key* key = keys.data();
#pragma omp simd
      for (int64_t i = 0; i < neurons; ++i) key[i] = key_of(values[i]);
      const Threshold<Key> threshold = threshold_of(keys, k, space);
#pragma omp simd
      for (int64_t i = 0; i < neurons; ++i) marks[i] += key[i] > threshold.above;
      int64_t ties = threshold.ties;
      for (int64_t i = 0; ties > 0 && i < neurons; ++i) {
        if (key[i] != threshold.above) continue;
        ++marks[i];
        --ties;
      }
    }
  });
  std::fill(counts, counts + neurons, 0);
  for (const auto& part : parts)
    for (int64_t i = 0; i < neurons; ++i) counts[i] += part[size_t(i)];
}

}  // namespace

void count_core_neurons(Type type, const char* h, int64_t tokens, int64_t neurons, int64_t k, int64_t* counts,
                        int threads) {
  switch (type) {
    case Type::BF16:
      return count(reinterpret_cast<const bf16_t*>(h), tokens, neurons, k, counts, threads);
    case Type::F16:
      return count(reinterpret_cast<const f16_t*>(h), tokens, neurons, k, counts, threads);
    default:
      return count(reinterpret_cast<const float*>(h), tokens, neurons, k, counts, threads);
  }
}

}  // namespace partinfer
