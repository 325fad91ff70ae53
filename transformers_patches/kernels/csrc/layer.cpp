#include "layer.h"

#include <algorithm>

#include "attention.h"
#include "by_input.h"
#include "shared_ffn.h"

namespace partinfer {

LinearCall linear_call(const LayerWeight& weight, Type type, const char* x, char* out) {
  LinearCall call;
  call.type = weight.type;
  call.weight = weight.matrix;
  call.bias = weight.bias;
  call.rows = weight.rows;
  call.x = x;
  call.x_type = type;
  call.tokens = 1;
  call.hidden = weight.columns;
  call.out = out;
  return call;
}

namespace {

// float32 to any type.
void narrow(const Kernels& kernels, const float* values, int64_t count, Type type, char* out) {
  FinishTask task;
  task.y = values;
  task.tokens = 1;
  task.hidden = task.end = count;
  task.out = out;
  task.out_type = type;
  kernels.finish_float(task);
}

}  // namespace

void add_vector(const Kernels& kernels, Type type, char* y, const char* added, int64_t count) {
  static thread_local Scratch scratch;
  scratch.reserve(2 * Scratch::padded(size_t(count) * sizeof(float)));
  float* sum = scratch.take<float>(count);
  float* other = scratch.take<float>(count);
  kernels.widen(type, y, count, sum);
  kernels.widen(type, added, count, other);
  for (int64_t i = 0; i < count; ++i) sum[i] += other[i];
  narrow(kernels, sum, count, type, y);
}

void run_attention(const Kernels& kernels, const AttentionCall& call, int threads) {
  static thread_local Scratch scratch;
  const int64_t size = element_size(call.type), head_bytes = call.head_dim * size;
  const int64_t q_count = call.heads * call.head_dim, kv_count = call.kv_heads * call.head_dim;
  scratch.reserve(3 * Scratch::padded(size_t(q_count * 4)) + 2 * Scratch::padded(size_t(kv_count * 4)) +
                  2 * Scratch::padded(size_t(call.hidden * 4)) + 2 * Scratch::padded(size_t(call.head_dim * 4)) +
                  Scratch::padded(size_t(std::max(call.qkv_inputs.outputs, call.o_inputs.outputs) * 4)));
  char* normed = scratch.take<char>(call.hidden * size);
  char* attended = scratch.take<char>(call.hidden * size);
  char* q = scratch.take<char>(q_count * size);
  char* k = scratch.take<char>(kv_count * size);
  char* v = scratch.take<char>(kv_count * size);
  float* mixed = scratch.take<float>(q_count);
  char* mixed_narrow = scratch.take<char>(q_count * size);
  float* cosine = scratch.take<float>(call.head_dim);
  float* sine = scratch.take<float>(call.head_dim);
  float* products = scratch.take<float>(std::max(call.qkv_inputs.outputs, call.o_inputs.outputs));

  kernels.norm({call.type, call.x, call.delta, call.sum, call.norm, call.hidden, normed});
  if (call.qkv_inputs.inputs > 0) {
    const int64_t read = run_by_input(kernels, call.qkv_inputs, normed, call.type, products, threads);
    if (call.read != nullptr) call.read->attention = read;
    narrow(kernels, products, q_count, call.type, q);
    narrow(kernels, products + q_count, kv_count, call.type, k);
    narrow(kernels, products + q_count + kv_count, kv_count, call.type, v);
  } else {
    const LinearCall qkv[] = {linear_call(call.q, call.type, normed, q), linear_call(call.k, call.type, normed, k),
                              linear_call(call.v, call.type, normed, v)};
    run_linears(kernels, qkv, 3, threads);
  }

  const bool rotates = call.cosine != nullptr;
  if (rotates) {
    kernels.widen(call.type, call.cosine, call.head_dim, cosine);
    kernels.widen(call.type, call.sine, call.head_dim, sine);
  }
  const auto prepare_head = [&](char* place, const Norm& norm) {
    if (norm.weight != nullptr) kernels.norm({call.type, place, nullptr, nullptr, norm, call.head_dim, place});
    if (rotates) kernels.rotate(call.type, place, cosine, sine, call.head_dim);
  };
  for (int64_t head = 0; head < call.heads; ++head) prepare_head(q + head * head_bytes, call.q_norm);
  for (int64_t head = 0; head < call.kv_heads; ++head) {
    char* place = k + head * head_bytes;
    prepare_head(place, call.k_norm);
    const int64_t row = (head * call.capacity + call.length) * head_bytes;
    std::memcpy(call.keys + row, place, size_t(head_bytes));
    std::memcpy(call.values + row, v + head * head_bytes, size_t(head_bytes));
  }

  attend_all(kernels, call, q, mixed, threads);
  narrow(kernels, mixed, q_count, call.type, mixed_narrow);
  if (call.o_inputs.inputs > 0) {
    const int64_t read = run_by_input(kernels, call.o_inputs, mixed_narrow, call.type, products, threads);
    if (call.read != nullptr) call.read->output = read;
    narrow(kernels, products, call.hidden, call.type, attended);
  } else {
    const LinearCall o = linear_call(call.o, call.type, mixed_narrow, attended);
    run_linears(kernels, &o, 1, threads);
  }
  kernels.norm({call.type, call.sum, attended, call.sum, call.next_norm, call.hidden, call.next});
}

void run_dense_ffn(const Kernels& kernels, const DenseFfnCall& call, int threads) {
  static thread_local Scratch scratch;
  const int64_t count = call.gate.rows;
  scratch.reserve(5 * Scratch::padded(size_t(count * 4)));
  char* gate = scratch.take<char>(count * element_size(call.type));
  char* up = scratch.take<char>(count * element_size(call.type));
  float* wide_gate = scratch.take<float>(count);
  float* wide_up = scratch.take<float>(count);
  char* h = scratch.take<char>(count * element_size(call.type));
  const bool gated = call.up.matrix.data != nullptr;
  const LinearCall inputs[] = {linear_call(call.gate, call.type, call.x, gate),
                               linear_call(call.up, call.type, call.x, up)};
  run_linears(kernels, inputs, gated ? 2 : 1, threads);
  kernels.widen(call.type, gate, count, wide_gate);
  if (gated) kernels.widen(call.type, up, count, wide_up);
  kernels.gate_values(call.activation, wide_gate, gated ? wide_up : nullptr, count);
  narrow(kernels, wide_gate, count, call.type, h);
  const LinearCall down = linear_call(call.down, call.type, h, call.out);
  run_linears(kernels, &down, 1, threads);
}

}  // namespace partinfer
