// One pass over the active neurons of an FFN, for any kind of rows (float_rows.h, quant_rows.h).
#pragma once

#include "activation.h"
#include "isa.h"

namespace partinfer {
namespace PARTINFER_ISA {

constexpr int DOT_ROWS = 8;     // rows whose products are taken together: 4 of gate and 4 of up, or 8 of fc1
constexpr int BLOCK = 256;      // neurons computed before the rows of down that ReLU left are read
constexpr int RUN_BLOCK = 128;  // neurons computed before their rows of down are read where rows follow each other

// Whether h is 0 for most neurons, so that it pays to compute many before reading any row of down.
inline bool skips_rows(const FfnTask& task) {
  return task.activation == Activation::RELU || task.activation == Activation::RELU2 || task.down_size != nullptr;
}

// Sets h of one token to 0 where it is small.
inline void drop_small(const FfnTask& task, int64_t start, int64_t count, float* h) {
  for (int64_t i = 0; i < count; ++i) {
    const float value = h[i * MAX_TOKENS];
    const float size = (value < 0.0f ? -value : value) * task.down_size[row_number(task.rows, start + i)];
    if (!(size > task.down_threshold)) h[i * MAX_TOKENS] = 0.0f;
  }
}

inline float known_value(const FfnTask& task, int64_t token, int64_t position) {
  return task.up_values[token * task.value_stride + position];
}

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
      if (task.up_values != nullptr) value *= known_value(task, first + t, smaller(position + i, task.rows.end - 1));
      h[i * MAX_TOKENS + first + t] = value;
    }
}

template <class Products, int T>
inline void add_group(const FfnTask& task, const RowRef* rows, const RowRef* next, int64_t count,
                      const float* const* h, int64_t first) {
  float factors[Products::ADD_ROWS][T];
  for (int i = 0; i < Products::ADD_ROWS; ++i)
    for (int t = 0; t < T; ++t) factors[i][t] = h[i][first + t];
  float* y = task.y + first * task.y_stride;
  Products::template add_rows<T>(rows, next, count, factors, y, task.y_stride, task.x.hidden);
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
  int64_t count;
  const float* const* h;
  template <int T>
  void operator()(int64_t first) const {
    add_group<Products, T>(task, rows, next, count, h, first);
  }
};

inline bool any_nonzero(const float* h, int64_t tokens) {
  for (int64_t t = 0; t < tokens; ++t)
    if (h[t] != 0.0f) return true;
  return false;
}

// Products of one matrix with x for rows that follow each other: out[t * BLOCK + i] = row i · x[t] + bias. The rows are
// read one after the other; `then` is what is read next.
template <class Products>
struct RunGroup {
  const FfnTask& task;
  const RowRef *rows, &then;
  int64_t count;
  float* out;
  template <int T>
  void operator()(int64_t first) const {
    float products[DOT_ROWS][T];
    Products::template dot_run<DOT_ROWS, T>(rows, then, task.x, first, products);
    for (int64_t i = 0; i < count; ++i)
      for (int t = 0; t < T; ++t) out[(first + t) * BLOCK + i] = products[i][t];
  }
};

template <class Products>
inline void run_products(const FfnTask& task, const Matrix& matrix, const Vector& bias, int64_t start, int64_t count,
                         const RowRef& then, float* out) {
  for (int64_t i = 0; i < count; i += DOT_ROWS) {
    RowRef rows[DOT_ROWS];
    for (int64_t r = 0; r < DOT_ROWS; ++r) rows[r] = row_at(matrix, start + smaller(i + r, count - 1));
    const RowRef following = i + DOT_ROWS < count ? row_at(matrix, start + i + DOT_ROWS) : then;
    token_blocks(task.x.tokens, RunGroup<Products>{task, rows, following, smaller(DOT_ROWS, count - i), out + i});
  }
  if (bias.data == nullptr) return;
  for (int64_t t = 0; t < task.x.tokens; ++t)
    for (int64_t i = 0; i < count; ++i) out[t * BLOCK + i] += element(bias, start + i);
}

// h[neuron][token] of `count` neurons whose rows follow each other.
template <class Products>
inline void run_activations(const FfnTask& task, int64_t start, int64_t count, float* h) {
  alignas(64) float gate[MAX_TOKENS * BLOCK], up[MAX_TOKENS * BLOCK];
  const bool gated = task.up.data != nullptr;
  const RowRef down = row_at(task.down, start);
  run_products<Products>(task, task.gate, task.gate_bias, start, count, gated ? row_at(task.up, start) : down, gate);
  if (gated) run_products<Products>(task, task.up, task.up_bias, start, count, down, up);
  for (int64_t t = 0; t < task.x.tokens; ++t) {
    activate(task.activation, gate + t * BLOCK, count);
    for (int64_t i = 0; i < count; ++i) {
      float value = gate[t * BLOCK + i];
      if (gated) value *= up[t * BLOCK + i];
      if (task.up_values != nullptr) value *= known_value(task, t, start + i);
      h[i * MAX_TOKENS + t] = value;
    }
  }
}

// h[neuron][token] of `count` neurons anywhere, unless it is known. rows: those of the first group, and afterwards those that come next.
template <class Products>
inline void list_activations(const FfnTask& task, int64_t start, int64_t count, RowRef* rows, float* h) {
  const int64_t neurons = task.up.data != nullptr ? DOT_ROWS / 2 : DOT_ROWS;
  RowRef next[DOT_ROWS];
  if (task.gate.data == nullptr) {
    for (int64_t t = 0; t < task.x.tokens; ++t)
      for (int64_t i = 0; i < count; ++i) h[i * MAX_TOKENS + t] = known_value(task, t, start + i);
    return;
  }
  for (int64_t i = 0; i < count; i += neurons) {
    rows_of(task, smaller(start + i + neurons, task.rows.end - 1), next);
    Products::prefetch_scales(next, DOT_ROWS, task.gate.row_scales);
    token_blocks(task.x.tokens, ActivationsOf<Products>{task, rows, next, start + i, h + i * MAX_TOKENS});
    __builtin_memcpy(rows, next, sizeof(next));
  }
}

// As ffn, where h is known and none of it is left out: nothing but rows of down is read.
template <class Products>
struct AddKnown {
  const FfnTask& task;
  const RowRef *rows, *next;
  int64_t start, count;
  template <int T>
  void operator()(int64_t first) const {
    float factors[Products::ADD_ROWS][T];
    for (int t = 0; t < T; ++t) {
      const float* h = task.up_values + (first + t) * task.value_stride + start;
      for (int i = 0; i < Products::ADD_ROWS; ++i) factors[i][t] = i < count ? h[i] : 0.0f;
    }
    Products::template add_rows<T>(rows, next, count, factors, task.y + first * task.y_stride, task.y_stride, task.x.hidden);
  }
};

template <class Products>
inline void add_known(const FfnTask& task) {
  constexpr int ADD_ROWS = Products::ADD_ROWS;
  const int64_t end = task.rows.end;
  RowRef rows[ADD_ROWS], next[ADD_ROWS];
  const auto rows_from = [&](int64_t position, RowRef* out) {
    for (int64_t i = 0; i < ADD_ROWS; ++i) out[i] = row_at(task.down, row_number(task.rows, smaller(position + i, end - 1)));
  };
  if (task.rows.begin >= end) return;
  rows_from(task.rows.begin, rows);
  for (int64_t start = task.rows.begin; start < end; start += ADD_ROWS) {
    rows_from(start + ADD_ROWS, next);
    Products::prefetch_scales(next, ADD_ROWS, task.x.hidden / GROUP);
    token_blocks(task.x.tokens, AddKnown<Products>{task, rows, next, start, smaller(ADD_ROWS, end - start)});
    __builtin_memcpy(rows, next, sizeof(next));
  }
}

template <class Products>
inline void ffn(const FfnTask& task) {
  constexpr int ADD_ROWS = Products::ADD_ROWS;  // rows of down that are added together
  const bool known = task.gate.data == nullptr, skips = skips_rows(task);
  if (known && !skips) return add_known<Products>(task);
  const bool run = Products::RUNS && one_run(task.rows) && !known;
  const int64_t group = task.up.data != nullptr ? DOT_ROWS / 2 : DOT_ROWS;
  const int64_t block = skips ? BLOCK : run ? RUN_BLOCK : group > ADD_ROWS ? group : ADD_ROWS;
  const int64_t begin = task.rows.begin, end = task.rows.end;
  float h[BLOCK * MAX_TOKENS];
  int32_t active[BLOCK + ADD_ROWS];
  const float none[MAX_TOKENS] = {};
  RowRef rows[DOT_ROWS];
  if (begin >= end) return;
  if (!run && !known) rows_of(task, begin, rows);
  for (int64_t start = begin; start < end; start += block) {
    const int64_t count = smaller(block, end - start);
    if constexpr (Products::RUNS) {
      if (run) run_activations<Products>(task, start, count, h);
    }
    if (!run) list_activations<Products>(task, start, count, rows, h);
    if (task.down_size != nullptr) drop_small(task, start, count, h);
    int64_t actives = 0;
    for (int64_t i = 0; i < count; ++i) {
      active[actives] = int32_t(i);
      actives += !skips || any_nonzero(h + i * MAX_TOKENS, task.x.tokens);
    }
    if (task.down_read != nullptr) __atomic_fetch_add(task.down_read, actives, __ATOMIC_RELAXED);
    RowRef down[ADD_ROWS], next[ADD_ROWS];
    const float* factors[ADD_ROWS];
    for (int64_t a = 0; a < actives; a += ADD_ROWS) {
      for (int64_t i = 0; i < ADD_ROWS; ++i) {
        const int64_t here = active[smaller(a + i, actives - 1)], ahead = a + ADD_ROWS + i;
        factors[i] = a + i < actives ? h + here * MAX_TOKENS : none;
        down[i] = row_at(task.down, row_number(task.rows, start + here));
        // What is read next: this block's next rows of down, or how the block that follows begins.
        if (ahead < actives)
          next[i] = row_at(task.down, row_number(task.rows, start + active[ahead]));
        else if (skips)
          next[i] = down[i];
        else
          next[i] = row_at(run ? task.gate : task.down,
                           row_number(task.rows, smaller(start + count + ahead - actives, end - 1)));
      }
      Products::prefetch_scales(next, ADD_ROWS, task.x.hidden / GROUP);
      token_blocks(task.x.tokens, AddGroup<Products>{task, down, next, smaller(ADD_ROWS, actives - a), factors});
    }
  }
}

}  // namespace PARTINFER_ISA
}  // namespace partinfer
