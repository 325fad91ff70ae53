// Matrix-vector products over a range of rows, for any kind of rows (float_rows.h, quant_rows.h).
#pragma once

#include "ffn_loop.h"

namespace partinfer {
namespace PARTINFER_ISA {

inline void linear_rows_of(const LinearTask& task, int64_t position, RowRef* rows) {
  for (int i = 0; i < DOT_ROWS; ++i)
    rows[i] = row_at(task.weight, row_number(task.rows, smaller(position + i, task.rows.end - 1)));
}

template <class Products, int T>
inline void dot_group(bool run, const RowRef* rows, const RowRef* next, const Input& x, int64_t first,
                      float (*products)[T]) {
  if constexpr (Products::RUNS) {
    if (run) return Products::template dot_run<DOT_ROWS, T>(rows, next[0], x, first, products);
  }
  Products::template dot<DOT_ROWS, T>(rows, next, x, first, products);
}

// Neighbouring outputs of one token.
template <class Out>
inline void store_values(char* out, int64_t first, const float* values, int64_t count) {
  Out* place = reinterpret_cast<Out*>(out) + first;
  for (int64_t i = 0; i < count; i += LANES) store_part(place + i, load_part(values + i, count - i), count - i);
}

inline void store_values(char* out, Type type, int64_t first, const float* values, int64_t count) {
  switch (type) {
    case Type::BF16:
      return store_values<bf16_t>(out, first, values, count);
    case Type::F16:
      return store_values<f16_t>(out, first, values, count);
    default:
      return store_values<float>(out, first, values, count);
  }
}

template <class Products>
struct LinearGroup {
  const LinearTask& task;
  const RowRef *rows, *next;
  int64_t position;
  template <int T>
  void operator()(int64_t first) const {
    float products[DOT_ROWS][T];
    dot_group<Products, T>(one_run(task.rows), rows, next, task.x, first, products);
    const int64_t count = smaller(DOT_ROWS, task.rows.end - position);
    if constexpr (T == 1) {
      if (task.bias.data == nullptr)
        return store_values(task.out, task.out_type, first * task.out_stride + position, products[0], count);
    }
    for (int64_t i = 0; i < count; ++i) {
      const float bias = task.bias.data == nullptr ? 0.0f : element(task.bias, row_number(task.rows, position + i));
      for (int64_t t = 0; t < T; ++t)
        store_element(task.out, task.out_type, (first + t) * task.out_stride + position + i, products[i][t] + bias);
    }
  }
};

template <class Products>
inline void linear(const LinearTask& task) {
  RowRef rows[DOT_ROWS], next[DOT_ROWS];
  if (task.rows.begin >= task.rows.end) return;
  linear_rows_of(task, task.rows.begin, rows);
  for (int64_t position = task.rows.begin; position < task.rows.end; position += DOT_ROWS) {
    linear_rows_of(task, smaller(position + DOT_ROWS, task.rows.end - 1), next);
    Products::prefetch_scales(next, DOT_ROWS, task.weight.row_scales);
    token_blocks(task.x.tokens, LinearGroup<Products>{task, rows, next, position});
    __builtin_memcpy(rows, next, sizeof(rows));
  }
}

}  // namespace PARTINFER_ISA
}  // namespace partinfer
