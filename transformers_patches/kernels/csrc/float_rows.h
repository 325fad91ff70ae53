// Products with rows of float32, bfloat16 and float16 weights.
#pragma once

#include "isa.h"

namespace partinfer {
namespace PARTINFER_ISA {

// How one step multiplies weights W with an input X: N elements at a time into an accumulator of LANES floats.
template <class W, class X>
struct Step {
  static constexpr int N = LANES;
  static F weights(const W* p) { return load(p); }
  static F input(const X* p) { return load(p); }
  static F weights_tail(const W* p, int64_t count) { return load_tail(p, count); }
  static F input_tail(const X* p, int64_t count) { return load_tail(p, count); }
  static F accumulate(F w, F x, F sum) { return fma(w, x, sum); }
};

#ifdef PARTINFER_BF16_DOT
inline BF load_pairs_tail(const bf16_t* p, int64_t count) {
  bf16_t lanes[2 * LANES];
  __builtin_memset(lanes, 0, sizeof(lanes));
  __builtin_memcpy(lanes, p, size_t(count) * sizeof(bf16_t));
  return load_pairs(lanes);
}

template <>
struct Step<bf16_t, bf16_t> {
  static constexpr int N = 2 * LANES;
  static BF weights(const bf16_t* p) { return load_pairs(p); }
  static BF input(const bf16_t* p) { return load_pairs(p); }
  static BF weights_tail(const bf16_t* p, int64_t count) { return load_pairs_tail(p, count); }
  static BF input_tail(const bf16_t* p, int64_t count) { return load_pairs_tail(p, count); }
  static F accumulate(BF w, BF x, F sum) { return dot_pairs(w, x, sum); }
};
#endif

// out[r][t] = rows[r] · x[t], prefetching the rows that come next.
template <class W, class X, int R, int T>
inline void dot_block(const RowRef* rows, const RowRef* next, const X* x, int64_t hidden, float (*out)[T]) {
  using S = Step<W, X>;
  constexpr int LINE = 64 / sizeof(W);  // elements per cache line: one prefetch for each
  F acc[R][T];
  PARTINFER_UNROLL
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) acc[r][t] = zero();
  int64_t j = 0;
  for (; j + LINE <= hidden; j += LINE) {
    PARTINFER_UNROLL
    for (int r = 0; r < R; ++r) prefetch(next[r].data + j * int64_t(sizeof(W)));
    PARTINFER_UNROLL
    for (int v = 0; v < LINE; v += S::N) {
      decltype(S::input(x)) xv[T];
      PARTINFER_UNROLL
      for (int t = 0; t < T; ++t) xv[t] = S::input(x + t * hidden + j + v);
      PARTINFER_UNROLL
      for (int r = 0; r < R; ++r) {
        const auto w = S::weights(reinterpret_cast<const W*>(rows[r].data) + j + v);
        PARTINFER_UNROLL
        for (int t = 0; t < T; ++t) acc[r][t] = S::accumulate(w, xv[t], acc[r][t]);
      }
    }
  }
  for (; j < hidden; j += S::N) {
    const int64_t count = smaller(S::N, hidden - j);
    for (int r = 0; r < R; ++r) {
      const auto w = S::weights_tail(reinterpret_cast<const W*>(rows[r].data) + j, count);
      for (int t = 0; t < T; ++t) acc[r][t] = S::accumulate(w, S::input_tail(x + t * hidden + j, count), acc[r][t]);
    }
  }
  PARTINFER_UNROLL
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) out[r][t] = sum(acc[r][t]);
}

// y[t] += sum over r of h[r][t] * rows[r]
template <class W, int R, int T>
inline void add_rows_block(const RowRef* rows, const RowRef* next, const float (*h)[T], float* y, int64_t y_stride,
                           int64_t hidden) {
  constexpr int LINE = 64 / sizeof(W);
  F factor[R][T];
  PARTINFER_UNROLL
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) factor[r][t] = set1(h[r][t]);
  int64_t j = 0;
  for (; j + LINE <= hidden; j += LINE) {
    PARTINFER_UNROLL
    for (int r = 0; r < R; ++r) prefetch(next[r].data + j * int64_t(sizeof(W)));
    PARTINFER_UNROLL
    for (int v = 0; v < LINE; v += LANES) {
      F w[R];
      PARTINFER_UNROLL
      for (int r = 0; r < R; ++r) w[r] = load(reinterpret_cast<const W*>(rows[r].data) + j + v);
      PARTINFER_UNROLL
      for (int t = 0; t < T; ++t) {
        float* place = y + t * y_stride + j + v;
        F value = load(place);
        PARTINFER_UNROLL
        for (int r = 0; r < R; ++r) value = fma(factor[r][t], w[r], value);
        store(place, value);
      }
    }
  }
  for (; j < hidden; j += LANES) {
    const int64_t count = smaller(LANES, hidden - j);
    for (int t = 0; t < T; ++t) {
      F value = load(y + t * y_stride + j);
      for (int r = 0; r < R; ++r)
        value = fma(factor[r][t], load_tail(reinterpret_cast<const W*>(rows[r].data) + j, count), value);
      store(y + t * y_stride + j, value);
    }
  }
}

// The products of one weight type with one input type, as the loops of ffn_loop.h and linear_loop.h use them.
template <class W, class X>
struct FloatRows {
  static const X* input(const Input& x);

  // out[r][t] for R rows and tokens first … first + T - 1, in blocks that fit the registers.
  template <int R, int T>
  static void dot(const RowRef* rows, const RowRef* next, const Input& x, int64_t first, float (*out)[T]) {
    constexpr int BLOCK = R * T <= MAX_ACCUMULATORS ? R : MAX_ACCUMULATORS / T;
    for (int r = 0; r < R; r += BLOCK)
      dot_block<W, X, BLOCK, T>(rows + r, next + r, input(x) + first * x.hidden, x.hidden, out + r);
  }

  template <int T>
  static void add_rows(const RowRef* rows, const RowRef* next, const float (*h)[T], float* y, int64_t y_stride,
                       int64_t hidden) {
    add_rows_block<W, 4, T>(rows, next, h, y, y_stride, hidden);
  }

  static void prefetch_scales(const RowRef*, int, int64_t) {}
};

template <class W, class X>
inline const X* FloatRows<W, X>::input(const Input& x) {
  if constexpr (sizeof(X) == 2)
    return x.bf16;
  else
    return x.f32;
}

}  // namespace PARTINFER_ISA
}  // namespace partinfer
