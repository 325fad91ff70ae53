// Float rows to int8 and int4 and back: for loading, and for matrix products of many tokens.
#include "isa.h"
#include "variants.h"

namespace partinfer {
namespace PARTINFER_ISA {
namespace {

constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding and taking it away rounds to an integer, half to even

// Scales that are tried: FIRST, FIRST + STEP, … times the exact one, which is among them, so that what is quantised already
// stays as it is. Large values, of which int4 has few, count most there.
template <int BITS>
struct Search {
  static constexpr int CANDIDATES = 9;
  static constexpr float FIRST = 0.992f, STEP = 0.008f;
};
template <>
struct Search<4> {
  static constexpr int CANDIDATES = 13;
  static constexpr float FIRST = 0.8f, STEP = 0.02f;
};

inline float round_to_half(float value) { return to_float(to_f16(value)); }

// The scale with which a group's largest value is exact (int4: as -8).
template <int BITS>
inline float exact_scale(const float* x) {
  float lowest = x[0], highest = x[0];
  for (int i = 1; i < GROUP; ++i) {
    lowest = x[i] < lowest ? x[i] : lowest;
    highest = x[i] > highest ? x[i] : highest;
  }
  const float extreme = highest > -lowest ? highest : lowest;
  if constexpr (BITS == 8) return round_to_half((extreme < 0 ? -extreme : extreme) / 127.0f);
  return round_to_half(extreme * (-1.0f / 8.0f));
}

template <int BITS>
inline void round_group(const float* x, float scale, float* out) {
  constexpr float LOWEST = BITS == 8 ? -127.0f : -8.0f, HIGHEST = BITS == 8 ? 127.0f : 7.0f;
  const float inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
  for (int i = 0; i < GROUP; ++i) {
    float value = x[i] * inverse;
    value = value < LOWEST ? LOWEST : value;
    value = value > HIGHEST ? HIGHEST : value;
    out[i] = (value + ROUND) - ROUND;
  }
}

// Square errors of a group, weighted.
template <int BITS>
inline float weighted_error(const float* x, const float* importance, float scale) {
  float rounded[GROUP], parts[16] = {};
  round_group<BITS>(x, scale, rounded);
  for (int i = 0; i < GROUP; i += 16)
    for (int j = 0; j < 16; ++j) {
      const float error = x[i + j] - rounded[i + j] * scale;
      parts[j] += error * error * importance[i + j];
    }
  float total = 0.0f;
  for (int j = 0; j < 16; ++j) total += parts[j];
  return total;
}

// The scale with the least square error, weighted with the columns' weights, if any, and of int4 with the size of what is rounded.
template <int BITS>
inline float best_scale(const float* x, float exact, const float* column_weights) {
  alignas(64) float importance[GROUP];
  for (int i = 0; i < GROUP; ++i) importance[i] = BITS == 8 ? 1.0f : x[i] < 0 ? -x[i] : x[i];
  if (column_weights)
    for (int i = 0; i < GROUP; ++i) importance[i] *= column_weights[i];
  float best = exact, least = 3.4e38f;
  for (int c = 0; c < Search<BITS>::CANDIDATES; ++c) {
    const float candidate = round_to_half(exact * (Search<BITS>::FIRST + Search<BITS>::STEP * float(c)));
    const float error = weighted_error<BITS>(x, importance, candidate);
    best = error < least ? candidate : best;
    least = error < least ? error : least;
  }
  return best;
}

template <int BITS>
inline void pack_group(const float* values, char* out) {
  if constexpr (BITS == 8) {
    for (int i = 0; i < GROUP; ++i) out[i] = char(int8_t(values[i]));
  } else {
    for (int i = 0; i < GROUP / 2; ++i)
      out[i] = char(uint32_t(int32_t(values[i]) + 8) | uint32_t(int32_t(values[i + GROUP / 2]) + 8) << 4);
  }
}

inline void load_group(const char* floats, Type type, int64_t at, float* out) {
  for (int i = 0; i < GROUP; i += LANES) {
    if (type == Type::F32)
      store(out + i, load(reinterpret_cast<const float*>(floats) + at + i));
    else if (type == Type::BF16)
      store(out + i, load(reinterpret_cast<const bf16_t*>(floats) + at + i));
    else
      store(out + i, load(reinterpret_cast<const f16_t*>(floats) + at + i));
  }
}

template <int BITS>
constexpr int GROUP_BYTES = BITS == 8 ? 32 : 16;

// f(row, group of the row)
template <class Function>
inline void for_groups(const ConvertTask& task, const Function& f) {
  for (int64_t row = task.begin; row < task.end; ++row)
    for (int64_t group = 0; group < task.hidden / GROUP; ++group) f(row, group);
}

template <int BITS>
void quantise(const ConvertTask& task) {
  const float* weights = task.column_weights;
  for_groups(task, [&](int64_t row, int64_t group) {
    alignas(64) float x[GROUP], rounded[GROUP];
    load_group(task.floats, task.float_type, row * task.hidden + group * GROUP, x);
    float scale = exact_scale<BITS>(x);
    if (BITS == 4 || weights) scale = best_scale<BITS>(x, scale, weights ? weights + group * GROUP : nullptr);
    task.scales[row * task.row_scales + group] = to_f16(scale).bits;
    round_group<BITS>(x, scale, rounded);
    pack_group<BITS>(rounded, task.data + row * task.row_bytes + group * GROUP_BYTES<BITS>);
  });
}

template <class T>
inline void unpack_group(const int8_t* values, F scale, T* out) {
  for (int i = 0; i < GROUP; i += LANES) store(out + i, mul(load(values + i), scale));
}

// (q - 8) * scale as q * scale - 8 * scale, which is exact until it is rounded once.
template <class T>
inline void unpack_group(const char* nibbles, F scale, T* out) {
  const F least = mul(scale, set1(-float(U4_OFFSET)));
  for (int i = 0; i < GROUP / 2; i += LANES) {
    F low, high;
    load_nibbles(nibbles + i, low, high);
    store(out + i, fma(low, scale, least));
    store(out + GROUP / 2 + i, fma(high, scale, least));
  }
}

template <int BITS, class T>
void dequantise_to(const ConvertTask& task) {
  for_groups(task, [&](int64_t row, int64_t group) {
    const F scale = set1(to_float(f16_t{task.scales[row * task.row_scales + group]}));
    T* out = reinterpret_cast<T*>(task.floats) + row * task.hidden + group * GROUP;
    const char* packed = task.data + row * task.row_bytes + group * GROUP_BYTES<BITS>;
    if constexpr (BITS == 8)
      unpack_group(reinterpret_cast<const int8_t*>(packed), scale, out);
    else
      unpack_group(packed, scale, out);
  });
}

template <int BITS>
void dequantise(const ConvertTask& task) {
  if (task.float_type == Type::F32)
    dequantise_to<BITS, float>(task);
  else if (task.float_type == Type::BF16)
    dequantise_to<BITS, bf16_t>(task);
  else
    dequantise_to<BITS, f16_t>(task);
}

}  // namespace

void quantise_rows(const ConvertTask& task) {
  if (task.type == Type::Q8)
    quantise<8>(task);
  else
    quantise<4>(task);
}

void dequantise_rows(const ConvertTask& task) {
  if (task.type == Type::Q8)
    dequantise<8>(task);
  else
    dequantise<4>(task);
}

}  // namespace PARTINFER_ISA
}  // namespace partinfer
