// Float rows to int8 and int4 and back: for loading, and for matrix products of many tokens.
#include "isa.h"
#include "variants.h"

namespace partinfer {
namespace PARTINFER_ISA {
namespace {

constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding and taking it away rounds to an integer, half to even
constexpr int CANDIDATES = 13;        // scales that a search tries: 0.80, 0.82, … 1.04 times the exact one

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

template <int BITS>
inline float square_error(const float* x, float scale) {
  float rounded[GROUP], parts[16] = {};
  round_group<BITS>(x, scale, rounded);
  for (int i = 0; i < GROUP; i += 16)
    for (int j = 0; j < 16; ++j) {
      const float error = x[i + j] - rounded[i + j] * scale;
      parts[j] += error * error;
    }
  float total = 0.0f;
  for (int j = 0; j < 16; ++j) total += parts[j];
  return total;
}

template <int BITS>
inline float best_scale(const float* x, float exact) {
  float best = exact, least = 3.4e38f;
  for (int c = 0; c < CANDIDATES; ++c) {
    const float candidate = round_to_half(exact * (0.8f + 0.02f * float(c)));
    const float error = square_error<BITS>(x, candidate);
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
      out[i] = char((int32_t(values[i]) + 8) | (int32_t(values[i + GROUP / 2]) + 8) << 4);
  }
}

template <int BITS>
inline void unpack_group(const char* bytes, float scale, float* out) {
  if constexpr (BITS == 8) {
    for (int i = 0; i < GROUP; ++i) out[i] = scale * float(int8_t(bytes[i]));
  } else {
    for (int i = 0; i < GROUP / 2; ++i) {
      const int32_t byte = int32_t(uint8_t(bytes[i]));
      out[i] = scale * float((byte & 15) - 8);
      out[i + GROUP / 2] = scale * float((byte >> 4) - 8);
    }
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

inline void store_group(char* floats, Type type, int64_t at, const float* values) {
  for (int i = 0; i < GROUP; i += LANES) {
    if (type == Type::F32)
      store(reinterpret_cast<float*>(floats) + at + i, load(values + i));
    else if (type == Type::BF16)
      store(reinterpret_cast<bf16_t*>(floats) + at + i, load(values + i));
    else
      store(reinterpret_cast<f16_t*>(floats) + at + i, load(values + i));
  }
}

template <int BITS>
void quantise(const ConvertTask& task) {
  constexpr int GROUP_BYTES = BITS == 8 ? 32 : 16;
  const int64_t groups = task.hidden / GROUP;
  for (int64_t group = task.begin * groups; group < task.end * groups; ++group) {
    alignas(64) float x[GROUP], rounded[GROUP];
    load_group(task.floats, task.float_type, group * GROUP, x);
    float scale = exact_scale<BITS>(x);
    if (task.search) scale = best_scale<BITS>(x, scale);
    task.scales[group] = to_f16(scale).bits;
    round_group<BITS>(x, scale, rounded);
    pack_group<BITS>(rounded, task.data + group * GROUP_BYTES);
  }
}

template <int BITS>
void dequantise(const ConvertTask& task) {
  constexpr int GROUP_BYTES = BITS == 8 ? 32 : 16;
  const int64_t groups = task.hidden / GROUP;
  for (int64_t group = task.begin * groups; group < task.end * groups; ++group) {
    alignas(64) float x[GROUP];
    unpack_group<BITS>(task.data + group * GROUP_BYTES, to_float(f16_t{task.scales[group]}), x);
    store_group(task.floats, task.float_type, group * GROUP, x);
  }
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
