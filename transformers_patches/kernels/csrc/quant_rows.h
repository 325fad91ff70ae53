// Products with rows of int8 and int4 weights (quant_groups.h). The input is int8 too, with its own scale per group, so that
// a group's product is an integer.
#pragma once

#include "quant_add.h"

namespace partinfer {
namespace PARTINFER_ISA {

// Farther than in runs of floats, as far as was measured (AVX2).
constexpr int64_t QUANT_RUN_AHEAD = LANES == 8 ? 2 * RUN_AHEAD : RUN_AHEAD;

// The scales of `here` groups of some rows times those of some tokens, and the corrections added to acc.
template <int R, int T, bool FULL>
inline void multiply_scales(const RowRef* rows, const Input& x, int64_t first, int64_t g, int64_t here,
                            ScaleBlock (&scales)[R][T], F (&acc)[R][T]) {
  PARTINFER_UNROLL
  for (int r = 0; r < R; ++r) {
    PARTINFER_UNROLL
    for (int64_t i = 0; i < SCALE_BLOCK; i += LANES) {
      const F own = load_scales<FULL>(rows[r], g + i, here - i);
      PARTINFER_UNROLL
      for (int t = 0; t < T; ++t) {
        const int64_t place = (first + t) * x.scale_stride + g + i;
        store_scales(scales[r][t], i, mul(own, load(x.scales + place)));
        acc[r][t] = fma(own, load(x.corrections + place), acc[r][t]);
      }
    }
  }
}

#ifndef PARTINFER_DOT_U4_HALVES
// Both halves of groups of 4 bits.
inline I32 dot_u4_halves(const I8 (&w)[2], const I8 (&x)[2]) {
  return dot_u4(dot_u4(load_i32(NO_SUM), w[0], x[0]), w[1], x[1]);
}
#endif

// The product of one vector of packed bytes with the input, a group's in the lanes that its bytes take.
template <int BITS>
inline I32 dot_parts(const I8 (&w)[Packing<BITS>::PARTS], const I8 (&x)[Packing<BITS>::PARTS]) {
  if constexpr (BITS == 8)
    return dot_s8(load_i32(NO_SUM), w[0], x[0]);
  else
    return dot_u4_halves(w, x);
}

// acc[r][t] += `here` groups from group g on of rows[r] · x[first + t]. FULL: there are SCALE_BLOCK groups, which is
// known to the compiler. RUN: the rows follow each other and are read one after the other.
template <int BITS, int R, int T, bool FULL, bool RUN>
inline void dot_groups(const RowRef* rows, const RowRef* next, const Input& x, int64_t first, int64_t g, int64_t here,
                       F (&acc)[R][T]) {
  constexpr int GROUP_BYTES = Packing<BITS>::GROUP_BYTES, PARTS = Packing<BITS>::PARTS;
  const int64_t half = x.hidden / 2, start = g * GROUP_BYTES, bytes = (FULL ? SCALE_BLOCK : here) * GROUP_BYTES;
  // An addition waits for the one before it: a row by itself has two sums.
  constexpr int CHAINS = FULL && R * T <= 2 ? 2 : 1;
  ScaleBlock scales[R][T];
  multiply_scales<R, T, FULL>(rows, x, first, g, here, scales, acc);
  F more[CHAINS][R][T];
  PARTINFER_UNROLL
  for (int k = 1; k < CHAINS; ++k)
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) more[k][r][t] = zero();
  PARTINFER_UNROLL
  for (int64_t b = 0; b < bytes; b += BYTES) {
    if (b % LINE_BYTES == 0) {
      PARTINFER_UNROLL
      for (int r = 0; r < R; ++r) prefetch(RUN ? rows[r].data + start + b + QUANT_RUN_AHEAD : next[r].data + start + b);
    }
    I8 xv[T][PARTS];
    PARTINFER_UNROLL
    for (int t = 0; t < T; ++t) {
      const int8_t* xq = x.q + (first + t) * x.q_stride + start + b;
      PARTINFER_UNROLL
      for (int p = 0; p < PARTS; ++p) xv[t][p] = load_bytes(xq + p * half);
    }
    PARTINFER_UNROLL
    for (int r = 0; r < R; ++r) {
      I8 w[PARTS];
      unpack<BITS>(load_packed<FULL>(rows[r].data + start + b, bytes - b), w);
      PARTINFER_UNROLL
      for (int t = 0; t < T; ++t) {
        const int64_t k = b / BYTES % CHAINS;
        F& total = k == 0 ? acc[r][t] : more[k][r][t];
        total = fma(to_float(dot_parts<BITS>(w, xv[t])), spread_from<GROUP_BYTES>(scales[r][t], b / GROUP_BYTES), total);
      }
    }
  }
  PARTINFER_UNROLL
  for (int k = 1; k < CHAINS; ++k)
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) acc[r][t] = add(acc[r][t], more[k][r][t]);
}

#ifndef PARTINFER_SPREAD_PAIR
// The scales of a pair of groups, multiplied with others, over the lanes of a vector that begins at byte `place` of the pair.
inline F spread_pair(const uint16_t* scales, const float* others, int64_t place) {
  const int64_t i = place / GROUP;
  return mul(repeat(f16_t{scales[i]}), set1(others[i]));
}
#endif

#ifdef PARTINFER_PAIRS_OF_HALVES
// acc[r][t] += two groups of 4 bits, which are a vector, from group g on of rows[r] · x[first + t].
template <int R, int T, bool RUN>
inline void dot_pair_of_halves(const RowRef* rows, const RowRef* next, const Input& x, int64_t first, int64_t g,
                               F (&acc)[R][T]) {
  const int64_t half = x.hidden / 2, start = g * Packing<4>::GROUP_BYTES;
  PARTINFER_UNROLL
  for (int r = 0; r < R; ++r) {
    prefetch(RUN ? rows[r].data + start + QUANT_RUN_AHEAD : next[r].data + start);
    const F own = load_pair(reinterpret_cast<const f16_t*>(rows[r].scales) + g);
    I8 w[2];
    unpack<4>(load_bytes(rows[r].data + start), w);
    PARTINFER_UNROLL
    for (int t = 0; t < T; ++t) {
      const int64_t place = (first + t) * x.scale_stride + g;
      const int8_t* xq = x.q + (first + t) * x.q_stride + start;
      const I8 xv[2] = {load_bytes(xq), load_bytes(xq + half)};
      const F scales = halves_of_pair(mul(own, load_pair(x.scales + place)));
      acc[r][t] = fma(own, load_pair(x.corrections + place), acc[r][t]);
      acc[r][t] = fma(to_float(dot_parts<4>(w, xv)), scales, acc[r][t]);
    }
  }
}
#endif

// acc[r][t] += group g of rows[r] of 8 bits · x[first + t], for groups of whole vectors.
template <int R, int T, bool RUN>
inline void dot_group8(const RowRef* rows, const RowRef* next, const Input& x, int64_t first, int64_t g, F (&acc)[R][T]) {
  PARTINFER_UNROLL
  for (int r = 0; r < R; ++r) {
    const F own = repeat(f16_t{rows[r].scales[g]});
    prefetch(RUN ? rows[r].data + g * GROUP + QUANT_RUN_AHEAD : next[r].data + g * GROUP);
    PARTINFER_UNROLL
    for (int t = 0; t < T; ++t) {
      const F scale = mul(own, set1(x.scales[(first + t) * x.scale_stride + g]));
      PARTINFER_UNROLL
      for (int64_t b = g * GROUP; b < (g + 1) * GROUP; b += BYTES) {
        const I8 w[1] = {load_bytes(rows[r].data + b)}, xv[1] = {load_bytes(x.q + (first + t) * x.q_stride + b)};
        acc[r][t] = fma(to_float(dot_parts<8>(w, xv)), scale, acc[r][t]);
      }
    }
  }
}

// acc[r][t] += the groups from group g on, fewer than SCALE_BLOCK, of rows[r] · x[first + t].
template <int BITS, int R, int T, bool RUN>
inline void dot_last_groups(const RowRef* rows, const RowRef* next, const Input& x, int64_t first, int64_t g,
                            F (&acc)[R][T]) {
  const int64_t groups = x.hidden / GROUP;
  if constexpr (BITS == 8 && S8_OFFSET == 0 && BYTES <= GROUP) {
    for (; g < groups; ++g) dot_group8<R, T, RUN>(rows, next, x, first, g, acc);
    return;
  }
#ifdef PARTINFER_PAIRS_OF_HALVES
  if constexpr (BITS == 4) {
    for (; g + 2 <= groups; g += 2) dot_pair_of_halves<R, T, RUN>(rows, next, x, first, g, acc);
  }
#endif
  if (g < groups) dot_groups<BITS, R, T, false, RUN>(rows, next, x, first, g, groups - g, acc);
}

// acc[r][t] += rows[r] · the fine pairs of x[first + t], for 8-bit weights.
template <int R, int T>
inline void dot_fine(const RowRef* rows, const Input& x, int64_t first, F (&acc)[R][T]) {
  for (int t = 0; t < T; ++t) {
    const FinePair* pairs = x.fine + (first + t) * FINE_PAIRS;
    PARTINFER_UNROLL
    for (int64_t e = 0; e < FINE_PAIRS; ++e) {
      const FinePair& pair = pairs[e];
      PARTINFER_UNROLL
      for (int r = 0; r < R; ++r) {
        const char* data = rows[r].data + pair.group * GROUP;
        PARTINFER_UNROLL
        for (int64_t b = 0; b < 2 * GROUP; b += BYTES) {
          const I32 sum = dot_s8(load_i32(pair.start + b / 4), load_bytes(data + b), load_bytes(pair.q + b));
          acc[r][t] = fma(to_float(sum), spread_pair(rows[r].scales + pair.group, pair.scales, b), acc[r][t]);
        }
      }
    }
  }
}

// The sums of acc[r][t] are rows[r] · x[first + t].
template <int BITS, int R, int T, bool RUN>
inline void quant_dot_block(const RowRef* rows, const RowRef* next, const Input& x, int64_t first, F (&acc)[R][T]) {
  const int64_t groups = x.hidden / GROUP;
  PARTINFER_UNROLL
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) acc[r][t] = zero();
  int64_t g = 0;
  for (; g + SCALE_BLOCK <= groups; g += SCALE_BLOCK)
    dot_groups<BITS, R, T, true, RUN>(rows, next, x, first, g, SCALE_BLOCK, acc);
  if (g < groups) dot_last_groups<BITS, R, T, RUN>(rows, next, x, first, g, acc);
  if constexpr (BITS == 8) {
    if (x.fine != nullptr) dot_fine<R, T>(rows, x, first, acc);
  }
}

#ifdef PARTINFER_SUM_GROUPS

// acc[r][t] += 16 groups from group g on of rows[r] of 4-bit weights · x[first + t]: integers become one lane per group
// before they become floats. next: what is prefetched, `past` bytes from there.
template <int ROWS, int T>
inline void dot_block4(const RowRef* rows, const RowRef* next, int64_t past, const Input& x, int64_t first, int64_t g,
                       F (&acc)[ROWS][T]) {
  const int64_t half = x.hidden / 2, start = g * Packing<4>::GROUP_BYTES;
  I32 sums[ROWS][T][4];
  PARTINFER_UNROLL
  for (int k = 0; k < 4; ++k) {
    I8 xv[T][2];
    PARTINFER_UNROLL
    for (int t = 0; t < T; ++t) {
      const int8_t* xq = x.q + (first + t) * x.q_stride + start + k * BYTES;
      xv[t][0] = load_bytes(xq);
      xv[t][1] = load_bytes(xq + half);
    }
    PARTINFER_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      prefetch(next[r].data + past + start + k * BYTES);
      I8 w[2];
      unpack<4>(load_once(rows[r].data + start + k * BYTES), w);
      PARTINFER_UNROLL
      for (int t = 0; t < T; ++t) sums[r][t][k] = dot_u4(dot_u4(load_i32(NO_SUM), w[0], xv[t][0]), w[1], xv[t][1]);
    }
  }
  PARTINFER_UNROLL
  for (int t = 0; t < T; ++t) {
    const int64_t place = (first + t) * x.scale_stride + g;
    const F scales = load(x.scales + place), corrections = load(x.corrections + place);
    PARTINFER_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      const F own = load(reinterpret_cast<const f16_t*>(rows[r].scales) + g);
      acc[r][t] = fma(own, fma(to_float(sum_groups(sums[r][t])), scales, corrections), acc[r][t]);
    }
  }
}

// The first 16 groups of R rows of a run of 4-bit weights · a token, whose input stays in registers from row to row.
template <int R>
inline void dot_first_block4(const RowRef* rows, const Input& x, int64_t token, F (&acc)[R]) {
  const char* xq = reinterpret_cast<const char*>(x.q + token * x.q_stride);
  I8 low[4], high[4];
  PARTINFER_UNROLL
  for (int k = 0; k < 4; ++k) {
    low[k] = load_once(xq + k * BYTES);
    high[k] = load_once(xq + x.hidden / 2 + k * BYTES);
  }
  const F scales = load(x.scales + token * x.scale_stride), corrections = load(x.corrections + token * x.scale_stride);
  for (int r = 0; r < R; ++r) {
    I32 sums[4];
    PARTINFER_UNROLL
    for (int k = 0; k < 4; ++k) {
      prefetch(rows[r].data + QUANT_RUN_AHEAD + k * BYTES);
      I8 w[2];
      unpack<4>(load_once(rows[r].data + k * BYTES), w);
      sums[k] = dot_u4(dot_u4(load_i32(NO_SUM), w[0], low[k]), w[1], high[k]);
    }
    const F own = load(reinterpret_cast<const f16_t*>(rows[r].scales));
    acc[r] = mul(own, fma(to_float(sum_groups(sums)), scales, corrections));
  }
}

// out[r][t] += the last two groups of eight rows · x[first + t]: together they are as many as a block.
template <int T>
inline void dot_last_pairs4(const RowRef* rows, const Input& x, int64_t first, int64_t g, float (*out)[T]) {
  const int64_t half = x.hidden / 2, start = g * Packing<4>::GROUP_BYTES;
  const f16_t* places[8];
  for (int r = 0; r < 8; ++r) places[r] = reinterpret_cast<const f16_t*>(rows[r].scales) + g;
  const F own = load_pairs_of(places);
  for (int t = 0; t < T; ++t) {
    const int8_t* xq = x.q + (first + t) * x.q_stride + start;
    const I8 low = repeat_half(xq), high = repeat_half(xq + half);
    I32 sums[4];
    PARTINFER_UNROLL
    for (int k = 0; k < 4; ++k) {
      I8 w[2];
      unpack<4>(load_halves(rows[2 * k].data + start, rows[2 * k + 1].data + start), w);
      sums[k] = dot_u4(dot_u4(load_i32(NO_SUM), w[0], low), w[1], high);
    }
    const int64_t place = (first + t) * x.scale_stride + g;
    const F product = fma(to_float(sum_groups(sums)), repeat_pair(x.scales + place), repeat_pair(x.corrections + place));
    float some[8];
    sum_pairs(mul(own, product), some);
    for (int r = 0; r < 8; ++r) out[r][t] += some[r];
  }
}

// out[r] = rows[r] · a token for rows of a run that have 16 groups, or (pairs) 18.
template <int R>
inline void dot_short_rows4(const RowRef* rows, const Input& x, int64_t token, bool pairs, float (*out)[1]) {
  F acc[R];
  dot_first_block4<R>(rows, x, token, acc);
  sums(acc, out[0]);
  if constexpr (R == 8) {
    if (!pairs) return;
    for (int r = 0; r < R; ++r) prefetch(rows[r].data + QUANT_RUN_AHEAD + SCALE_BLOCK * Packing<4>::GROUP_BYTES);
    dot_last_pairs4<1>(rows, x, token, SCALE_BLOCK, out);
  }
}

// Columns up to which 4-bit rows of a run are read one after the other; of longer ones four together were faster.
constexpr int64_t LONGEST_ROW_ALONE = 4096;

// out[r][t] = rows[r] · x[first + t] for 4-bit weights. RUN: the rows follow each other in memory.
template <int R, int T, bool RUN>
inline void dot_rows4(const RowRef* rows, const RowRef* next, const Input& x, int64_t first, float (*out)[T]) {
  // Rows of a run one after the other, as memory has them; else as many as have their 4 T sums in registers.
  constexpr int ROWS = RUN ? 1 : T == 1 ? 4 : T == 2 ? 2 : 1;
  const int64_t groups = x.hidden / GROUP, whole = groups / SCALE_BLOCK * SCALE_BLOCK;
  const bool pairs = R == 8 && groups - whole == 2;
  F all[R][T];
  if constexpr (RUN && T == 1) {
    if (whole == SCALE_BLOCK && (pairs || whole == groups))
      return dot_short_rows4<R>(rows, x, first, pairs, out);
  }
  for (int r = 0; r < R; r += ROWS) {
    const RowRef* ahead = RUN ? rows + r : next + r;
    F acc[ROWS][T];
    PARTINFER_UNROLL
    for (int i = 0; i < ROWS; ++i)
      for (int t = 0; t < T; ++t) acc[i][t] = zero();
    for (int64_t g = 0; g < whole; g += SCALE_BLOCK)
      dot_block4<ROWS, T>(rows + r, ahead, RUN ? QUANT_RUN_AHEAD : 0, x, first, g, acc);
    if (whole < groups && !pairs)
      dot_groups<4, ROWS, T, false, RUN>(rows + r, ahead, x, first, whole, groups - whole, acc);
    PARTINFER_UNROLL
    for (int i = 0; i < ROWS; ++i)
      for (int t = 0; t < T; ++t) all[r + i][t] = acc[i][t];
  }
  sums(reinterpret_cast<F(&)[R * T]>(all), out[0]);
  if constexpr (R == 8) {
    if (pairs) {
      for (int r = 0; r < R; ++r) prefetch((RUN ? rows[r].data + QUANT_RUN_AHEAD : next[r].data) + whole * Packing<4>::GROUP_BYTES);
      dot_last_pairs4<T>(rows, x, first, whole, out);
    }
  }
}

#endif

// ADD: how many rows are added together.
template <int BITS, int ADD = QUANT_ADD_ROWS>
struct QuantRows {
  static constexpr bool RUNS = BITS == 8 || LANES >= 8;  // with short vectors, 4-bit rows need several at a time

  template <int R, int T>
  static void dot(const RowRef* rows, const RowRef* next, const Input& x, int64_t first, float (*out)[T]) {
#ifdef PARTINFER_SUM_GROUPS
    if constexpr (BITS == 4) return dot_rows4<R, T, false>(rows, next, x, first, out);
#endif
    // Besides the sums, T * PARTS input vectors want a register.
    constexpr int BLOCK = R * T <= MAX_ACCUMULATORS / 2 ? R : (MAX_ACCUMULATORS / 2 / T > 0 ? MAX_ACCUMULATORS / 2 / T : 1);
    for (int r = 0; r < R; r += BLOCK) {
      F acc[BLOCK][T];
      quant_dot_block<BITS, BLOCK, T, false>(rows + r, next + r, x, first, acc);
      sums(reinterpret_cast<F(&)[BLOCK * T]>(acc), out[r]);
    }
  }

  // As dot, for rows that follow each other, one after the other. What is prefetched past the last one is what follows
  // it in memory, not what is read next: one or two KB of a run's many.
  template <int R, int T>
  static void dot_run(const RowRef* rows, const RowRef&, const Input& x, int64_t first, float (*out)[T]) {
#ifdef PARTINFER_SUM_GROUPS
    if constexpr (BITS == 4) {
      if (x.hidden <= LONGEST_ROW_ALONE) return dot_rows4<R, T, true>(rows, nullptr, x, first, out);
      RowRef next[R];
      for (int r = 0; r < R; ++r) next[r] = {rows[r].data + R * (rows[1].data - rows[0].data), rows[r].scales};
      return dot_rows4<R, T, false>(rows, next, x, first, out);
    }
#endif
    F acc[R][T];
    for (int r = 0; r < R; ++r) {
      F one[1][T];
      quant_dot_block<BITS, 1, T, true>(rows + r, nullptr, x, first, one);
      for (int t = 0; t < T; ++t) acc[r][t] = one[0][t];
    }
    sums(reinterpret_cast<F(&)[R * T]>(acc), out[0]);
  }

  static constexpr int ADD_ROWS = ADD;

  template <int T>
  static void add_rows(const RowRef* rows, const RowRef* next, int64_t count, const float (*h)[T], float* y,
                       int64_t y_stride, int64_t hidden) {
    constexpr int MOST = MAX_ACCUMULATORS / QUAD / Packing<BITS>::PARTS;  // tokens whose sums fit the registers
    constexpr int TOKENS = T <= MOST ? T : (MOST > 0 ? MOST : 1);
    for (int t = 0; t < T; t += TOKENS) {
      float some[ADD_ROWS][TOKENS];
      for (int r = 0; r < ADD_ROWS; ++r)
        for (int i = 0; i < TOKENS; ++i) some[r][i] = h[r][t + i];
      quant_add<BITS, ADD, TOKENS>(rows, next, count, some, y + t * y_stride, y_stride, hidden);
    }
  }

  static void prefetch_scales(const RowRef* rows, int count, int64_t row_scales) {
    for (int r = 0; r < count; ++r)
      for (int64_t s = 0; s < row_scales; s += 32) prefetch(reinterpret_cast<const char*>(rows[r].scales + s));
  }
};

}  // namespace PARTINFER_ISA
}  // namespace partinfer
