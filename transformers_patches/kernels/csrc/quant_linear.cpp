// Matrix-vector products with int8 and int4 weights, and the input's quantisation.
#include "linear_loop.h"
#include "quant_rows.h"
#include "variants.h"

namespace partinfer {
namespace PARTINFER_ISA {

void linear_quant(const LinearTask& task) {
  if (task.type == Type::Q8)
    linear<QuantRows<8>>(task);
  else
    linear<QuantRows<4>>(task);
}

// One group of the input: 32 values to int8 with the scale largest / 127.
inline float quantise_group(const float* x, int8_t* q) {
  constexpr float ROUND = 12582912.0f;
  uint32_t largest_bits = 0;  // sizes of floats compare like their bits, and integers vectorise
  for (int i = 0; i < GROUP; ++i) {
    const uint32_t bits = float_to_bits(x[i]) & 0x7fffffffu;
    largest_bits = bits > largest_bits ? bits : largest_bits;
  }
  const float largest = bits_to_float(largest_bits);
  const float inverse = 127.0f / (largest > 1e-30f ? largest : 1e-30f);
  for (int i = 0; i < GROUP; ++i) q[i] = int8_t(float_to_bits(x[i] * inverse + ROUND) - 0x4b400000u);
  return largest * (1.0f / 127.0f);
}

// The FINE_PAIRS pairs of groups with the coarsest scales, of a token's x and its first rounding.
inline void prepare_fine(const float* x, const int8_t* q, const float* scales, int64_t groups, FinePair* fine) {
  int64_t chosen[FINE_PAIRS];
  float sizes[FINE_PAIRS];
  for (int64_t e = 0; e < FINE_PAIRS; ++e) chosen[e] = -1, sizes[e] = 0.0f;
  for (int64_t g = 0; g < groups; g += 2) {
    const float second = g + 1 < groups ? scales[g + 1] : 0.0f;
    float size = scales[g] * scales[g] + second * second;
    int64_t pair = g;
    for (int64_t e = 0; e < FINE_PAIRS; ++e) {
      if (size <= sizes[e]) continue;
      const float lower = sizes[e];
      const int64_t other = chosen[e];
      sizes[e] = size, chosen[e] = pair;
      size = lower, pair = other;
    }
  }
  for (int64_t e = 0; e < FINE_PAIRS; ++e) {
    FinePair& out = fine[e];
    __builtin_memset(&out, 0, sizeof(out));
    if (chosen[e] < 0) continue;
    out.group = smaller(chosen[e], groups - 2);  // of an odd number of groups the last one has none behind it
    for (int64_t i = chosen[e] - out.group; i < 2; ++i) {
      const int64_t first = (out.group + i) * GROUP;
      float left[GROUP];
      for (int64_t j = 0; j < GROUP; ++j) left[j] = x[first + j] - scales[out.group + i] * float(q[first + j]);
      out.scales[i] = quantise_group(left, out.q + i * GROUP);
      int32_t sum = 0;
      for (int64_t j = 0; j < GROUP; ++j) sum += out.q[i * GROUP + j];
      out.start[i * GROUP / 4] = -sum * S8_OFFSET;
    }
  }
}

void prepare_quant(Type weights, const float* x, int64_t tokens, int64_t hidden, const Input& layout, int8_t* q,
                   float* scales, float* corrections, FinePair* fine) {
  const int64_t half = hidden / 2;
  for (int64_t t = 0; t < tokens; ++t) {
    int8_t* row = q + t * layout.q_stride;
    for (int64_t g = 0; g < hidden / GROUP; ++g) {
      int8_t group[GROUP];
      const float scale = quantise_group(x + t * hidden + g * GROUP, group);
      int32_t sum = 0;
      for (int i = 0; i < GROUP; ++i) sum += group[i];
      scales[t * layout.scale_stride + g] = scale;
      corrections[t * layout.scale_stride + g] = -float(sum * (weights == Type::Q8 ? S8_OFFSET : U4_OFFSET)) * scale;
      if (weights == Type::Q8) {
        __builtin_memcpy(row + g * GROUP, group, GROUP);
      } else {
        __builtin_memcpy(row + g * 16, group, 16);
        __builtin_memcpy(row + half + g * 16, group + 16, 16);
      }
    }
    if (fine != nullptr)
      prepare_fine(x + t * hidden, row, scales + t * layout.scale_stride, hidden / GROUP, fine + t * FINE_PAIRS);
  }
}

}  // namespace PARTINFER_ISA
}  // namespace partinfer
