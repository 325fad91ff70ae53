// Sums of rows of int8 and int4 weights, each times a factor: the rows of down, and the inputs of a layer by input. Sums of
// several rows are taken as integers.
#pragma once

#include "quant_groups.h"

namespace partinfer {
namespace PARTINFER_ISA {

constexpr int QUAD = 4;           // rows whose bytes are taken side by side

// Rows whose sum is taken as integers, with one scale per group of columns: the same in all variants, whose results agree.
constexpr int QUANT_ADD_ROWS = 8;
// The same where nothing but such rows is read. Sums of 16 rows of 4 bits stay in 16 bits: 8 * 127 * 16 < 2^15.
template <int BITS>
constexpr int QUANT_ADD_ROWS_WIDE = BITS == 4 ? 16 : QUANT_ADD_ROWS;

// h[r] * scale[r][group] as int8 with a scale per group that is common to the rows of some quads.
template <int QUADS>
struct Factors {
  alignas(64) int32_t packed[QUADS][SCALE_BLOCK];  // the int8 factors of four rows and a group
  alignas(64) int32_t offsets[SCALE_BLOCK];                        // what unsigned weights add too much
  alignas(64) float scales[SCALE_BLOCK];
};

// The factors of 16 groups from group g on, `here` of which there are. No factor of a group may be above 127 of its
// scale, so that small ones lose most; llama.cpp's blocks of 32 activations do the same.
template <int BITS, int QUADS, int T, bool FULL>
inline void quantise_factors(const RowRef* rows, const float (*h)[T], int t, int64_t g, int64_t here,
                             Factors<QUADS>& out) {
  const I8 nothing = set_bytes(BITS == 8 ? 0 : U4_OFFSET);  // weights of 0 as they are stored
  for (int64_t i = 0; i < (FULL ? SCALE_BLOCK : here); i += LANES) {
    F products[QUADS * QUAD], largest = set1(1e-30f);
    for (int r = 0; r < QUADS * QUAD; ++r) {
      products[r] = mul(load_scales<FULL>(rows[r], g + i, here - i), set1(h[r][t]));
      largest = max_size(largest, products[r]);
    }
    const F inverse = divide(set1(127.0f), largest);
    I32 offset = load_i32(NO_SUM);
    for (int quad = 0; quad < QUADS; ++quad) {
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
template <int BITS, int QUADS, int T, bool FULL>
inline void add_groups(const RowRef* rows, const RowsAhead<QUADS * QUAD>& ahead, const float (*h)[T], float* y,
                       int64_t y_stride, int64_t g, int64_t here) {
  constexpr int GROUP_BYTES = Packing<BITS>::GROUP_BYTES, PARTS = Packing<BITS>::PARTS;
  const int64_t bytes = (FULL ? SCALE_BLOCK : here) * GROUP_BYTES, start = g * GROUP_BYTES;
  Factors<QUADS> factors[T];
  for (int t = 0; t < T; ++t)
    quantise_factors<BITS, QUADS, T, FULL>(rows, h, t, g, FULL ? SCALE_BLOCK : here, factors[t]);
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
    for (int quad = 0; quad < QUADS; ++quad) {
      I8 packed[QUAD], columns[QUAD], parts[QUAD][PARTS];
      PARTINFER_UNROLL
      for (int r = 0; r < QUAD; ++r) {
        if (b % LINE_BYTES == 0) ahead.prefetch_for(quad * QUAD + r, start + b);
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

// y[t] += sum over some rows, a multiple of four, of h[r][t] * rows[r]. Columns are taken four rows at a time as
// integers, which needs the rows' bytes side by side; y keeps the order that this gives (finish_quant puts it right).
template <int BITS, int QUADS, int T>
inline void quant_add_rows(const RowRef* rows, const RowRef* next, const float (*h)[T], float* y, int64_t y_stride,
                           int64_t hidden) {
  const int64_t groups = hidden / GROUP;
  const RowsAhead<QUADS * QUAD> ahead(next, groups * Packing<BITS>::GROUP_BYTES);
  int64_t g = 0;
  for (; g + SCALE_BLOCK <= groups; g += SCALE_BLOCK)
    add_groups<BITS, QUADS, T, true>(rows, ahead, h, y, y_stride, g, SCALE_BLOCK);
  if (g < groups) add_groups<BITS, QUADS, T, false>(rows, ahead, h, y, y_stride, g, groups - g);
}

#ifdef PARTINFER_ADD_PAIRS

// The same for one token and 4 bits: bytes of two rows side by side, products of two in 16 bits, and sums of all rows there.
// y is in the order of the columns.
template <int QUADS, bool FULL>
inline void add_groups_by_pairs(const RowRef* rows, const RowsAhead<QUADS * QUAD>& ahead, const float (*h)[1], float* y,
                                int64_t g, int64_t here) {
  constexpr int64_t GROUP_BYTES = Packing<4>::GROUP_BYTES, HALF = GROUP / 2;
  const int64_t bytes = (FULL ? SCALE_BLOCK : here) * GROUP_BYTES, start = g * GROUP_BYTES;
  Factors<QUADS> factors;
  quantise_factors<4, QUADS, 1, FULL>(rows, h, 0, g, FULL ? SCALE_BLOCK : here, factors);
  for (int64_t b = 0; b < bytes; b += BYTES) {
    const int64_t group = b / GROUP_BYTES;
    I16 sums[4];  // of both halves of the groups, the first eight columns and the others
    sums[0] = spread16(factors.offsets + group);
    PARTINFER_UNROLL
    for (int k = 1; k < 4; ++k) sums[k] = sums[0];
    PARTINFER_UNROLL
    for (int quad = 0; quad < QUADS; ++quad) {
      if (b % LINE_BYTES == 0) {
        PARTINFER_UNROLL
        for (int r = 0; r < QUAD; ++r) ahead.prefetch_for(quad * QUAD + r, start + b);
      }
      const auto add_pair = [&](int r, I8 c) {
        I8 columns[2];
        const char *first = rows[quad * QUAD + r].data + start + b, *second = rows[quad * QUAD + r + 1].data + start + b;
        interleave2(load_packed<FULL>(first, bytes - b), load_packed<FULL>(second, bytes - b), columns);
        PARTINFER_UNROLL
        for (int k = 0; k < 2; ++k) {
          sums[k] = dot_pairs(sums[k], low_nibbles(columns[k]), c);
          sums[2 + k] = dot_pairs(sums[2 + k], high_nibbles(columns[k]), c);
        }
      };
      add_pair(0, spread_pair_of_factors<0>(factors.packed[quad] + group));
      add_pair(2, spread_pair_of_factors<1>(factors.packed[quad] + group));
    }
    const F scale = set1(factors.scales[group]), second_scale = set1(factors.scales[group + 1]);
    PARTINFER_UNROLL
    for (int k = 0; k < 4; ++k) {
      float* place = y + (start + b) * 2 + k / 2 * HALF + k % 2 * LANES;
      add_sums16(sums[k], scale, second_scale, place, place + GROUP);
    }
  }
}

template <int QUADS>
inline void quant_add_pairs(const RowRef* rows, const RowRef* next, const float (*h)[1], float* y, int64_t hidden) {
  const int64_t groups = hidden / GROUP;
  const RowsAhead<QUADS * QUAD> ahead(next, groups * Packing<4>::GROUP_BYTES);
  int64_t g = 0;
  for (; g + SCALE_BLOCK <= groups; g += SCALE_BLOCK)
    add_groups_by_pairs<QUADS, true>(rows, ahead, h, y, g, SCALE_BLOCK);
  if (g < groups) add_groups_by_pairs<QUADS, false>(rows, ahead, h, y, g, groups - g);
}

#endif

// y += sum over the first `count` of MOST rows of h[r] * rows[r], for T tokens. rows past them have factors of 0.
template <int BITS, int MOST, int T>
inline void quant_add(const RowRef* rows, const RowRef* next, int64_t count, const float (*h)[T], float* y,
                      int64_t y_stride, int64_t hidden) {
#ifdef PARTINFER_ADD_PAIRS
  if constexpr (BITS == 4) {
    static_assert(T == 1);
    const auto add = count > 2 * QUAD ? quant_add_pairs<MOST / QUAD> : count > QUAD ? quant_add_pairs<2> : quant_add_pairs<1>;
    return add(rows, next, h, y, hidden);
  }
#endif
  const auto add = count > 2 * QUAD ? quant_add_rows<BITS, MOST / QUAD, T>
                   : count > QUAD   ? quant_add_rows<BITS, 2, T>
                                    : quant_add_rows<BITS, 1, T>;
  add(rows, next, h, y, y_stride, hidden);
}

// `count` sums in the order of quant_add to the order of the columns. count: a multiple of the bytes of a vector and of a group.
template <int BITS>
inline void in_order(const float* sums, int64_t count, float* columns) {
#ifdef PARTINFER_ADD_PAIRS
  if constexpr (BITS == 4) {
    __builtin_memcpy(columns, sums, size_t(count) * sizeof(float));
    return;
  }
#endif
  constexpr int PARTS = Packing<BITS>::PARTS, FOUR = 4;
  for (int64_t chunk = 0; chunk < count; chunk += BYTES * PARTS)
    for (int64_t part = 0; part < PARTS; ++part)
      for (int64_t quarter = 0; quarter < BYTES / 16; ++quarter)
        for (int64_t vector = 0; vector < 4; ++vector) {
          const float* from = sums + chunk + part * BYTES + vector * LANES + quarter * FOUR;
          __builtin_memcpy(columns + chunk + (quarter * PARTS + part) * 16 + vector * FOUR, from, FOUR * sizeof(float));
        }
}

}  // namespace PARTINFER_ISA
}  // namespace partinfer
