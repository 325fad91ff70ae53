#include "input.h"

#include <cstring>

namespace partinfer {
namespace {

int64_t groups_of(int64_t hidden) { return (hidden + GROUP - 1) / GROUP; }
int64_t q_stride_of(int64_t hidden) { return groups_of(hidden) * GROUP + 2 * PAD; }
int64_t scale_stride_of(int64_t hidden) { return groups_of(hidden) + PAD; }

}  // namespace

size_t input_bytes(int64_t tokens, int64_t hidden) {
  return Scratch::padded(size_t(tokens * hidden) * sizeof(float)) + Scratch::padded(size_t(tokens * q_stride_of(hidden))) +
         2 * Scratch::padded(size_t(tokens * scale_stride_of(hidden)) * sizeof(float)) +
         Scratch::padded(size_t(tokens * FINE_PAIRS) * sizeof(FinePair));
}

const float* as_float32(const Kernels& kernels, const char* values, Type type, int64_t count, Scratch& scratch) {
  if (type == Type::F32) return reinterpret_cast<const float*>(values);
  float* wide = scratch.take<float>(count);
  kernels.widen(type, values, count, wide);
  return wide;
}

Input prepare(const Kernels& kernels, Type weights, const char* x, Type x_type, int64_t first, int64_t tokens,
              int64_t hidden, Scratch& scratch) {
  Input input;
  input.tokens = tokens;
  input.hidden = hidden;
  const char* start = x + first * hidden * element_size(x_type);
  if (weights == Type::BF16 && x_type == Type::BF16 && *kernels.bf16_input) {
    input.bf16 = reinterpret_cast<const bf16_t*>(start);
    return input;
  }
  input.f32 = as_float32(kernels, start, x_type, tokens * hidden, scratch);
  if (weights != Type::Q8 && weights != Type::Q4) return input;
  input.q_stride = q_stride_of(hidden);
  input.scale_stride = scale_stride_of(hidden);
  // Zeroed, because kernels read whole vectors past the last group.
  int8_t* q = scratch.take<int8_t>(tokens * input.q_stride);
  float* scales = scratch.take<float>(tokens * input.scale_stride);
  float* corrections = scratch.take<float>(tokens * input.scale_stride);
  std::memset(q, 0, size_t(tokens * input.q_stride));
  std::memset(scales, 0, size_t(tokens * input.scale_stride) * sizeof(float));
  std::memset(corrections, 0, size_t(tokens * input.scale_stride) * sizeof(float));
  FinePair* fine = weights == Type::Q8 && groups_of(hidden) > 1 ? scratch.take<FinePair>(tokens * FINE_PAIRS) : nullptr;
  kernels.prepare_quant(weights, input.f32, tokens, hidden, input, q, scales, corrections, fine);
  input.fine = fine;
  input.q = q;
  input.scales = scales;
  input.corrections = corrections;
  return input;
}

}  // namespace partinfer
