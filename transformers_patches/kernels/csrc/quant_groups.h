// How rows of int8 and int4 weights lie in memory: symmetric, one float16 scale per group of 32 columns.
//
// int8: one byte per column. int4: value + 8 in a nibble; byte k of a group's 16 holds column k (low) and column
// k + 16 (high).
#pragma once

#include "isa.h"

namespace partinfer {
namespace PARTINFER_ISA {

constexpr int64_t SCALE_BLOCK = 16;  // groups whose scales are worked out together

constexpr int32_t NO_SUM[LANES] = {};

template <int BITS>
struct Packing {
  static constexpr int GROUP_BYTES = BITS == 8 ? 32 : 16;
  static constexpr int PARTS = BITS == 8 ? 1 : 2;  // vectors that one vector of packed bytes unpacks to
};

// Scales of 16 groups, which are spread over the lanes that a group's bytes sum into: in a register where one holds all
// 16, else in memory.
#ifdef PARTINFER_SPREAD_FROM_REGISTER
using ScaleBlock = F;
inline void store_scales(ScaleBlock& block, int64_t, F value) { block = value; }
#else
struct ScaleBlock {
  alignas(64) float v[SCALE_BLOCK];
};
inline void store_scales(ScaleBlock& block, int64_t i, F value) { store(block.v + i, value); }
template <int GROUP_BYTES>
inline F spread_from(const ScaleBlock& block, int64_t first) {
  return spread<GROUP_BYTES>(block.v + first);
}
#endif

// The float16 scales of LANES groups from group g on as float32, `left` of which the row has, and zeros.
template <bool FULL>
inline F load_scales(const RowRef& row, int64_t g, int64_t left) {
  const f16_t* scales = reinterpret_cast<const f16_t*>(row.scales) + g;
  if (FULL || left >= LANES) return load(scales);
#ifdef PARTINFER_TAIL_OF_MORE
  if (g >= LANES && left > 0) return load_tail_of_more(scales, left);
#endif
  return left > 0 ? load_tail(scales, left) : zero();
}

template <int BITS>
inline I32 dot_part(I32 sum, I8 w, I8 x) {
  if constexpr (BITS == 8)
    return dot_s8(sum, w, x);
  else
    return dot_u4(sum, w, x);
}

template <int BITS>
inline void unpack(I8 packed, I8 (&parts)[Packing<BITS>::PARTS]) {
  if constexpr (BITS == 8) {
    parts[0] = packed;
  } else {
    parts[0] = low_nibbles(packed);
    parts[1] = high_nibbles(packed);
  }
}

// A vector of packed bytes, `left` of which belong to the row.
template <bool FULL>
inline I8 load_packed(const char* place, int64_t left) {
  return FULL || left >= BYTES ? load_bytes(place) : load_bytes_tail(place, left);
}

}  // namespace PARTINFER_ISA
}  // namespace partinfer
