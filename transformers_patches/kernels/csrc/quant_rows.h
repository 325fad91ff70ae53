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

// out[r][t] = rows[r] · x[first + t]
template <int BITS, int R, int T>
inline void quant_dot_block(const RowRef* rows, const RowRef* next, const Input& x, int64_t first, float (*out)[T]) {
  constexpr int GROUP_BYTES = Packing<BITS>::GROUP_BYTES, PARTS = Packing<BITS>::PARTS;
  const int64_t groups = x.hidden / GROUP, half = x.hidden / 2;
  F acc[R][T];
  PARTINFER_UNROLL
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) acc[r][t] = zero();
  for (int64_t g = 0; g < groups; g += SCALE_BLOCK) {
    const int64_t here = smaller(SCALE_BLOCK, groups - g);
    alignas(64) float scales[R][T][SCALE_BLOCK];
    PARTINFER_UNROLL
    for (int r = 0; r < R; ++r) {
      alignas(64) float own[SCALE_BLOCK];
      load_scales(rows[r].scales + g, here, own);
      for (int t = 0; t < T; ++t)
        for (int64_t i = 0; i < SCALE_BLOCK; i += LANES)
          store(scales[r][t] + i, mul(load(own + i), load(x.scales + (first + t) * x.scale_stride + g + i)));
    }
    const int64_t bytes = here * GROUP_BYTES, start = g * GROUP_BYTES;
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
        const char* place = rows[r].data + start + b;
        I8 w[PARTS];
        unpack<BITS>(bytes - b >= BYTES ? load_bytes(place) : load_bytes_tail(place, bytes - b), w);
        PARTINFER_UNROLL
        for (int t = 0; t < T; ++t) {
          I32 sum = offset[t];
          PARTINFER_UNROLL
          for (int p = 0; p < PARTS; ++p) sum = dot_part<BITS>(sum, w[p], xv[t][p]);
          acc[r][t] = fma(to_float(sum), spread<GROUP_BYTES>(scales[r][t] + b / GROUP_BYTES), acc[r][t]);
        }
      }
    }
  }
  PARTINFER_UNROLL
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) out[r][t] = sum(acc[r][t]);
}

// h[r] * scale[r][group] for four rows as int8 with a common scale per group.
struct Factors {
  alignas(64) int32_t packed[SCALE_BLOCK];   // the four rows' int8 factors of a group
  alignas(64) int32_t offsets[SCALE_BLOCK];  // what unsigned weights add too much
  alignas(64) float scales[SCALE_BLOCK];
};

template <int T>
inline void quantise_factors(const float (*own)[SCALE_BLOCK], const float (*h)[T], int t, int32_t offset,
                             Factors& out) {
  constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  for (int g = 0; g < SCALE_BLOCK; ++g) {
    const float f0 = own[0][g] * h[0][t], f1 = own[1][g] * h[1][t];
    const float f2 = own[2][g] * h[2][t], f3 = own[3][g] * h[3][t];
    const float m0 = f0 < 0 ? -f0 : f0, m1 = f1 < 0 ? -f1 : f1, m2 = f2 < 0 ? -f2 : f2, m3 = f3 < 0 ? -f3 : f3;
    const float m01 = m0 > m1 ? m0 : m1, m23 = m2 > m3 ? m2 : m3;
    const float largest = m01 > m23 ? m01 : m23;
    const float inverse = 127.0f / (largest > 1e-30f ? largest : 1e-30f);
    const int32_t q0 = int32_t(float_to_bits(f0 * inverse + ROUND) - 0x4b400000u);
    const int32_t q1 = int32_t(float_to_bits(f1 * inverse + ROUND) - 0x4b400000u);
    const int32_t q2 = int32_t(float_to_bits(f2 * inverse + ROUND) - 0x4b400000u);
    const int32_t q3 = int32_t(float_to_bits(f3 * inverse + ROUND) - 0x4b400000u);
    out.packed[g] = int32_t((uint32_t(q0) & 255u) | (uint32_t(q1) & 255u) << 8 | (uint32_t(q2) & 255u) << 16 |
                            uint32_t(q3) << 24);
    out.offsets[g] = -offset * (q0 + q1 + q2 + q3);
    out.scales[g] = largest * (1.0f / 127.0f);
  }
}

// y[t] += sum over four rows of h[r][t] * rows[r]. Columns are taken four rows at a time as integers, which needs the
// rows' bytes side by side; y keeps the order that this gives (finish_quant puts it right).
template <int BITS, int T>
inline void quant_add_rows(const RowRef* rows, const RowRef* next, const float (*h)[T], float* y, int64_t y_stride,
                           int64_t hidden) {
  constexpr int GROUP_BYTES = Packing<BITS>::GROUP_BYTES, PARTS = Packing<BITS>::PARTS;
  constexpr int32_t OFFSET = BITS == 8 ? S8_OFFSET : 8;
  const int64_t groups = hidden / GROUP;
  for (int64_t g = 0; g < groups; g += SCALE_BLOCK) {
    const int64_t here = smaller(SCALE_BLOCK, groups - g);
    alignas(64) float own[4][SCALE_BLOCK];
    for (int r = 0; r < 4; ++r) load_scales(rows[r].scales + g, here, own[r]);
    Factors factors[T];
    for (int t = 0; t < T; ++t) quantise_factors<T>(own, h, t, OFFSET, factors[t]);
    const int64_t bytes = here * GROUP_BYTES, start = g * GROUP_BYTES;
    const char *place_of[4], *next_of[4];  // copies, because stores to y could change what rows and next point to
    for (int r = 0; r < 4; ++r) {
      place_of[r] = rows[r].data + start;
      next_of[r] = next[r].data + start;
    }
    for (int64_t b = 0; b < bytes; b += BYTES) {
      I8 parts[4][PARTS];
      PARTINFER_UNROLL
      for (int r = 0; r < 4; ++r) {
        if (b % 64 == 0) prefetch(next_of[r] + b);
        const char* place = place_of[r] + b;
        unpack<BITS>(bytes - b >= BYTES ? load_bytes(place) : load_bytes_tail(place, bytes - b), parts[r]);
      }
      I8 columns[PARTS][4];
      PARTINFER_UNROLL
      for (int p = 0; p < PARTS; ++p) {
        const I8 side[4] = {parts[0][p], parts[1][p], parts[2][p], parts[3][p]};
        interleave4(side, columns[p]);
      }
      PARTINFER_UNROLL
      for (int t = 0; t < T; ++t) {
        const I8 c = spread_bytes<GROUP_BYTES>(factors[t].packed + b / GROUP_BYTES);
        const I32 offset = spread<GROUP_BYTES>(factors[t].offsets + b / GROUP_BYTES);
        const F scale = spread<GROUP_BYTES>(factors[t].scales + b / GROUP_BYTES);
        float* place = y + t * y_stride + (start + b) * PARTS;
        PARTINFER_UNROLL
        for (int p = 0; p < PARTS; ++p) {
          PARTINFER_UNROLL
          for (int k = 0; k < 4; ++k) {
            float* lanes = place + p * BYTES + k * LANES;
            store(lanes, fma(to_float(dot_part<BITS>(offset, columns[p][k], c)), scale, load(lanes)));
          }
        }
      }
    }
  }
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

  template <int T>
  static void add_rows(const RowRef* rows, const RowRef* next, const float (*h)[T], float* y, int64_t y_stride,
                       int64_t hidden) {
    quant_add_rows<BITS, T>(rows, next, h, y, y_stride, hidden);
  }

  static void prefetch_scales(const RowRef* rows, int count, int64_t row_scales) {
    for (int r = 0; r < count; ++r)
      for (int64_t s = 0; s < row_scales; s += 32) prefetch(reinterpret_cast<const char*>(rows[r].scales + s));
  }
};

}  // namespace PARTINFER_ISA
}  // namespace partinfer
