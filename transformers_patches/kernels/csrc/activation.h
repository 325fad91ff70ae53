// Activation functions over a few floats; loops without branches, so that the compiler can vectorise them.
#pragma once

#include <math.h>

#include "isa.h"

namespace partinfer {
namespace PARTINFER_ISA {

// e^x to about 1e-7 relative: x = k ln 2 + r, then a polynomial (Cephes' expf coefficients) and 2^k.
inline float fast_exp(float x) {
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // rounds to the nearest integer in the low mantissa bits
  const float k = shifted - 12582912.0f;
  const float r = x - k * 0.693359375f + k * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float power = bits_to_float((float_to_bits(shifted) - 0x4b400000u + 127u) << 23);
  return (p * r * r + r + 1.0f) * power;
}

// values[i] = activation(values[i])
inline void activate(Activation activation, float* values, int64_t count) {
  switch (activation) {
    case Activation::SILU:
      for (int64_t i = 0; i < count; ++i) values[i] = values[i] / (1.0f + fast_exp(-values[i]));
      return;
    case Activation::GELU:
      for (int64_t i = 0; i < count; ++i) values[i] = 0.5f * values[i] * (1.0f + erff(values[i] * 0.70710678f));
      return;
    case Activation::GELU_TANH:
      // 0.5 x (1 + tanh z) = x sigmoid(2 z)
      for (int64_t i = 0; i < count; ++i) {
        const float x = values[i];
        values[i] = x / (1.0f + fast_exp(-1.5957691216f * (x + 0.044715f * x * x * x)));
      }
      return;
    case Activation::RELU:
      for (int64_t i = 0; i < count; ++i) values[i] = values[i] < 0.0f ? 0.0f : values[i];
      return;
    case Activation::RELU2:
      for (int64_t i = 0; i < count; ++i) values[i] = values[i] < 0.0f ? 0.0f : values[i] * values[i];
      return;
    case Activation::CLAMPED_SILU:
      for (int64_t i = 0; i < count; ++i) {
        const float x = values[i] > CLAMP ? CLAMP : values[i];
        values[i] = x / (1.0f + fast_exp(-1.702f * x));
      }
      return;
  }
}

}  // namespace PARTINFER_ISA
}  // namespace partinfer
