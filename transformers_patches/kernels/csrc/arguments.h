// From tensors to the drivers' calls: what the ops and the decoder have in common, and what their arguments must be.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <c10/util/string_view.h>

#include <atomic>
#include <cmath>
#include <optional>

#include "dispatch.h"
#include "layer.h"
#include "screened.h"
#include "threads.h"

namespace partinfer {

using at::Tensor;
using std::optional;

inline std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> kernels{fastest_variant()};
  return kernels;
}

inline Type float_type(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Type::F32;
    case at::kBFloat16:
      return Type::BF16;
    case at::kHalf:
      return Type::F16;
    default:
      TORCH_CHECK_VALUE(false, name, " must be float32, bfloat16 or float16, got ", tensor.scalar_type());
  }
}

// The dispatcher gives the ops only tensors on the CPU; the decoder may be given any, and a storage may have been freed.
inline void check_memory(const Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.defined(), "expected a tensor, got none");
  TORCH_CHECK_VALUE(tensor.is_cpu() && tensor.layout() == at::kStrided && !tensor.is_neg(),
                    "expected a plain tensor on the CPU, got one on ", tensor.device(), ", ", tensor.layout());
  const size_t needed = at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(), tensor.element_size(),
                                                         size_t(tensor.storage_offset()));
  TORCH_CHECK_VALUE(tensor.numel() == 0 || tensor.storage().nbytes() >= needed, "a tensor ", tensor.sizes(),
                    " has a storage of ", tensor.storage().nbytes(), " bytes, it needs ", needed);
}

inline const char* pointer(const Tensor& tensor) {
  check_memory(tensor);
  return static_cast<const char*>(tensor.const_data_ptr());
}

inline char* mutable_pointer(const Tensor& tensor) {
  check_memory(tensor);
  return static_cast<char*>(tensor.data_ptr());
}

inline void check_matrix(const Tensor& weight, const char* name, int64_t rows, int64_t columns) {
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(0) == rows && weight.size(1) == columns, name, " must be [", rows,
                    ", ", columns, "], got ", weight.sizes());
  TORCH_CHECK_VALUE(columns <= 1 || weight.stride(1) == 1, name, " must have contiguous rows, got strides ",
                    weight.strides());
  TORCH_CHECK_VALUE(rows <= 1 || weight.stride(0) >= columns, name, "'s rows overlap: they have ", columns,
                    " columns, strides ", weight.strides());
}

// Elements from one row to the next: more than a row has where rows of two matrices are interleaved.
inline int64_t stride_of(const Tensor& weight) { return weight.size(0) > 1 ? weight.stride(0) : weight.size(1); }

inline Matrix float_matrix(const Tensor& weight) {
  return {pointer(weight), nullptr, stride_of(weight) * int64_t(weight.element_size()), 0};
}

inline Type quant_type(int64_t bits) {
  TORCH_CHECK_VALUE(bits == 4 || bits == 8, "bits must be 4 or 8, got ", bits);
  return bits == 8 ? Type::Q8 : Type::Q4;
}

inline Matrix quant_matrix(const Tensor& data, const Tensor& scales, const char* name, int64_t rows, int64_t hidden,
                    Type type) {
  TORCH_CHECK_VALUE(hidden % GROUP == 0, "quantised rows are groups of ", GROUP, " columns, got ", hidden, " columns");
  TORCH_CHECK_VALUE(data.scalar_type() == (type == Type::Q8 ? at::kChar : at::kByte), name,
                    type == Type::Q8 ? " must be int8, got " : " must be uint8, got ", data.scalar_type());
  TORCH_CHECK_VALUE(scales.scalar_type() == at::kHalf, name, "'s scales must be float16, got ", scales.scalar_type());
  check_matrix(data, name, rows, type == Type::Q8 ? hidden : hidden / 2);
  check_matrix(scales, name, rows, hidden / GROUP);
  return {pointer(data), reinterpret_cast<const uint16_t*>(pointer(scales)), stride_of(data), stride_of(scales)};
}

// data: uint8 [2, rows, hidden / 2], the high plane first; or that one alone, [rows, hidden / 2].
inline Planes planes_of(const Tensor& data, const Tensor& scales, const char* name) {
  const bool both = data.dim() == 3 && data.size(0) == 2;
  TORCH_CHECK_VALUE(both || data.dim() == 2, name, " must be two planes, [2, rows, columns / 2], or the high one, got ",
                    data.sizes());
  const Tensor plane = both ? data.select(0, 0) : data;
  const Matrix high = quant_matrix(plane, scales, name, plane.size(0), 2 * plane.size(1), Type::Q4);
  return {high.data, both ? high.data + data.stride(0) : nullptr, high.scales, high.row_bytes, high.row_scales};
}

// Without x, out and exact, and what has to be right. whole: the exact weight, if there is only the high plane.
inline ScreenedCall screened_call(const Tensor& data, const Tensor& scales, const Tensor& errors,
                                  const optional<Tensor>& whole, int64_t hidden) {
  ScreenedCall call;
  call.planes = planes_of(data, scales, "the screening weight");
  call.rows = data.size(-2);
  call.hidden = 2 * data.size(-1);
  TORCH_CHECK_VALUE(call.hidden == hidden, "the screening weight has ", call.hidden, " columns, x ", hidden);
  TORCH_CHECK_VALUE(whole.has_value() == (data.dim() == 2), "the high plane alone needs the whole weight, two planes none");
  if (whole.has_value()) {
    check_matrix(*whole, "weight", call.rows, hidden);
    call.whole = float_matrix(*whole);
    call.whole_type = float_type(*whole, "weight");
  }
  TORCH_CHECK_VALUE(errors.scalar_type() == at::kFloat && errors.dim() == 1 && errors.is_contiguous() &&
                        errors.numel() == hidden / GROUP,
                    "errors must be contiguous float32 [", hidden / GROUP, "], got ", errors.scalar_type(), " ",
                    errors.sizes());
  TORCH_CHECK_VALUE(hidden > 0, "the screening weight has no columns");
  call.errors = reinterpret_cast<const float*>(pointer(errors));
  return call;
}

inline Vector vector_of(const optional<Tensor>& tensor, const char* name, int64_t size) {
  if (!tensor.has_value()) return {};
  TORCH_CHECK_VALUE(tensor->dim() == 1 && tensor->size(0) == size && tensor->is_contiguous(), name,
                    " must be contiguous and [", size, "], got ", tensor->sizes());
  return {pointer(*tensor), float_type(*tensor, name)};
}

inline Activation activation_of(c10::string_view name) {
  if (name == "silu") return Activation::SILU;
  if (name == "relu") return Activation::RELU;
  if (name == "relu2") return Activation::RELU2;
  if (name == "gelu") return Activation::GELU;
  if (name == "gelu_tanh") return Activation::GELU_TANH;
  TORCH_CHECK_VALUE(false, "activation must be silu, gelu, gelu_tanh, relu or relu2, got ", name);
}

inline ActiveRows active_rows(int64_t prefix, const optional<Tensor>& index, int64_t rows) {
  TORCH_CHECK_VALUE(prefix >= 0 && prefix <= rows, "prefix must be in [0, ", rows, "], got ", prefix);
  ActiveRows active;
  active.prefix = prefix;
  if (!index.has_value()) return active;
  TORCH_CHECK_VALUE(index->scalar_type() == at::kInt && index->dim() == 1 && index->is_contiguous(),
                    "index must be a contiguous list of int32, got ", index->scalar_type(), " ", index->sizes());
  active.index = reinterpret_cast<const int32_t*>(pointer(*index));
  active.count = index->numel();
  int32_t lowest = int32_t(prefix), highest = -1;
  for (int64_t i = 0; i < active.count; ++i) {
    lowest = std::min(lowest, active.index[i]);
    highest = std::max(highest, active.index[i]);
  }
  TORCH_CHECK_VALUE(lowest >= prefix && highest < rows, "index must be in [prefix, rows) = [", prefix, ", ", rows,
                    "), got values from ", lowest, " to ", highest);
  return active;
}

struct Input2d {
  Tensor x;
  int64_t tokens, hidden;
};

// Contiguous, in the same type.
inline Tensor in_order(const Tensor& tensor) {
  check_memory(tensor);
  return tensor.contiguous();
}

inline Input2d input_of(const Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() >= 1, "x must have at least one dimension, got a scalar");
  const int64_t hidden = x.size(-1);
  return {in_order(x), hidden == 0 ? 0 : x.numel() / hidden, hidden};
}

// What all FFN ops share: x, out, the activation and the active rows.
inline FfnCall ffn_call(Type type, const Input2d& input, int64_t rows, int64_t prefix, const optional<Tensor>& index,
                 c10::string_view activation, const Tensor& out) {
  FfnCall call;
  call.type = type;
  call.activation = activation_of(activation);
  call.rows = active_rows(prefix, index, rows);
  call.x = pointer(input.x);
  call.x_type = float_type(input.x, "x");
  call.tokens = input.tokens;
  call.hidden = input.hidden;
  call.out = static_cast<char*>(out.data_ptr());
  return call;
}

inline int64_t rows_of(const Tensor& weight, const char* name) {
  TORCH_CHECK_VALUE(weight.dim() == 2, name, " must have two dimensions, got ", weight.sizes());
  return weight.size(0);
}

inline void check_float_weights(const Tensor& first, const Tensor& other, const char* name) {
  TORCH_CHECK_VALUE(first.scalar_type() == other.scalar_type(), name, " must be ", first.scalar_type(),
                    " like the other weights, got ", other.scalar_type());
}

// The calls of the gated and of the plain FFN, with their weights checked.
inline FfnCall gated_call(const Input2d& input, const Tensor& gate, const Tensor& up, const Tensor& down, int64_t prefix,
                   const optional<Tensor>& index, c10::string_view activation, const Tensor& out) {
  const int64_t rows = rows_of(gate, "gate");
  check_matrix(gate, "gate", rows, input.hidden);
  check_matrix(up, "up", rows, input.hidden);
  check_matrix(down, "down", rows, input.hidden);
  check_float_weights(gate, up, "up");
  check_float_weights(gate, down, "down");
  FfnCall call = ffn_call(float_type(gate, "gate"), input, rows, prefix, index, activation, out);
  call.gate = float_matrix(gate);
  call.up = float_matrix(up);
  call.down = float_matrix(down);
  return call;
}

struct Packed {
  const Tensor &data, &scales;
  optional<Tensor> column_scales = {};  // of what is summed up row by row: what its columns are multiplied with
};

inline const float* column_scales_of(const Packed& down, int64_t hidden) {
  if (!down.column_scales.has_value()) return nullptr;
  const Tensor& scales = *down.column_scales;
  TORCH_CHECK_VALUE(scales.scalar_type() == at::kFloat && scales.dim() == 1 && scales.size(0) == hidden &&
                        scales.is_contiguous(),
                    "column scales must be contiguous float32 [", hidden, "], got ", scales.scalar_type(), " ",
                    scales.sizes());
  return reinterpret_cast<const float*>(pointer(scales));
}

inline FfnCall gated_call(const Input2d& input, const Packed& gate, const Packed& up, const Packed& down, int64_t bits,
                   int64_t prefix, const optional<Tensor>& index, c10::string_view activation, const Tensor& out) {
  const int64_t rows = rows_of(gate.data, "gate");
  const Type type = quant_type(bits);
  FfnCall call = ffn_call(type, input, rows, prefix, index, activation, out);
  call.gate = quant_matrix(gate.data, gate.scales, "gate", rows, input.hidden, type);
  call.up = quant_matrix(up.data, up.scales, "up", rows, input.hidden, type);
  call.down = quant_matrix(down.data, down.scales, "down", rows, input.hidden, type);
  call.column_scales = column_scales_of(down, input.hidden);
  return call;
}

inline FfnCall plain_call(const Input2d& input, const Tensor& fc1, const optional<Tensor>& bias1, const Tensor& fc2,
                   int64_t prefix, const optional<Tensor>& index, c10::string_view activation, const Tensor& out) {
  const int64_t rows = rows_of(fc1, "fc1");
  check_matrix(fc1, "fc1", rows, input.hidden);
  check_matrix(fc2, "fc2", rows, input.hidden);
  check_float_weights(fc1, fc2, "fc2");
  FfnCall call = ffn_call(float_type(fc1, "fc1"), input, rows, prefix, index, activation, out);
  call.gate = float_matrix(fc1);
  call.down = float_matrix(fc2);
  call.gate_bias = vector_of(bias1, "bias1", rows);
  return call;
}

inline FfnCall plain_call(const Input2d& input, const Packed& fc1, const optional<Tensor>& bias1, const Packed& fc2,
                   int64_t bits, int64_t prefix, const optional<Tensor>& index, c10::string_view activation,
                   const Tensor& out) {
  const int64_t rows = rows_of(fc1.data, "fc1");
  const Type type = quant_type(bits);
  FfnCall call = ffn_call(type, input, rows, prefix, index, activation, out);
  call.gate = quant_matrix(fc1.data, fc1.scales, "fc1", rows, input.hidden, type);
  call.down = quant_matrix(fc2.data, fc2.scales, "fc2", rows, input.hidden, type);
  call.column_scales = column_scales_of(fc2, input.hidden);
  call.gate_bias = vector_of(bias1, "bias1", rows);
  return call;
}

// weight [rows, columns], quantised if there are scales.
inline LayerWeight layer_weight(const Tensor& weight, const Tensor* scales, const optional<Tensor>& bias, int64_t bits,
                         int64_t columns, const char* name) {
  LayerWeight layer;
  layer.rows = rows_of(weight, name);
  layer.columns = columns;
  if (scales != nullptr) {
    layer.type = quant_type(bits);
    layer.matrix = quant_matrix(weight, *scales, name, layer.rows, columns, layer.type);
  } else {
    check_matrix(weight, name, layer.rows, columns);
    layer.type = float_type(weight, name);
    layer.matrix = float_matrix(weight);
  }
  layer.bias = vector_of(bias, name, layer.rows);
  return layer;
}

// A vector of x's type, or null.
inline const char* vector_like(const optional<Tensor>& tensor, const Tensor& x, int64_t size, const char* name) {
  if (!tensor.has_value()) return nullptr;
  TORCH_CHECK_VALUE(tensor->numel() == size && tensor->is_contiguous() && tensor->scalar_type() == x.scalar_type(),
                    name, " must be contiguous, [", size, "] and ", x.scalar_type(), " like x, got ", tensor->sizes(),
                    " ", tensor->scalar_type());
  return pointer(*tensor);
}

// Linear layers as the ops get them: scales and bits only of quantised ones.
struct LayerWeights {
  at::TensorList weights, scales;
  const c10::List<optional<Tensor>>& biases;
  int64_t bits;

  void check(size_t count) const {
    TORCH_CHECK_VALUE(weights.size() == count && biases.size() == count && (scales.empty() || scales.size() == count),
                      "expected ", count, " weights and biases and as many scales or none, got ", weights.size(), ", ",
                      biases.size(), " and ", scales.size());
  }

  LayerWeight weight(int i, int64_t columns, const char* name) const {
    return layer_weight(weights[i], scales.empty() ? nullptr : &scales[i], biases.get(i), bits, columns, name);
  }
};

inline void check_one_token(const Tensor& x, const Tensor& like, const char* name) {
  const int64_t hidden = like.numel();
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.is_contiguous() && x.numel() == hidden && x.size(-1) == hidden &&
                        x.scalar_type() == like.scalar_type(),
                    name, " must be one token of ", hidden, " ", like.scalar_type(), ", got ", x.sizes(), " ",
                    x.scalar_type());
}

inline Norm norm_of(const Tensor& weight, const optional<Tensor>& bias, double eps, const Tensor& like, int64_t size,
                    const char* name) {
  return {vector_like(weight, like, size, name), vector_like(bias, like, size, name), float(eps)};
}

// What is multiplied with one input together must have one type: the input is prepared for that.
inline void check_same_type(std::initializer_list<LayerWeight> weights, const char* names) {
  for (const LayerWeight& weight : weights)
    TORCH_CHECK_VALUE(weight.type == weights.begin()->type, names, " must all have the same type");
}

// The norms of a layer: that before the attention, that after it, and those of q's and k's heads, if there are any.
// Without biases they are RMSNorms, else LayerNorms.
struct Norms {
  at::TensorList weights, biases;
  double eps;

  void check() const {
    TORCH_CHECK_VALUE((weights.size() == 2 || weights.size() == 4) && (biases.empty() || biases.size() == weights.size()),
                      "expected 2 or 4 norms and as many biases or none, got ", weights.size(), " and ", biases.size());
  }

  Norm norm(size_t i, const Tensor& like, int64_t size, const char* name) const {
    return norm_of(weights[i], biases.empty() ? optional<Tensor>() : biases[i], eps, like, size, name);
  }
};

// The rotary embedding of a position, or none: cosine and sine [head_dim] have x's type.
inline void set_rope(AttentionCall& call, const Tensor& x, const optional<Tensor>& cosine, const optional<Tensor>& sine) {
  TORCH_CHECK_VALUE(cosine.has_value() == sine.has_value(), "cosine and sine belong together, got one of them");
  call.cosine = vector_like(cosine, x, call.head_dim, "cosine");
  call.sine = vector_like(sine, x, call.head_dim, "sine");
}

// What every layer's attention has: norms, sizes of heads, window and scale.
inline AttentionCall attention_around(const Norms& norms, int64_t window, double scale, int64_t head_dim) {
  norms.check();
  const Tensor& norm = norms.weights[0];
  TORCH_CHECK_VALUE(norm.dim() == 1 && norm.numel() > 0, "norm must be [hidden], got ", norm.sizes());
  TORCH_CHECK_VALUE(head_dim > 0 && head_dim % 2 == 0, "a head must have an even size above 0, got ", head_dim);
  TORCH_CHECK_VALUE(window >= 0, "window must be a number of positions, or 0 for none, got ", window);
  AttentionCall call;
  call.type = float_type(norm, "norm");
  call.hidden = norm.numel();
  call.head_dim = head_dim;
  call.norm = norms.norm(0, norm, call.hidden, "norm");
  call.next_norm = norms.norm(1, norm, call.hidden, "next_norm");
  if (norms.weights.size() > 2) {
    call.q_norm = norms.norm(2, norm, head_dim, "q_norm");
    call.k_norm = norms.norm(3, norm, head_dim, "k_norm");
  }
  call.window = window;
  call.scale = float(scale);
  return call;
}

// A layer's attention without what belongs to a token: x, delta, cosine, sine, sum, next and the cache's place.
inline AttentionCall attention_call(const Norms& norms, at::TensorList weights, at::TensorList scales,
                                    const c10::List<optional<Tensor>>& biases, int64_t bits, int64_t window,
                                    double scale, int64_t head_dim) {
  const LayerWeights given{weights, scales, biases, bits};
  given.check(4);
  AttentionCall call = attention_around(norms, window, scale, head_dim);
  const int64_t hidden = call.hidden;
  call.q = given.weight(0, hidden, "q");
  call.k = given.weight(1, hidden, "k");
  call.v = given.weight(2, hidden, "v");
  call.o = given.weight(3, call.q.rows, "o");
  call.heads = call.q.rows / head_dim;
  call.kv_heads = call.k.rows / head_dim;
  TORCH_CHECK_VALUE(call.kv_heads > 0 && call.heads > 0 && call.heads % call.kv_heads == 0 &&
                        call.heads * head_dim == call.q.rows && call.k.rows == call.kv_heads * head_dim &&
                        call.v.rows == call.k.rows && call.o.rows == hidden,
                    "the projections don't fit heads of ", head_dim, ": q has ", call.q.rows, " rows, k ", call.k.rows,
                    ", v ", call.v.rows, ", o ", call.o.rows);
  check_same_type({call.q, call.k, call.v}, "q, k and v");
  return call;
}

// The same with q, k and v in one layer by input, and o in another.
inline AttentionCall attention_call(const Norms& norms, const ByInput& qkv, const ByInput& o, int64_t window,
                                    double scale, int64_t head_dim, int64_t kv_heads) {
  AttentionCall call = attention_around(norms, window, scale, head_dim);
  call.qkv_inputs = qkv;
  call.o_inputs = o;
  call.kv_heads = kv_heads;
  call.heads = o.inputs / head_dim;
  TORCH_CHECK_VALUE(kv_heads > 0 && call.heads > 0 && call.heads % kv_heads == 0 && call.heads * head_dim == o.inputs &&
                        o.outputs == call.hidden && qkv.inputs == call.hidden &&
                        qkv.outputs == (call.heads + 2 * kv_heads) * head_dim,
                    "the projections don't fit ", kv_heads, " key heads of ", head_dim, ": q, k and v have ", qkv.inputs,
                    " inputs and ", qkv.outputs, " outputs, o ", o.inputs, " and ", o.outputs);
  return call;
}

// Where the token's keys and values go: [1, heads, capacity, head size], of which `length` positions are filled.
inline void place_in_cache(AttentionCall& call, const Tensor& keys, const Tensor& values, int64_t length) {
  const auto fits = [&](const Tensor& part) {
    return part.dim() == 4 && part.size(0) == 1 && part.size(1) == call.kv_heads && part.size(3) == call.head_dim &&
           part.is_contiguous() && float_type(part, "the cache") == call.type;
  };
  TORCH_CHECK_VALUE(fits(keys) && fits(values) && keys.size(2) == values.size(2), "keys and values must be contiguous [1, ",
                    call.kv_heads, ", capacity, ", call.head_dim, "] of x's type, got ", keys.sizes(), " and ",
                    values.sizes());
  call.capacity = keys.size(2);
  TORCH_CHECK_VALUE(length >= 0 && length < call.capacity, "length must be in [0, ", call.capacity, "), got ", length);
  call.keys = mutable_pointer(keys);
  call.values = mutable_pointer(values);
  call.length = length;
}

// The FFN of a layer that is computed whole, without x and out. type: that of both.
inline DenseFfnCall dense_call(Type type, int64_t hidden, at::TensorList weights, at::TensorList scales,
                               const c10::List<optional<Tensor>>& biases, int64_t bits, c10::string_view activation) {
  const LayerWeights given{weights, scales, biases, bits};
  const bool gated = weights.size() != 2;
  given.check(gated ? 3 : 2);
  TORCH_CHECK_VALUE(hidden > 0, "x must have columns");
  DenseFfnCall call;
  call.gate = given.weight(0, hidden, gated ? "gate" : "fc1");
  if (gated) call.up = given.weight(1, hidden, "up");
  TORCH_CHECK_VALUE(call.gate.rows > 0, "the FFN has no neurons");
  call.down = given.weight(gated ? 2 : 1, call.gate.rows, gated ? "down" : "fc2");
  if (gated) check_same_type({call.gate, call.up}, "gate and up");
  TORCH_CHECK_VALUE(call.down.rows == hidden && (!gated || call.up.rows == call.gate.rows), "the FFN's matrices don't fit: ",
                    weights[0].sizes(), ", ", weights[1].sizes(), gated ? c10::str(", ", weights[2].sizes()) : "");
  call.activation = activation_of(activation);
  call.type = type;
  return call;
}

inline const float* floats_of(const Tensor& values, const char* name, int64_t count) {
  TORCH_CHECK_VALUE(values.scalar_type() == at::kFloat && values.dim() == 1 && values.size(0) == count &&
                        values.is_contiguous(),
                    name, " must be contiguous float32 [", count, "], got ", values.scalar_type(), " ", values.sizes());
  return reinterpret_cast<const float*>(pointer(values));
}

inline const float* sizes_of(const Tensor& scale, int64_t rows) { return floats_of(scale, "scale", rows); }

// A linear layer stored by input, [inputs, outputs]. vectors: mean and norm [inputs], constant [outputs].
inline ByInput by_input_of(const Tensor& weight, const optional<Tensor>& scales, const optional<Tensor>& column_scales,
                           int64_t bits, at::TensorList vectors, double threshold) {
  TORCH_CHECK_VALUE(vectors.size() == 3, "a layer by input needs mean, norm and constant, got ", vectors.size(), " vectors");
  TORCH_CHECK_VALUE(!std::isnan(threshold), "threshold must be a number, got NaN");
  ByInput layer;
  layer.inputs = rows_of(weight, "weight");
  layer.outputs = weight.size(1);
  if (scales.has_value()) {
    layer.type = quant_type(bits);
    layer.outputs *= layer.type == Type::Q4 ? 2 : 1;
    layer.weight = quant_matrix(weight, *scales, "weight", layer.inputs, layer.outputs, layer.type);
    layer.column_scales = column_scales_of({weight, *scales, column_scales}, layer.outputs);
  } else {
    TORCH_CHECK_VALUE(!column_scales.has_value(), "column scales belong to quantised weights");
    check_matrix(weight, "weight", layer.inputs, layer.outputs);
    layer.type = float_type(weight, "weight");
    layer.weight = float_matrix(weight);
  }
  TORCH_CHECK_VALUE(layer.inputs > 0 && layer.outputs > 0, "a layer by input can't be empty, got ", weight.sizes());
  layer.mean = floats_of(vectors[0], "mean", layer.inputs);
  layer.norm = floats_of(vectors[1], "norm", layer.inputs);
  layer.constant = floats_of(vectors[2], "constant", layer.outputs);
  layer.threshold = float(threshold);
  return layer;
}

// call: without x and out.
inline ByUpCall by_up_call(const FfnCall& call, const Tensor& scale, int64_t rows, int64_t keep, double threshold) {
  const int64_t candidates = call.rows.prefix + call.rows.count;
  TORCH_CHECK_VALUE(keep <= candidates, "keep_count must be at most the ", candidates, " candidates, got ", keep);
  TORCH_CHECK_VALUE(keep >= -1, "keep_count must be a number of neurons, or -1 for a threshold, got ", keep);
  ByUpCall chosen;
  chosen.ffn = call;
  chosen.size = sizes_of(scale, rows);
  chosen.keep = keep;
  chosen.threshold = float(threshold);
  return chosen;
}

}  // namespace partinfer
