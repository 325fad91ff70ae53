// The parts of a decoder layer for one token: attention with its norms and residuals, the FFN that is not sparse.
#pragma once

#include "threads.h"

namespace partinfer {

// A linear layer: weight [rows, columns] and bias [rows].
struct LayerWeight {
  Type type = Type::F32;
  Matrix matrix;
  Vector bias;
  int64_t rows = 0, columns = 0;
};

// All of one token. x, delta [hidden]; keys, values [kv_heads, capacity, head_dim], of which `length` are filled.
struct AttentionCall {
  LayerWeight q, k, v, o;
  ByInput qkv_inputs, o_inputs;  // in place of the four: q, k and v one after the other, and o
  Read* read = nullptr;          // what is read of them is told here, if there is one
  Norm norm, next_norm;   // [hidden]
  Norm q_norm, k_norm;    // [head_dim], without a weight: none
  Type type = Type::F32;  // of every vector here
  const char *x = nullptr, *delta = nullptr;
  const char *cosine = nullptr, *sine = nullptr;  // [head_dim]; null: queries and keys are not rotated
  char *keys = nullptr, *values = nullptr;
  int64_t capacity = 0, length = 0, window = 0;  // window 0: none
  int64_t hidden = 0, heads = 0, kv_heads = 0, head_dim = 0;
  float scale = 1.0f;
  char* sum = nullptr;   // [hidden]: x + delta + attention
  char* next = nullptr;  // [hidden]: its norm, with next_norm
};

// Gated, or plain if `up` has no data: then `gate` is fc1 and `down` is fc2.
struct DenseFfnCall {
  LayerWeight gate, up, down;
  Activation activation = Activation::SILU;
  Type type = Type::F32;  // of x and out
  const char* x = nullptr;
  char* out = nullptr;
};

// The product of one token's x, of this type, with the layer; out [rows] of the same type.
LinearCall linear_call(const LayerWeight& weight, Type type, const char* x, char* out);
// y += added, both [count] of one type, rounded to it.
void add_vector(const Kernels& kernels, Type type, char* y, const char* added, int64_t count);
void run_attention(const Kernels& kernels, const AttentionCall& call, int threads);
void run_dense_ffn(const Kernels& kernels, const DenseFfnCall& call, int threads);

}  // namespace partinfer
