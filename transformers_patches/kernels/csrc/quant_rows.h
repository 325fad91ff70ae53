// Products with rows of int8 and int4 weights: symmetric, one float16 scale per group of 32 columns.
//
// int8: one byte per column. int4: value + 8 in a nibble; byte k of a group's 16 holds column k (low) and column
// k + 16 (high). The input is int8 too, with its own scale per group, so that a group's product is an integer.
#pragma once

#include "isa.h"

namespace partinfer {
namespace PARTINFER_ISA {

constexpr int64_t SCALE_BLOCK = 16;  // groups whose scales are worked out together

template <int BITS>
struct Packing {
  static constexpr int GROUP_BYTES = BITS == 8 ? 32 : 16;
  static constexpr int PARTS = BITS == 8 ? 1 : 2;  // vectors that one vector of packed bytes unpacks to
};

// The float16 scales of up to 16 groups as float32, zeros behind them.
inline void load_scales(const uint16_t* scales, int64_t count, float* out) {
  const f16_t* p = reinterpret_cast<const f16_t*>(scales);
  for (int64_t g = 0; g < SCALE_BLOCK; g += LANES) {
    F value = zero();
    if (g + LANES <= count)
      value = load(p + g);
    else if (g < count)
      value = load_tail(p + g, count - g);
    store(out + g, value);
  }
}

// Scales of 16 groups, and what spreads some of them over the lanes that the groups' bytes sum into: from a register
// where one holds all 16, else from memory.
#ifdef PARTINFER_SPREAD_FROM_REGISTER
struct ScaleBlock {
  F v;
};
inline ScaleBlock scale_products(const float* a, const float* b) { return {mul(load(a), load(b))}; }
template <int GROUP_BYTES>
inline F spread(const ScaleBlock& scales, int64_t group) {
  return spread_from<GROUP_BYTES>(scales.v, int(group));
}
#else
struct ScaleBlock {
  alignas(64) float v[SCALE_BLOCK];
};
inline ScaleBlock scale_products(const float* a, const float* b) {
  ScaleBlock result;
  for (int64_t i = 0; i < SCALE_BLOCK; i += LANES) store(result.v + i, mul(load(a + i), load(b + i)));
  return result;
}
template <int GROUP_BYTES>
inline F spread(const ScaleBlock& scales, int64_t group) {
  return spread<GROUP_BYTES>(scales.v + group);
}
#endif

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

// `here` groups from group g on, added to acc. FULL: there are SCALE_BLOCK of them, which the compiler unrolls.
template <int BITS, int R, int T, bool FULL>
inline void dot_groups(const RowRef* rows, const RowRef* next, const Input& x, int64_t first, int64_t g, int64_t here,
                       F (&acc)[R][T]) {
  constexpr int GROUP_BYTES = Packing<BITS>::GROUP_BYTES, PARTS = Packing<BITS>::PARTS;
  const int64_t half = x.hidden / 2, start = g * GROUP_BYTES, bytes = (FULL ? SCALE_BLOCK : here) * GROUP_BYTES;
  ScaleBlock scales[R][T];
  PARTINFER_UNROLL
  for (int r = 0; r < R; ++r) {
    alignas(64) float own[SCALE_BLOCK];
    load_scales(rows[r].scales + g, FULL ? SCALE_BLOCK : here, own);
    PARTINFER_UNROLL
    for (int t = 0; t < T; ++t) scales[r][t] = scale_products(own, x.scales + (first + t) * x.scale_stride + g);
  }
  PARTINFER_UNROLL
  for (int64_t b = 0; b < bytes; b += BYTES) {
    if (b % 64 == 0) {
      PARTINFER_UNROLL
      for (int r = 0; r < R; ++r) prefetch(next[r].data + start + b);
    }
    I8 xv[T][PARTS];
    I32 offset[T];
    PARTINFER_UNROLL
    for (int t = 0; t < T; ++t) {
      const int8_t* xq = x.q + (first + t) * x.q_stride + start + b;
      PARTINFER_UNROLL
      for (int p = 0; p < PARTS; ++p) xv[t][p] = load_bytes(xq + p * half);
      offset[t] = load_i32(x.offsets + (first + t) * x.offset_stride + (start + b) / 4);
    }
    PARTINFER_UNROLL
    for (int r = 0; r < R; ++r) {
      I8 w[PARTS];
      unpack<BITS>(load_packed<FULL>(rows[r].data + start + b, bytes - b), w);
      PARTINFER_UNROLL
      for (int t = 0; t < T; ++t) {
        I32 sum = offset[t];
        PARTINFER_UNROLL
        for (int p = 0; p < PARTS; ++p) sum = dot_part<BITS>(sum, w[p], xv[t][p]);
        acc[r][t] = fma(to_float(sum), spread<GROUP_BYTES>(scales[r][t], b / GROUP_BYTES), acc[r][t]);
      }
    }
  }
}

// out[r][t] = rows[r] · x[first + t]
template <int BITS, int R, int T>
inline void quant_dot_block(const RowRef* rows, const RowRef* next, const Input& x, int64_t first, float (*out)[T]) {
  const int64_t groups = x.hidden / GROUP;
  F acc[R][T];
  PARTINFER_UNROLL
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) acc[r][t] = zero();
  int64_t g = 0;
  for (; g + SCALE_BLOCK <= groups; g += SCALE_BLOCK)
    dot_groups<BITS, R, T, true>(rows, next, x, first, g, SCALE_BLOCK, acc);
  if (g < groups) dot_groups<BITS, R, T, false>(rows, next, x, first, g, groups - g, acc);
  PARTINFER_UNROLL
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) out[r][t] = sum(acc[r][t]);
}

constexpr int QUAD = 4;           // rows whose bytes are taken side by side
constexpr int QUANT_ADD_ROWS = 16;  // rows whose sum is taken as integers, with one scale per group of columns

constexpr int32_t NO_OFFSET[LANES] = {};

// h[r] * scale[r][group] as int8 with a scale per group that is common to up to 16 rows.
struct Factors {
  alignas(64) int32_t packed[QUANT_ADD_ROWS / QUAD][SCALE_BLOCK];  // the int8 factors of four rows and a group
  alignas(64) int32_t offsets[SCALE_BLOCK];                        // what unsigned weights add too much
  alignas(64) float scales[SCALE_BLOCK];
};

// The factors of 16 groups from `scales[r]` on, `here` of which there are. No factor of a group may be above 127 of its
// scale, so that small ones lose most; llama.cpp's blocks of 32 activations do the same.
template <int BITS, int T>
inline void quantise_factors(const RowRef* rows, int quads, const float (*h)[T], int t, int64_t g, int64_t here,
                             Factors& out) {
  const I8 nothing = set_bytes(BITS == 8 ? 0 : 8);  // weights of 0 as they are stored
  for (int64_t i = 0; i < here; i += LANES) {
    F products[QUANT_ADD_ROWS], largest = set1(1e-30f);
    for (int r = 0; r < quads * QUAD; ++r) {
      products[r] = mul(load_part(reinterpret_cast<const f16_t*>(rows[r].scales) + g + i, here - i), set1(h[r][t]));
      largest = max_size(largest, products[r]);
    }
    const F inverse = divide(set1(127.0f), largest);
    I32 offset = load_i32(NO_OFFSET);
    for (int quad = 0; quad < quads; ++quad) {
      const F* four = products + quad * QUAD;
      const I8 packed = join_bytes(round_to_i32(mul(four[0], inverse)), round_to_i32(mul(four[1], inverse)),
                                   round_to_i32(mul(four[2], inverse)), round_to_i32(mul(four[3], inverse)));
      store_bytes(out.packed[quad] + i, packed);
      offset = dot_part<BITS>(offset, nothing, packed);
    }
    store(out.offsets + i, negative(offset));
    store(out.scales + i, mul(largest, set1(1.0f / 127.0f)));
  }
}

// `here` groups from group g on of some quads of rows, added to y. FULL: as above.
template <int BITS, int T, bool FULL>
inline void add_groups(const RowRef* rows, const RowRef* next, int quads, const float (*h)[T], float* y,
                       int64_t y_stride, int64_t g, int64_t here) {
  constexpr int GROUP_BYTES = Packing<BITS>::GROUP_BYTES, PARTS = Packing<BITS>::PARTS;
  const int64_t bytes = (FULL ? SCALE_BLOCK : here) * GROUP_BYTES, start = g * GROUP_BYTES;
  Factors factors[T];
  for (int t = 0; t < T; ++t)
    quantise_factors<BITS, T>(rows, quads, h, t, g, FULL ? SCALE_BLOCK : here, factors[t]);
  PARTINFER_UNROLL
  for (int64_t b = 0; b < bytes; b += BYTES) {
    I32 sums[T][PARTS][QUAD];
    PARTINFER_UNROLL
    for (int t = 0; t < T; ++t) {
      const I32 offset = spread<GROUP_BYTES>(factors[t].offsets + b / GROUP_BYTES);
      PARTINFER_UNROLL
      for (int p = 0; p < PARTS; ++p)
        for (int k = 0; k < QUAD; ++k) sums[t][p][k] = offset;
    }
    for (int quad = 0; quad < quads; ++quad) {
      I8 packed[QUAD], columns[QUAD], parts[QUAD][PARTS];
      PARTINFER_UNROLL
      for (int r = 0; r < QUAD; ++r) {
        if (b % 64 == 0) prefetch(next[quad * QUAD + r].data + start + b);
        packed[r] = load_packed<FULL>(rows[quad * QUAD + r].data + start + b, bytes - b);
      }
      interleave4(packed, columns);  // before unpacking, which makes it half the work for 4 bits
      PARTINFER_UNROLL
      for (int k = 0; k < QUAD; ++k) unpack<BITS>(columns[k], parts[k]);
      PARTINFER_UNROLL
      for (int t = 0; t < T; ++t) {
        const I8 c = spread_bytes<GROUP_BYTES>(factors[t].packed[quad] + b / GROUP_BYTES);
        PARTINFER_UNROLL
        for (int p = 0; p < PARTS; ++p)
          for (int k = 0; k < QUAD; ++k) sums[t][p][k] = dot_part<BITS>(sums[t][p][k], parts[k][p], c);
      }
    }
    PARTINFER_UNROLL
    for (int t = 0; t < T; ++t) {
      const F scale = spread<GROUP_BYTES>(factors[t].scales + b / GROUP_BYTES);
      float* place = y + t * y_stride + (start + b) * PARTS;
      PARTINFER_UNROLL
      for (int p = 0; p < PARTS; ++p)
        for (int k = 0; k < QUAD; ++k) {
          float* lanes = place + p * BYTES + k * LANES;
          store(lanes, fma(to_float(sums[t][p][k]), scale, load(lanes)));
        }
    }
  }
}

// y[t] += sum over up to 16 rows, a multiple of four, of h[r][t] * rows[r]. Columns are taken four rows at a time as
// integers, which needs the rows' bytes side by side; y keeps the order that this gives (finish_quant puts it right).
template <int BITS, int T>
inline void quant_add_rows(const RowRef* rows, const RowRef* next, int quads, const float (*h)[T], float* y,
                           int64_t y_stride, int64_t hidden) {
  const int64_t groups = hidden / GROUP;
  int64_t g = 0;
  for (; g + SCALE_BLOCK <= groups; g += SCALE_BLOCK)
    add_groups<BITS, T, true>(rows, next, quads, h, y, y_stride, g, SCALE_BLOCK);
  if (g < groups) add_groups<BITS, T, false>(rows, next, quads, h, y, y_stride, g, groups - g);
}

template <int BITS>
struct QuantRows {
  static constexpr bool RUNS = false;  // whether there is a dot_run: what unpacks leaves the prefetchers too little ahead

  template <int R, int T>
  static void dot(const RowRef* rows, const RowRef* next, const Input& x, int64_t first, float (*out)[T]) {
    // Besides the sums, T * PARTS input vectors and as many offsets want a register.
    constexpr int BLOCK = R * T <= MAX_ACCUMULATORS / 2 ? R : (MAX_ACCUMULATORS / 2 / T > 0 ? MAX_ACCUMULATORS / 2 / T : 1);
    for (int r = 0; r < R; r += BLOCK) quant_dot_block<BITS, BLOCK, T>(rows + r, next + r, x, first, out + r);
  }

  static constexpr int ADD_ROWS = QUANT_ADD_ROWS;

  template <int T>
  static void add_rows(const RowRef* rows, const RowRef* next, int64_t count, const float (*h)[T], float* y,
                       int64_t y_stride, int64_t hidden) {
    constexpr int MOST = MAX_ACCUMULATORS / QUAD / Packing<BITS>::PARTS;  // tokens whose sums fit the registers
    constexpr int TOKENS = T <= MOST ? T : (MOST > 0 ? MOST : 1);
    for (int t = 0; t < T; t += TOKENS) {
      float some[ADD_ROWS][TOKENS];
      for (int r = 0; r < ADD_ROWS; ++r)
        for (int i = 0; i < TOKENS; ++i) some[r][i] = h[r][t + i];
      quant_add_rows<BITS, TOKENS>(rows, next, int((count + QUAD - 1) / QUAD), some, y + t * y_stride, y_stride, hidden);
    }
  }

  static void prefetch_scales(const RowRef* rows, int count, int64_t row_scales) {
    for (int r = 0; r < count; ++r)
      for (int64_t s = 0; s < row_scales; s += 32) prefetch(reinterpret_cast<const char*>(rows[r].scales + s));
  }
};

}  // namespace PARTINFER_ISA
}  // namespace partinfer
