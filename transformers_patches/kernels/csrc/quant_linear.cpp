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

void prepare_quant(Type weights, const float* x, int64_t tokens, int64_t hidden, const Input& layout, int8_t* q,
                   float* scales, float* corrections) {
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
  }
}

}  // namespace PARTINFER_ISA
}  // namespace partinfer
