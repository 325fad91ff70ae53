// One pass over the active neurons of an FFN, for any kind of rows (float_rows.h, quant_rows.h).
#pragma once

#include "activation.h"
#include "isa.h"

namespace partinfer {
namespace PARTINFER_ISA {

constexpr int DOT_ROWS = 8;    // rows whose products are taken together: 4 of gate and 4 of up, or 8 of fc1
constexpr int ADD_ROWS = 4;    // rows of down added together
constexpr int SKIP_BLOCK = 256;  // neurons computed before the rows of down that ReLU left are read

// The rows of 4 (gated) or 8 (plain) neurons from a position on, the last one repeated where the positions end.
inline void rows_of(const FfnTask& task, int64_t position, RowRef* rows) {
  const bool gated = task.up.data != nullptr;
  const int neurons = gated ? DOT_ROWS / 2 : DOT_ROWS;
  for (int i = 0; i < neurons; ++i) {
    const int64_t row = row_number(task.rows, smaller(position + i, task.rows.end - 1));
    rows[i] = row_at(task.gate, row);
    if (gated) rows[neurons + i] = row_at(task.up, row);
  }
}

// h[neuron][first … first + T - 1] from the products of one group.
template <class Products, int T>
inline void activations(const FfnTask& task, const RowRef* rows, const RowRef* next, int64_t position, int64_t first,
                        float* h) {
  const bool gated = task.up.data != nullptr;
  const int neurons = gated ? DOT_ROWS / 2 : DOT_ROWS;
  alignas(64) float products[DOT_ROWS][T];
  Products::template dot<DOT_ROWS, T>(rows, next, task.x, first, products);
  if (task.gate_bias.data != nullptr || task.up_bias.data != nullptr) {
    for (int i = 0; i < neurons; ++i) {
      const int64_t row = row_number(task.rows, smaller(position + i, task.rows.end - 1));
      for (int t = 0; t < T; ++t) products[i][t] += element(task.gate_bias, row);
      if (gated)
        for (int t = 0; t < T; ++t) products[neurons + i][t] += element(task.up_bias, row);
    }
  }
  activate(task.activation, &products[0][0], neurons * T);
  for (int i = 0; i < neurons; ++i)
    for (int t = 0; t < T; ++t) {
      float value = products[i][t];
      if (gated) value *= products[neurons + i][t];
      if (task.up_values != nullptr) value *= task.up_values[smaller(position + i, task.rows.end - 1)];
      h[i * MAX_TOKENS + first + t] = value;
    }
}

template <class Products, int T>
inline void add_group(const FfnTask& task, const RowRef* rows, const RowRef* next, const float* const* h,
                      int64_t first) {
  float factors[ADD_ROWS][T];
  for (int i = 0; i < ADD_ROWS; ++i)
    for (int t = 0; t < T; ++t) factors[i][t] = h[i][first + t];
  Products::template add_rows<T>(rows, next, factors, task.y + first * task.y_stride, task.y_stride, task.x.hidden);
}

// Calls f<T>(first) for tokens 0 … tokens - 1 in blocks of 4, 2 and 1.
template <class Function>
inline void token_blocks(int64_t tokens, const Function& f) {
  int64_t first = 0;
  for (; first + 4 <= tokens; first += 4) f.template operator()<4>(first);
  if (first + 2 <= tokens) {
    f.template operator()<2>(first);
    first += 2;
  }
  if (first < tokens) f.template operator()<1>(first);
}

template <class Products>
struct ActivationsOf {
  const FfnTask& task;
  const RowRef *rows, *next;
  int64_t position;
  float* h;
  template <int T>
  void operator()(int64_t first) const {
    activations<Products, T>(task, rows, next, position, first, h);
  }
};

template <class Products>
struct AddGroup {
  const FfnTask& task;
  const RowRef *rows, *next;
  const float* const* h;
  template <int T>
  void operator()(int64_t first) const {
    add_group<Products, T>(task, rows, next, h, first);
  }
};

inline bool any_nonzero(const float* h, int64_t tokens) {
  for (int64_t t = 0; t < tokens; ++t)
    if (h[t] != 0.0f) return true;
  return false;
}

// Whether h is 0 for most neurons, so that it pays to compute many before reading any row of down.
inline bool skips_rows(const FfnTask& task) { return task.activation == Activation::RELU; }

template <class Products>
inline void ffn(const FfnTask& task) {
  const int64_t neurons = task.up.data != nullptr ? DOT_ROWS / 2 : DOT_ROWS;
  const int64_t block = skips_rows(task) ? SKIP_BLOCK : neurons;
  const int64_t begin = task.rows.begin, end = task.rows.end, tokens = task.x.tokens;
  float h[SKIP_BLOCK * MAX_TOKENS];
  int32_t active[SKIP_BLOCK + ADD_ROWS];
  const float none[MAX_TOKENS] = {};
  RowRef rows[DOT_ROWS], next[DOT_ROWS];
  const bool known = task.gate.data == nullptr;
  if (begin >= end) return;
  if (!known) rows_of(task, begin, rows);
  for (int64_t start = begin; start < end; start += block) {
    const int64_t count = smaller(block, end - start);
    for (int64_t i = 0; known && i < count; ++i) h[i * MAX_TOKENS] = task.up_values[start + i];
    for (int64_t i = 0; !known && i < count; i += neurons) {
      rows_of(task, smaller(start + i + neurons, end - 1), next);
      Products::prefetch_scales(next, DOT_ROWS, task.gate.row_scales);
      token_blocks(tokens, ActivationsOf<Products>{task, rows, next, start + i, h + i * MAX_TOKENS});
      __builtin_memcpy(rows, next, sizeof(rows));
    }
    int64_t actives = 0;
    for (int64_t i = 0; i < count; ++i) {
      active[actives] = int32_t(i);
      actives += !skips_rows(task) || any_nonzero(h + i * MAX_TOKENS, tokens);
    }
    RowRef down[ADD_ROWS], next_down[ADD_ROWS];
    const float* factors[ADD_ROWS];
    for (int64_t a = 0; a < actives; a += ADD_ROWS) {
      for (int64_t i = 0; i < ADD_ROWS; ++i) {
        const int64_t here = active[smaller(a + i, actives - 1)];
        factors[i] = a + i < actives ? h + here * MAX_TOKENS : none;
        down[i] = row_at(task.down, row_number(task.rows, start + here));
        // The rows of the next group: in this block, or (nothing skipped) the first ones of the block that follows.
        const int64_t ahead = a + ADD_ROWS + i;
        const int64_t position = ahead < actives ? start + active[ahead] : start + count + ahead - actives;
        next_down[i] = skips_rows(task) && ahead >= actives
                           ? down[i]
                           : row_at(task.down, row_number(task.rows, smaller(position, end - 1)));
      }
      Products::prefetch_scales(next_down, ADD_ROWS, task.down.row_scales);
      token_blocks(tokens, AddGroup<Products>{task, down, next_down, factors});
    }
  }
}

}  // namespace PARTINFER_ISA
}  // namespace partinfer
