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

template <class T>
void mark(const T* h, int64_t neurons, int64_t k, std::vector<decltype(key_of(T()))>& keys, int64_t* counts) {
  keys.clear();
  for (int64_t i = 0; i < neurons; ++i)
    if (const auto key = key_of(h[i])) keys.push_back(key);
  if (int64_t(keys.size()) <= k) {
    for (int64_t i = 0; i < neurons; ++i) counts[i] += key_of(h[i]) != 0;
    return;
  }
  std::nth_element(keys.begin(), keys.begin() + (k - 1), keys.end(), std::greater<>());
  const auto least = keys[size_t(k - 1)];
  int64_t equal = k - std::count_if(keys.begin(), keys.begin() + k, [&](auto key) { return key > least; });
  for (int64_t i = 0; i < neurons; ++i) {
    const auto key = key_of(h[i]);
    if (key > least || (key == least && equal-- > 0)) ++counts[i];
  }
}

template <class T>
void count(const T* h, int64_t tokens, int64_t neurons, int64_t k, int64_t* counts, int threads) {
  const std::vector<int64_t> none(static_cast<size_t>(neurons));
  std::vector<std::vector<int64_t>> parts(static_cast<size_t>(threads), none);
  parallel(threads, [&](int worker, int workers) {
    std::vector<decltype(key_of(T()))> keys;
    keys.reserve(size_t(neurons));
    const int computing = std::min(threads, workers);
    for (int64_t t = worker; worker < computing && t < tokens; t += computing)
      mark(h + t * neurons, neurons, k, keys, parts[size_t(worker)].data());
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
