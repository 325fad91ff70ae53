// The k largest of many non-negative floats.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace partinfer {

// Everything above `above`, and `ties` of those equal to it.
struct Cut {
  float above;
  int64_t ties;
};

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// Non-negative floats sort like their bits: a histogram of the upper bits finds the bucket of the k-th largest, and
// only that bucket, copied to `inside`, is searched. Several times faster than nth_element over all.
inline Cut cut_for(const std::vector<float>& values, int64_t k, std::vector<float>& inside) {
  constexpr int SHIFT = 20, BUCKETS = 1 << (31 - SHIFT);
  if (k <= 0) return {INFINITY, 0};
  if (k >= int64_t(values.size())) return {-1.0f, 0};
  int32_t counts[BUCKETS] = {};
  for (float value : values) ++counts[bits_of(value) >> SHIFT & (BUCKETS - 1)];
  int bucket = BUCKETS - 1;
  int64_t above = 0;
  while (above + counts[bucket] < k) above += counts[bucket--];
  inside.resize(size_t(counts[bucket]) + 1);  // one more, which values of other buckets are written to
  size_t found = 0;
  for (float value : values) {
    inside[found] = value;
    found += int(bits_of(value) >> SHIFT & (BUCKETS - 1)) == bucket;
  }
  inside.pop_back();
  const auto place = inside.begin() + (k - above - 1);
  std::nth_element(inside.begin(), place, inside.end(), [](float a, float b) { return a > b; });
  const float kth = *place;
  const int64_t larger = above + std::count_if(inside.begin(), inside.end(), [&](float v) { return v > kth; });
  return {kth, k - larger};
}

}  // namespace partinfer
