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
  F acc[R * T];
  PARTINFER_UNROLL
  for (int i = 0; i < R * T; ++i) acc[i] = zero();
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
        for (int t = 0; t < T; ++t) acc[r * T + t] = S::accumulate(w, xv[t], acc[r * T + t]);
      }
    }
  }
  for (; j < hidden; j += S::N) {
    const int64_t count = smaller(S::N, hidden - j);
    for (int r = 0; r < R; ++r) {
      const auto w = S::weights_tail(reinterpret_cast<const W*>(rows[r].data) + j, count);
      for (int t = 0; t < T; ++t)
        acc[r * T + t] = S::accumulate(w, S::input_tail(x + t * hidden + j, count), acc[r * T + t]);
    }
  }
  sums(acc, &out[0][0]);
}

// The columns of a row that are added to y together. y has bfloat16 columns in another order, as long as they fill
// cache lines: of 2 LANES neighbours first those at even places (columns_in_order puts them right).
template <class W>
struct Columns {
  static constexpr int LINE = 64 / sizeof(W), VECTORS = 1;
  static void load(const W* p, F (&w)[1]) { w[0] = PARTINFER_ISA::load(p); }
};
template <>
struct Columns<bf16_t> {
  static constexpr int LINE = 32, VECTORS = 2;
  static void load(const bf16_t* p, F (&w)[2]) { load_even_odd(p, w[0], w[1]); }
};

// y[t] += sum over r of h[r][t] * rows[r]
template <class W, int R, int T>
inline void add_rows_block(const RowRef* rows, const RowRef* next, const float (*h)[T], float* y, int64_t y_stride,
                           int64_t hidden) {
  using C = Columns<W>;
  F factor[R][T];
  const RowsAhead<R> ahead(next, hidden * int64_t(sizeof(W)));
  const char* place_of[R];  // a copy, because stores to y could change what rows points to
  PARTINFER_UNROLL
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < T; ++t) factor[r][t] = set1(h[r][t]);
    place_of[r] = rows[r].data;
  }
  int64_t j = 0;
  for (; j + C::LINE <= hidden; j += C::LINE) {
    PARTINFER_UNROLL
    for (int r = 0; r < R; ++r) ahead.prefetch_for(r, j * int64_t(sizeof(W)));
    PARTINFER_UNROLL
    for (int v = 0; v < C::LINE; v += C::VECTORS * LANES) {
      F w[R][C::VECTORS];
      PARTINFER_UNROLL
      for (int r = 0; r < R; ++r) C::load(reinterpret_cast<const W*>(place_of[r]) + j + v, w[r]);
      PARTINFER_UNROLL
      for (int t = 0; t < T; ++t)
        for (int k = 0; k < C::VECTORS; ++k) {
          float* place = y + t * y_stride + j + v + k * LANES;
          F value = load(place);
          PARTINFER_UNROLL
          for (int r = 0; r < R; ++r) value = fma(factor[r][t], w[r][k], value);
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

// The sum of result[t] is row · x[t], for a row inside a run of rows that follow each other; `next` is read afterwards.
// Few instructions for each cache line, so that the processor itself looks far ahead.
template <class W, class X, int T>
inline void dot_row(const char* row, const char* next, const X* x, int64_t hidden, F* result) {
  using S = Step<W, X>;
  constexpr int LINE = 64 / sizeof(W);
  constexpr int SUMS = MAX_ACCUMULATORS / T < 4 ? MAX_ACCUMULATORS / T : 4;  // additions wait for each other else
  constexpr int CHUNK = SUMS * S::N > LINE ? SUMS * S::N : LINE;
  F acc[SUMS][T];
  PARTINFER_UNROLL
  for (int a = 0; a < SUMS; ++a)
    for (int t = 0; t < T; ++t) acc[a][t] = zero();
  const int64_t here = hidden - RUN_AHEAD / int64_t(sizeof(W));
  int64_t j = 0;
  for (; j + CHUNK <= hidden; j += CHUNK) {
    const char* place = row + j * int64_t(sizeof(W));
    const char* ahead = j < here ? place + RUN_AHEAD : next + (j - here) * int64_t(sizeof(W));
    PARTINFER_UNROLL
    for (int v = 0; v < CHUNK; v += LINE) prefetch(ahead + v * sizeof(W));
    PARTINFER_UNROLL
    for (int v = 0; v < CHUNK; v += S::N) {
      const auto w = S::weights(reinterpret_cast<const W*>(place) + v);
      PARTINFER_UNROLL
      for (int t = 0; t < T; ++t) {
        F& sum = acc[v / S::N % SUMS][t];
        sum = S::accumulate(w, S::input(x + t * hidden + j + v), sum);
      }
    }
  }
  for (; j + S::N <= hidden; j += S::N) {
    const auto w = S::weights(reinterpret_cast<const W*>(row) + j);
    for (int t = 0; t < T; ++t) acc[0][t] = S::accumulate(w, S::input(x + t * hidden + j), acc[0][t]);
  }
  if (j < hidden) {
    const int64_t count = smaller(S::N, hidden - j);
    const auto w = S::weights_tail(reinterpret_cast<const W*>(row) + j, count);
    for (int t = 0; t < T; ++t) acc[0][t] = S::accumulate(w, S::input_tail(x + t * hidden + j, count), acc[0][t]);
  }
  PARTINFER_UNROLL
  for (int t = 0; t < T; ++t) {
    for (int a = 1; a < SUMS; ++a) acc[0][t] = add(acc[0][t], acc[a][t]);
    result[t] = acc[0][t];
  }
}

// f(column, LANES values or fewer, their number) for columns begin … end - 1 of a y that add_rows has filled for rows of
// `hidden` columns, in order; sums(place) gives LANES values of y. begin is a multiple of COLUMN_BLOCK.
template <class W, class Sums, class Function>
inline void columns_in_order(int64_t begin, int64_t end, int64_t hidden, const Sums& sums, const Function& f) {
  using C = Columns<W>;
  int64_t j = begin;
  if constexpr (C::VECTORS == 2) {
    const int64_t paired = smaller(end, hidden / C::LINE * C::LINE);
    for (; j < paired; j += 2 * LANES) {
      F low, high;
      interleave(sums(j), sums(j + LANES), low, high);
      f(j, low, LANES);
      f(j + LANES, high, LANES);
    }
  }
  for (; j < end; j += LANES) f(j, sums(j), smaller(LANES, end - j));
}

constexpr int FLOAT_ADD_ROWS = 4;  // rows of down, or values of attention, that are added together
// The same where a group is 8 neurons, whose `up` is known or not there: y is read and written half as often. Only where
// the registers hold so many factors and rows.
constexpr int FLOAT_ADD_ROWS_WIDE = LANES >= 16 ? 8 : FLOAT_ADD_ROWS;

// The products of one weight type with one input type, as the loops of ffn_loop.h and linear_loop.h use them.
template <class W, class X, int ADD = FLOAT_ADD_ROWS>
struct FloatRows {
  static constexpr bool RUNS = true;
  static constexpr int ADD_ROWS = ADD;

  static const X* input(const Input& x);

  // out[r][t] for R rows and tokens first … first + T - 1, in blocks that fit the registers.
  template <int R, int T>
  static void dot(const RowRef* rows, const RowRef* next, const Input& x, int64_t first, float (*out)[T]) {
    constexpr int BLOCK = R * T <= MAX_ACCUMULATORS ? R : MAX_ACCUMULATORS / T;
    for (int r = 0; r < R; r += BLOCK)
      dot_block<W, X, BLOCK, T>(rows + r, next + r, input(x) + first * x.hidden, x.hidden, out + r);
  }

  // y[t] += sum over r of h[r][t] * rows[r]; rows past the first `count` have factors of 0.
  template <int T>
  static void add_rows(const RowRef* rows, const RowRef* next, int64_t count, const float (*h)[T], float* y,
                       int64_t y_stride, int64_t hidden) {
    constexpr int BLOCK = T == 1 ? ADD_ROWS : FLOAT_ADD_ROWS;  // factors of several tokens fill the registers
    if (count <= FLOAT_ADD_ROWS) return add_rows_block<W, FLOAT_ADD_ROWS, T>(rows, next, h, y, y_stride, hidden);
    for (int r = 0; r < ADD_ROWS; r += BLOCK)
      add_rows_block<W, BLOCK, T>(rows + r, next + r, h + r, y, y_stride, hidden);
  }

  // As dot, for rows that follow each other, one after the other; `after` is what is read next.
  template <int R, int T>
  static void dot_run(const RowRef* rows, const RowRef& after, const Input& x, int64_t first, float (*out)[T]) {
    F products[R * T];
    for (int r = 0; r < R; ++r)
      dot_row<W, X, T>(rows[r].data, (r + 1 < R ? rows[r + 1] : after).data, input(x) + first * x.hidden, x.hidden,
                       products + r * T);
    sums(products, &out[0][0]);
  }

  static void prefetch_scales(const RowRef*, int, int64_t) {}
};

template <class W, class X, int ADD>
inline const X* FloatRows<W, X, ADD>::input(const Input& x) {
  if constexpr (sizeof(X) == 2)
    return x.bf16;
  else
    return x.f32;
}

}  // namespace PARTINFER_ISA
}  // namespace partinfer
