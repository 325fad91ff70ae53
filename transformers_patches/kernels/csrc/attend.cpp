// What a decoder layer does for one token beside its matrix products: norms, rotations, attention over the cache.
#include "activation.h"
#include "float_rows.h"
#include "linear_loop.h"
#include "variants.h"

namespace partinfer {
namespace PARTINFER_ISA {

template <class T>
inline float total(const T* values, int64_t count) {
  F lanes = zero();
  for (int64_t i = 0; i < count; i += LANES) lanes = add(lanes, load_part(values + i, smaller(LANES, count - i)));
  return sum(lanes);
}

// Of the distances from `mean`.
template <class T>
inline float total_of_squares(const T* values, int64_t count, float mean) {
  const F minus_mean = set1(-mean);
  F lanes = zero();
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    const F distance = add(load(values + i), minus_mean);
    lanes = fma(distance, distance, lanes);
  }
  float rest = 0.0f;
  for (; i < count; ++i) rest += (to_float(values[i]) - mean) * (to_float(values[i]) - mean);
  return sum(lanes) + rest;
}

template <class T>
inline void norm_of(const NormTask& task) {
  const T* x = reinterpret_cast<const T*>(task.x);
  const T* delta = reinterpret_cast<const T*>(task.delta);
  const T* weight = reinterpret_cast<const T*>(task.norm.weight);
  const T* bias = reinterpret_cast<const T*>(task.norm.bias);
  T* added = reinterpret_cast<T*>(task.sum);
  T* out = reinterpret_cast<T*>(task.out);
  const T* values = x;
  if (delta != nullptr) {
    for (int64_t i = 0; i < task.count; i += LANES) {
      const int64_t count = smaller(LANES, task.count - i);
      store_part(added + i, add(load_part(x + i, count), load_part(delta + i, count)), count);
    }
    values = added;  // as they were rounded
  } else if (added != x && added != nullptr) {
    __builtin_memcpy(added, x, size_t(task.count) * sizeof(T));
  }
  const float mean = bias == nullptr ? 0.0f : total(values, task.count) / float(task.count);
  const float variance = total_of_squares(values, task.count, mean) / float(task.count);
  const F minus_mean = set1(-mean), factor = set1(1.0f / __builtin_sqrtf(variance + task.norm.eps));
  for (int64_t i = 0; i < task.count; i += LANES) {
    const int64_t count = smaller(LANES, task.count - i);
    const F normal = mul(add(load_part(values + i, count), minus_mean), factor), scale = load_part(weight + i, count);
    store_part(out + i, bias == nullptr ? mul(normal, scale) : fma(normal, scale, load_part(bias + i, count)), count);
  }
}

void norm(const NormTask& task) {
  switch (task.type) {
    case Type::BF16:
      return norm_of<bf16_t>(task);
    case Type::F16:
      return norm_of<f16_t>(task);
    default:
      return norm_of<float>(task);
  }
}

template <class T>
inline void rotate_of(T* head, const float* cosine, const float* sine, int64_t head_dim) {
  const int64_t half = head_dim / 2;
  for (int64_t i = 0; i < half; i += LANES) {
    const int64_t count = smaller(LANES, half - i);
    const F a = load_part(head + i, count), b = load_part(head + half + i, count);
    const F minus_b = mul(b, set1(-1.0f));
    store_part(head + i, fma(minus_b, load_part(sine + i, count), mul(a, load_part(cosine + i, count))), count);
    store_part(head + half + i,
               fma(a, load_part(sine + half + i, count), mul(b, load_part(cosine + half + i, count))), count);
  }
}

void rotate(Type type, char* head, const float* cosine, const float* sine, int64_t head_dim) {
  switch (type) {
    case Type::BF16:
      return rotate_of(reinterpret_cast<bf16_t*>(head), cosine, sine, head_dim);
    case Type::F16:
      return rotate_of(reinterpret_cast<f16_t*>(head), cosine, sine, head_dim);
    default:
      return rotate_of(reinterpret_cast<float*>(head), cosine, sine, head_dim);
  }
}

constexpr int ADD_ROWS = FLOAT_ADD_ROWS;

template <class T>
struct AddValues {
  const AttendTask& task;
  const RowRef *rows, *next;
  int64_t position;
  template <int TOKENS>
  void operator()(int64_t first) const {
    float factors[ADD_ROWS][TOKENS];
    for (int64_t r = 0; r < ADD_ROWS; ++r)
      for (int t = 0; t < TOKENS; ++t) {
        const int64_t place = position + r - task.begin;
        factors[r][t] = position + r < task.end ? task.scores[(first + t) * task.score_stride + place] : 0.0f;
      }
    FloatRows<T, float>::template add_rows<TOKENS>(rows, next, ADD_ROWS, factors, task.y + first * task.y_stride, task.y_stride,
                                                   task.head_dim);
  }
};

// As many values at once as a register holds: compilers don't reorder sums and comparisons of floats themselves.
template <class Combine>
inline float reduce(const float* values, int64_t count, float first, const Combine& combine) {
  float lanes[LANES];
  for (int l = 0; l < LANES; ++l) lanes[l] = first;
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES)
    for (int l = 0; l < LANES; ++l) lanes[l] = combine(lanes[l], values[i + l]);
  for (; i < count; ++i) lanes[0] = combine(lanes[0], values[i]);
  for (int l = 1; l < LANES; ++l) lanes[0] = combine(lanes[0], lanes[l]);
  return lanes[0];
}

// Scores become exponentials relative to the highest one, which is returned; total: their sum.
inline float exponentials(float* scores, int64_t count, float scale, float& total) {
  const float highest = reduce(scores, count, scores[0], [](float a, float b) { return a > b ? a : b; });
  for (int64_t i = 0; i < count; ++i) scores[i] = fast_exp((scores[i] - highest) * scale);
  total = reduce(scores, count, 0.0f, [](float a, float b) { return a + b; });
  return highest;
}

template <class T>
inline void attend_of(const AttendTask& task) {
  const int64_t row_bytes = task.head_dim * int64_t(sizeof(T)), count = task.end - task.begin;
  LinearTask products;
  products.type = task.type;
  products.weight = {task.keys + task.begin * row_bytes, nullptr, row_bytes, 0};
  products.rows = {count, nullptr, 0, count};
  products.x = task.q;
  products.out = reinterpret_cast<char*>(task.scores);
  products.out_stride = task.score_stride;
  linear_float(products);
  for (int64_t t = 0; t < task.q.tokens; ++t)
    task.highest[t] = exponentials(task.scores + t * task.score_stride, count, task.scale, task.total[t]);
  __builtin_memset(task.y, 0, size_t(task.q.tokens * task.y_stride) * sizeof(float));
  const Matrix values{task.values, nullptr, row_bytes, 0};
  RowRef rows[ADD_ROWS], next[ADD_ROWS];
  for (int64_t position = task.begin; position < task.end; position += ADD_ROWS) {
    for (int64_t r = 0; r < ADD_ROWS; ++r) {
      rows[r] = row_at(values, smaller(position + r, task.end - 1));
      next[r] = row_at(values, smaller(position + ADD_ROWS + r, task.end - 1));
    }
    token_blocks(task.q.tokens, AddValues<T>{task, rows, next, position});
  }
  for (int64_t t = 0; t < task.q.tokens; ++t) {
    const float* y = task.y + t * task.y_stride;
    float* out = task.out + t * task.head_dim;
    columns_in_order<T>(0, task.head_dim, task.head_dim, [&](int64_t place) { return load(y + place); },
                        [&](int64_t j, F values, int64_t count) { store_part(out + j, values, count); });
  }
}

void attend(const AttendTask& task) {
  switch (task.type) {
    case Type::BF16:
      return attend_of<bf16_t>(task);
    case Type::F16:
      return attend_of<f16_t>(task);
    default:
      return attend_of<float>(task);
  }
}

void gate_values(Activation activation, float* gate, const float* up, int64_t count) {
  activate(activation, gate, count);
  if (up == nullptr) return;
  for (int64_t i = 0; i < count; ++i) gate[i] *= up[i];
}

}  // namespace PARTINFER_ISA
}  // namespace partinfer
