// The torch ops: arguments are checked here, then handed to the drivers as plain pointers.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <atomic>

#include "core_counts.h"
#include "dispatch.h"
#include "layer.h"
#include "probe.h"
#include "threads.h"

namespace {

using at::Tensor;
using std::optional;
using namespace partinfer;

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> kernels{fastest_variant()};
  return kernels;
}

Type float_type(const Tensor& tensor, const char* name) {
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

const char* pointer(const Tensor& tensor) { return static_cast<const char*>(tensor.const_data_ptr()); }

void check_matrix(const Tensor& weight, const char* name, int64_t rows, int64_t columns) {
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(0) == rows && weight.size(1) == columns, name, " must be [", rows,
                    ", ", columns, "], got ", weight.sizes());
  TORCH_CHECK_VALUE(weight.is_contiguous(), name, " must be contiguous, got strides ", weight.strides());
}

Matrix float_matrix(const Tensor& weight) {
  return {pointer(weight), nullptr, weight.size(1) * int64_t(weight.element_size()), 0};
}

Type quant_type(int64_t bits) {
  TORCH_CHECK_VALUE(bits == 4 || bits == 8, "bits must be 4 or 8, got ", bits);
  return bits == 8 ? Type::Q8 : Type::Q4;
}

Matrix quant_matrix(const Tensor& data, const Tensor& scales, const char* name, int64_t rows, int64_t hidden,
                    Type type) {
  TORCH_CHECK_VALUE(hidden % GROUP == 0, "quantised rows are groups of ", GROUP, " columns, got ", hidden, " columns");
  TORCH_CHECK_VALUE(data.scalar_type() == (type == Type::Q8 ? at::kChar : at::kByte), name,
                    type == Type::Q8 ? " must be int8, got " : " must be uint8, got ", data.scalar_type());
  TORCH_CHECK_VALUE(scales.scalar_type() == at::kHalf, name, "'s scales must be float16, got ", scales.scalar_type());
  check_matrix(data, name, rows, type == Type::Q8 ? hidden : hidden / 2);
  check_matrix(scales, name, rows, hidden / GROUP);
  return {pointer(data), reinterpret_cast<const uint16_t*>(pointer(scales)), data.size(1), scales.size(1)};
}

Vector vector_of(const optional<Tensor>& tensor, const char* name, int64_t size) {
  if (!tensor.has_value()) return {};
  TORCH_CHECK_VALUE(tensor->dim() == 1 && tensor->size(0) == size && tensor->is_contiguous(), name,
                    " must be contiguous and [", size, "], got ", tensor->sizes());
  return {pointer(*tensor), float_type(*tensor, name)};
}

Activation activation_of(c10::string_view name) {
  if (name == "silu") return Activation::SILU;
  if (name == "relu") return Activation::RELU;
  if (name == "gelu") return Activation::GELU;
  if (name == "gelu_tanh") return Activation::GELU_TANH;
  TORCH_CHECK_VALUE(false, "activation must be silu, gelu, gelu_tanh or relu, got ", name);
}

ActiveRows active_rows(int64_t prefix, const optional<Tensor>& index, int64_t rows) {
  TORCH_CHECK_VALUE(prefix >= 0 && prefix <= rows, "prefix must be in [0, ", rows, "], got ", prefix);
  ActiveRows active;
  active.prefix = prefix;
  if (!index.has_value()) return active;
  TORCH_CHECK_VALUE(index->scalar_type() == at::kInt && index->dim() == 1 && index->is_contiguous(),
                    "index must be a contiguous list of int32, got ", index->scalar_type(), " ", index->sizes());
  active.index = index->const_data_ptr<int32_t>();
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

Input2d input_of(const Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() >= 1, "x must have at least one dimension, got a scalar");
  const int64_t hidden = x.size(-1);
  return {x.contiguous(), hidden == 0 ? 0 : x.numel() / hidden, hidden};
}

void check_out(const Tensor& out, const Tensor& x) {
  TORCH_CHECK_VALUE(out.sizes() == x.sizes() && out.scalar_type() == x.scalar_type() && out.is_contiguous(),
                    "out must be contiguous and like x, ", x.scalar_type(), " ", x.sizes(), ", got ",
                    out.scalar_type(), " ", out.sizes());
}

// What all FFN ops share: x, out, the activation and the active rows.
FfnCall ffn_call(Type type, const Input2d& input, int64_t rows, int64_t prefix, const optional<Tensor>& index,
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

int64_t rows_of(const Tensor& weight, const char* name) {
  TORCH_CHECK_VALUE(weight.dim() == 2, name, " must have two dimensions, got ", weight.sizes());
  return weight.size(0);
}

void check_float_weights(const Tensor& first, const Tensor& other, const char* name) {
  TORCH_CHECK_VALUE(first.scalar_type() == other.scalar_type(), name, " must be ", first.scalar_type(),
                    " like the other weights, got ", other.scalar_type());
}

// The calls of the gated and of the plain FFN, with their weights checked.
FfnCall gated_call(const Input2d& input, const Tensor& gate, const Tensor& up, const Tensor& down, int64_t prefix,
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
};

FfnCall gated_call(const Input2d& input, const Packed& gate, const Packed& up, const Packed& down, int64_t bits,
                   int64_t prefix, const optional<Tensor>& index, c10::string_view activation, const Tensor& out) {
  const int64_t rows = rows_of(gate.data, "gate");
  const Type type = quant_type(bits);
  FfnCall call = ffn_call(type, input, rows, prefix, index, activation, out);
  call.gate = quant_matrix(gate.data, gate.scales, "gate", rows, input.hidden, type);
  call.up = quant_matrix(up.data, up.scales, "up", rows, input.hidden, type);
  call.down = quant_matrix(down.data, down.scales, "down", rows, input.hidden, type);
  return call;
}

FfnCall plain_call(const Input2d& input, const Tensor& fc1, const optional<Tensor>& bias1, const Tensor& fc2,
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

FfnCall plain_call(const Input2d& input, const Packed& fc1, const optional<Tensor>& bias1, const Packed& fc2,
                   int64_t bits, int64_t prefix, const optional<Tensor>& index, c10::string_view activation,
                   const Tensor& out) {
  const int64_t rows = rows_of(fc1.data, "fc1");
  const Type type = quant_type(bits);
  FfnCall call = ffn_call(type, input, rows, prefix, index, activation, out);
  call.gate = quant_matrix(fc1.data, fc1.scales, "fc1", rows, input.hidden, type);
  call.down = quant_matrix(fc2.data, fc2.scales, "fc2", rows, input.hidden, type);
  call.gate_bias = vector_of(bias1, "bias1", rows);
  return call;
}

void sparse_ffn_out(const Tensor& x, const Tensor& gate, const Tensor& up, const Tensor& down, int64_t prefix,
                    const optional<Tensor>& index, c10::string_view activation, const optional<Tensor>& bias_gate,
                    const optional<Tensor>& bias_up, const Tensor& out) {
  const Input2d input = input_of(x);
  check_out(out, x);
  FfnCall call = gated_call(input, gate, up, down, prefix, index, activation, out);
  call.gate_bias = vector_of(bias_gate, "bias_gate", gate.size(0));
  call.up_bias = vector_of(bias_up, "bias_up", gate.size(0));
  run_ffn(*current().load(), call, at::get_num_threads());
}

Tensor sparse_ffn(const Tensor& x, const Tensor& gate, const Tensor& up, const Tensor& down, int64_t prefix,
                  const optional<Tensor>& index, c10::string_view activation, const optional<Tensor>& bias_gate,
                  const optional<Tensor>& bias_up) {
  Tensor out = at::empty(x.sizes(), x.options());
  sparse_ffn_out(x, gate, up, down, prefix, index, activation, bias_gate, bias_up, out);
  return out;
}

Tensor sparse_ffn_plain(const Tensor& x, const Tensor& fc1, const optional<Tensor>& bias1, const Tensor& fc2,
                        int64_t prefix, const optional<Tensor>& index, c10::string_view activation) {
  const Input2d input = input_of(x);
  Tensor out = at::empty(x.sizes(), x.options());
  const FfnCall call = plain_call(input, fc1, bias1, fc2, prefix, index, activation, out);
  run_ffn(*current().load(), call, at::get_num_threads());
  return out;
}

Tensor quant_sparse_ffn(const Tensor& x, const Tensor& gate, const Tensor& gate_scales, const Tensor& up,
                        const Tensor& up_scales, const Tensor& down, const Tensor& down_scales, int64_t bits,
                        int64_t prefix, const optional<Tensor>& index, c10::string_view activation,
                        const optional<Tensor>& bias_gate, const optional<Tensor>& bias_up) {
  const Input2d input = input_of(x);
  Tensor out = at::empty(x.sizes(), x.options());
  FfnCall call = gated_call(input, {gate, gate_scales}, {up, up_scales}, {down, down_scales}, bits, prefix, index,
                            activation, out);
  call.gate_bias = vector_of(bias_gate, "bias_gate", gate.size(0));
  call.up_bias = vector_of(bias_up, "bias_up", gate.size(0));
  run_ffn(*current().load(), call, at::get_num_threads());
  return out;
}

Tensor quant_sparse_ffn_plain(const Tensor& x, const Tensor& fc1, const Tensor& fc1_scales,
                              const optional<Tensor>& bias1, const Tensor& fc2, const Tensor& fc2_scales, int64_t bits,
                              int64_t prefix, const optional<Tensor>& index, c10::string_view activation) {
  const Input2d input = input_of(x);
  Tensor out = at::empty(x.sizes(), x.options());
  const FfnCall call =
      plain_call(input, {fc1, fc1_scales}, bias1, {fc2, fc2_scales}, bits, prefix, index, activation, out);
  run_ffn(*current().load(), call, at::get_num_threads());
  return out;
}

Tensor linear_like(const Tensor& x, Type type, const Matrix& weight, int64_t rows, const optional<Tensor>& bias,
                   const Input2d& input) {
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = rows;
  Tensor out = at::empty(shape, x.options());
  LinearCall call;
  call.type = type;
  call.weight = weight;
  call.bias = vector_of(bias, "bias", rows);
  call.rows = rows;
  call.x = pointer(input.x);
  call.x_type = float_type(x, "x");
  call.tokens = input.tokens;
  call.hidden = input.hidden;
  call.out = static_cast<char*>(out.data_ptr());
  run_linear(*current().load(), call, at::get_num_threads());
  return out;
}

Tensor linear(const Tensor& x, const Tensor& weight, const optional<Tensor>& bias) {
  const Input2d input = input_of(x);
  const int64_t rows = rows_of(weight, "weight");
  check_matrix(weight, "weight", rows, input.hidden);
  return linear_like(x, float_type(weight, "weight"), float_matrix(weight), rows, bias, input);
}

Tensor quant_linear(const Tensor& x, const Tensor& weight, const Tensor& scales, int64_t bits,
                    const optional<Tensor>& bias) {
  const Input2d input = input_of(x);
  const int64_t rows = rows_of(weight, "weight");
  const Type type = quant_type(bits);
  return linear_like(x, type, quant_matrix(weight, scales, "weight", rows, input.hidden, type), rows, bias, input);
}

// One token at a time: every token chooses its own neurons. Returns how many were computed for each.
Tensor run_all_by_up(const FfnCall& call, const Tensor& scale, int64_t rows, int64_t keep, double threshold) {
  TORCH_CHECK_VALUE(scale.scalar_type() == at::kFloat && scale.dim() == 1 && scale.size(0) == rows &&
                        scale.is_contiguous(),
                    "scale must be contiguous float32 [", rows, "], got ", scale.scalar_type(), " ", scale.sizes());
  const int64_t candidates = call.rows.prefix + call.rows.count;
  TORCH_CHECK_VALUE(keep <= candidates, "keep_count must be at most the ", candidates, " candidates, got ", keep);
  Tensor computed = at::empty({call.tokens}, scale.options().dtype(at::kLong));
  const int64_t row_bytes = call.hidden * element_size(call.x_type);
  ByUpCall one{call, scale.const_data_ptr<float>(), keep, float(threshold)};
  one.ffn.tokens = 1;
  for (int64_t t = 0; t < call.tokens; ++t) {
    one.ffn.x = call.x + t * row_bytes;
    one.ffn.out = call.out + t * row_bytes;
    computed.mutable_data_ptr<int64_t>()[t] = run_by_up(*current().load(), one, at::get_num_threads());
  }
  return computed;
}

std::tuple<Tensor, Tensor> sparse_ffn_by_up(const Tensor& x, const Tensor& gate, const Tensor& up, const Tensor& down,
                                            int64_t prefix, const optional<Tensor>& index, const Tensor& scale,
                                            int64_t keep, double threshold, c10::string_view activation) {
  const Input2d input = input_of(x);
  Tensor out = at::empty(x.sizes(), x.options());
  const FfnCall call = gated_call(input, gate, up, down, prefix, index, activation, out);
  return {out, run_all_by_up(call, scale, gate.size(0), keep, threshold)};
}

std::tuple<Tensor, Tensor> quant_sparse_ffn_by_up(const Tensor& x, const Tensor& gate, const Tensor& gate_scales,
                                                  const Tensor& up, const Tensor& up_scales, const Tensor& down,
                                                  const Tensor& down_scales, int64_t bits, int64_t prefix,
                                                  const optional<Tensor>& index, const Tensor& scale, int64_t keep,
                                                  double threshold, c10::string_view activation) {
  const Input2d input = input_of(x);
  Tensor out = at::empty(x.sizes(), x.options());
  FfnCall call = gated_call(input, {gate, gate_scales}, {up, up_scales}, {down, down_scales}, bits, prefix, index,
                            activation, out);
  return {out, run_all_by_up(call, scale, gate.size(0), keep, threshold)};
}

std::tuple<Tensor, Tensor> sparse_ffn_plain_by_size(const Tensor& x, const Tensor& fc1, const optional<Tensor>& bias1,
                                                    const Tensor& fc2, int64_t prefix, const optional<Tensor>& index,
                                                    const Tensor& scale, int64_t keep, double threshold,
                                                    c10::string_view activation) {
  const Input2d input = input_of(x);
  Tensor out = at::empty(x.sizes(), x.options());
  const FfnCall call = plain_call(input, fc1, bias1, fc2, prefix, index, activation, out);
  return {out, run_all_by_up(call, scale, fc1.size(0), keep, threshold)};
}

std::tuple<Tensor, Tensor> quant_sparse_ffn_plain_by_size(const Tensor& x, const Tensor& fc1, const Tensor& fc1_scales,
                                                          const optional<Tensor>& bias1, const Tensor& fc2,
                                                          const Tensor& fc2_scales, int64_t bits, int64_t prefix,
                                                          const optional<Tensor>& index, const Tensor& scale,
                                                          int64_t keep, double threshold, c10::string_view activation) {
  const Input2d input = input_of(x);
  Tensor out = at::empty(x.sizes(), x.options());
  const FfnCall call =
      plain_call(input, {fc1, fc1_scales}, bias1, {fc2, fc2_scales}, bits, prefix, index, activation, out);
  return {out, run_all_by_up(call, scale, fc1.size(0), keep, threshold)};
}

ConvertTask convert_task(const Tensor& floats, const Tensor& data, const Tensor& scales, int64_t bits) {
  const int64_t rows = rows_of(floats, "the floats"), hidden = floats.size(1);
  const Type type = quant_type(bits);
  quant_matrix(data, scales, "data", rows, hidden, type);
  check_matrix(floats, "the floats", rows, hidden);
  ConvertTask task;
  task.type = type;
  task.floats = static_cast<char*>(floats.data_ptr());
  task.float_type = float_type(floats, "the floats");
  task.data = static_cast<char*>(data.data_ptr());
  task.scales = reinterpret_cast<uint16_t*>(scales.data_ptr());
  task.hidden = hidden;
  return task;
}

void quantize(const Tensor& floats, int64_t bits, const Tensor& data, const Tensor& scales) {
  const ConvertTask task = convert_task(floats, data, scales, bits);
  run_convert(current().load()->quantise_rows, task, floats.size(0), at::get_num_threads());
}

void dequantize(const Tensor& data, const Tensor& scales, int64_t bits, const Tensor& out) {
  const ConvertTask task = convert_task(out, data, scales, bits);
  run_convert(current().load()->dequantise_rows, task, out.size(0), at::get_num_threads());
}

// weight [rows, columns], quantised if there are scales.
LayerWeight layer_weight(const Tensor& weight, const Tensor* scales, const optional<Tensor>& bias, int64_t bits,
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
const char* vector_like(const optional<Tensor>& tensor, const Tensor& x, int64_t size, const char* name) {
  if (!tensor.has_value()) return nullptr;
  TORCH_CHECK_VALUE(tensor->numel() == size && tensor->is_contiguous() && tensor->scalar_type() == x.scalar_type(),
                    name, " must be contiguous, [", size, "] and ", x.scalar_type(), " like x, got ", tensor->sizes(),
                    " ", tensor->scalar_type());
  return pointer(*tensor);
}

void check_lists(at::TensorList weights, at::TensorList scales, const c10::List<optional<Tensor>>& biases,
                 size_t count) {
  TORCH_CHECK_VALUE(weights.size() == count && biases.size() == count && (scales.empty() || scales.size() == count),
                    "expected ", count, " weights and biases and as many scales or none, got ", weights.size(), ", ",
                    biases.size(), " and ", scales.size());
}

std::tuple<Tensor, Tensor> attention_step(const Tensor& x, const optional<Tensor>& delta, const Tensor& norm,
                                          const Tensor& next_norm, at::TensorList weights, at::TensorList scales,
                                          const c10::List<optional<Tensor>>& biases, int64_t bits,
                                          const optional<Tensor>& q_norm, const optional<Tensor>& k_norm, double eps,
                                          const Tensor& cosine, const Tensor& sine, const Tensor& keys,
                                          const Tensor& values, int64_t length, int64_t window, double scale) {
  check_lists(weights, scales, biases, 4);
  const int64_t hidden = x.numel();
  TORCH_CHECK_VALUE(x.is_contiguous() && x.size(-1) == hidden, "x must be one token, got ", x.sizes());
  TORCH_CHECK_VALUE(keys.dim() == 4 && keys.size(0) == 1 && keys.is_contiguous() && values.is_contiguous() &&
                        keys.sizes() == values.sizes() && keys.scalar_type() == x.scalar_type() &&
                        values.scalar_type() == x.scalar_type(),
                    "keys and values must be contiguous [1, heads, capacity, head size] like x, got ", keys.sizes(),
                    " and ", values.sizes());
  AttentionCall call;
  call.type = float_type(x, "x");
  call.hidden = hidden;
  call.kv_heads = keys.size(1);
  call.capacity = keys.size(2);
  call.head_dim = keys.size(3);
  const auto weight = [&](int i, int64_t columns, const char* name) {
    return layer_weight(weights[i], scales.empty() ? nullptr : &scales[i], biases.get(i), bits, columns, name);
  };
  call.q = weight(0, hidden, "q");
  call.k = weight(1, hidden, "k");
  call.v = weight(2, hidden, "v");
  call.o = weight(3, call.q.rows, "o");
  call.heads = call.q.rows / call.head_dim;
  TORCH_CHECK_VALUE(call.heads > 0 && call.heads % call.kv_heads == 0 && call.heads * call.head_dim == call.q.rows &&
                        call.k.rows == call.kv_heads * call.head_dim && call.v.rows == call.k.rows &&
                        call.o.rows == hidden && call.head_dim % 2 == 0,
                    "the projections don't fit a cache of ", keys.sizes());
  TORCH_CHECK_VALUE(length >= 0 && length < call.capacity, "length must be in [0, ", call.capacity, "), got ", length);
  call.norm = vector_like(norm, x, hidden, "norm");
  call.next_norm = vector_like(next_norm, x, hidden, "next_norm");
  call.q_norm = vector_like(q_norm, x, call.head_dim, "q_norm");
  call.k_norm = vector_like(k_norm, x, call.head_dim, "k_norm");
  call.cosine = vector_like(cosine, x, call.head_dim, "cosine");
  call.sine = vector_like(sine, x, call.head_dim, "sine");
  call.delta = vector_like(delta, x, hidden, "delta");
  call.eps = float(eps);
  call.x = pointer(x);
  call.keys = static_cast<char*>(keys.data_ptr());
  call.values = static_cast<char*>(values.data_ptr());
  call.length = length;
  call.window = window;
  call.scale = float(scale);
  Tensor sum = at::empty(x.sizes(), x.options()), next = at::empty(x.sizes(), x.options());
  call.sum = static_cast<char*>(sum.data_ptr());
  call.next = static_cast<char*>(next.data_ptr());
  run_attention(*current().load(), call, at::get_num_threads());
  return {sum, next};
}

Tensor dense_ffn(const Tensor& x, at::TensorList weights, at::TensorList scales,
                 const c10::List<optional<Tensor>>& biases, int64_t bits, c10::string_view activation) {
  check_lists(weights, scales, biases, 3);
  const int64_t hidden = x.numel();
  TORCH_CHECK_VALUE(x.is_contiguous() && x.size(-1) == hidden, "x must be one token, got ", x.sizes());
  DenseFfnCall call;
  const auto weight = [&](int i, int64_t columns, const char* name) {
    return layer_weight(weights[i], scales.empty() ? nullptr : &scales[i], biases.get(i), bits, columns, name);
  };
  call.gate = weight(0, hidden, "gate");
  call.up = weight(1, hidden, "up");
  call.down = weight(2, call.gate.rows, "down");
  TORCH_CHECK_VALUE(call.up.rows == call.gate.rows && call.down.rows == hidden, "gate, up and down don't fit: ",
                    weights[0].sizes(), ", ", weights[1].sizes(), ", ", weights[2].sizes());
  call.activation = activation_of(activation);
  call.type = float_type(x, "x");
  call.x = pointer(x);
  Tensor out = at::empty(x.sizes(), x.options());
  call.out = static_cast<char*>(out.data_ptr());
  run_dense_ffn(*current().load(), call, at::get_num_threads());
  return out;
}

Tensor add_norm(const Tensor& x, const Tensor& delta, const Tensor& weight, double eps) {
  const int64_t hidden = x.numel();
  TORCH_CHECK_VALUE(x.is_contiguous() && x.size(-1) == hidden, "x must be one token, got ", x.sizes());
  Tensor sum = at::empty(x.sizes(), x.options()), out = at::empty(x.sizes(), x.options());
  current().load()->norm({float_type(x, "x"), pointer(x), vector_like(delta, x, hidden, "delta"),
                          static_cast<char*>(sum.data_ptr()), vector_like(weight, x, hidden, "weight"), float(eps),
                          hidden, static_cast<char*>(out.data_ptr())});
  return out;
}

Tensor core_counts(const Tensor& h, int64_t k) {
  TORCH_CHECK_VALUE(h.dim() == 2 && k >= 1, "h must be [tokens, neurons] and k at least 1, got ", h.sizes(), " and ", k);
  const Tensor values = h.contiguous();
  Tensor counts = at::empty({h.size(1)}, h.options().dtype(at::kLong));
  count_core_neurons(float_type(values, "h"), pointer(values), h.size(0), h.size(1), k,
                     counts.mutable_data_ptr<int64_t>(), at::get_num_threads());
  return counts;
}

std::vector<std::string> variants() {
  const Kernels* usable[MAX_VARIANTS];
  const int count = usable_variants(usable);
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) names.emplace_back(usable[i]->name);
  return names;
}

std::string variant() { return current().load()->name; }

void set_variant(const std::string& name) {
  const Kernels* found = find_variant(name.c_str());
  TORCH_CHECK_VALUE(found != nullptr, "this build and processor have no kernels ", name, ", only ", variants());
  current() = found;
}

double timed_read_of(const Tensor& data) {
  TORCH_CHECK_VALUE(data.is_contiguous(), "data must be contiguous");
  return timed_read(*current().load(), pointer(data), data.numel() * int64_t(data.element_size()), at::get_num_threads());
}

bool advise_huge_pages_for(const Tensor& data) {
  return advise_huge_pages(static_cast<char*>(data.data_ptr()), data.numel() * int64_t(data.element_size()));
}

}  // namespace

TORCH_LIBRARY(partinfer, m) {
  m.def(
      "sparse_ffn(Tensor x, Tensor gate, Tensor up, Tensor down, int prefix, Tensor? index, str activation, "
      "Tensor? bias_gate, Tensor? bias_up) -> Tensor");
  m.def(
      "sparse_ffn_out(Tensor x, Tensor gate, Tensor up, Tensor down, int prefix, Tensor? index, str activation, "
      "Tensor? bias_gate, Tensor? bias_up, Tensor(a!) out) -> ()");
  m.def(
      "sparse_ffn_plain(Tensor x, Tensor fc1, Tensor? bias1, Tensor fc2, int prefix, Tensor? index, str activation) "
      "-> Tensor");
  m.def(
      "quant_sparse_ffn(Tensor x, Tensor gate, Tensor gate_scales, Tensor up, Tensor up_scales, Tensor down, "
      "Tensor down_scales, int bits, int prefix, Tensor? index, str activation, Tensor? bias_gate, Tensor? bias_up) "
      "-> Tensor");
  m.def(
      "quant_sparse_ffn_plain(Tensor x, Tensor fc1, Tensor fc1_scales, Tensor? bias1, Tensor fc2, Tensor fc2_scales, "
      "int bits, int prefix, Tensor? index, str activation) -> Tensor");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("quant_linear(Tensor x, Tensor weight, Tensor scales, int bits, Tensor? bias) -> Tensor");
  m.def(
      "sparse_ffn_by_up(Tensor x, Tensor gate, Tensor up, Tensor down, int prefix, Tensor? index, Tensor scale, "
      "int keep_count, float threshold, str activation) -> (Tensor, Tensor)");
  m.def(
      "quant_sparse_ffn_by_up(Tensor x, Tensor gate, Tensor gate_scales, Tensor up, Tensor up_scales, Tensor down, "
      "Tensor down_scales, int bits, int prefix, Tensor? index, Tensor scale, int keep_count, float threshold, "
      "str activation) -> (Tensor, Tensor)");
  m.def(
      "sparse_ffn_plain_by_size(Tensor x, Tensor fc1, Tensor? bias1, Tensor fc2, int prefix, Tensor? index, "
      "Tensor scale, int keep_count, float threshold, str activation) -> (Tensor, Tensor)");
  m.def(
      "quant_sparse_ffn_plain_by_size(Tensor x, Tensor fc1, Tensor fc1_scales, Tensor? bias1, Tensor fc2, "
      "Tensor fc2_scales, int bits, int prefix, Tensor? index, Tensor scale, int keep_count, float threshold, "
      "str activation) -> (Tensor, Tensor)");
  m.def("quantize(Tensor floats, int bits, Tensor(a!) data, Tensor(b!) scales) -> ()");
  m.def("dequantize(Tensor data, Tensor scales, int bits, Tensor(a!) out) -> ()");
  m.def(
      "attention_step(Tensor x, Tensor? delta, Tensor norm, Tensor next_norm, Tensor[] weights, Tensor[] scales, "
      "Tensor?[] biases, int bits, Tensor? q_norm, Tensor? k_norm, float eps, Tensor cosine, Tensor sine, "
      "Tensor(a!) keys, Tensor(b!) values, int length, int window, float scale) -> (Tensor, Tensor)");
  m.def(
      "dense_ffn(Tensor x, Tensor[] weights, Tensor[] scales, Tensor?[] biases, int bits, str activation) -> Tensor");
  m.def("add_norm(Tensor x, Tensor delta, Tensor weight, float eps) -> Tensor");
  m.def("core_counts(Tensor h, int k) -> Tensor");
  m.def("timed_read(Tensor data) -> float");
  m.def("advise_huge_pages(Tensor data) -> bool");
  m.def("variants() -> str[]", variants);
  m.def("variant() -> str", variant);
  m.def("set_variant(str name) -> ()", set_variant);
}

TORCH_LIBRARY_IMPL(partinfer, CPU, m) {
  m.impl("sparse_ffn", sparse_ffn);
  m.impl("sparse_ffn_out", sparse_ffn_out);
  m.impl("sparse_ffn_plain", sparse_ffn_plain);
  m.impl("quant_sparse_ffn", quant_sparse_ffn);
  m.impl("quant_sparse_ffn_plain", quant_sparse_ffn_plain);
  m.impl("linear", linear);
  m.impl("quant_linear", quant_linear);
  m.impl("sparse_ffn_by_up", sparse_ffn_by_up);
  m.impl("quant_sparse_ffn_by_up", quant_sparse_ffn_by_up);
  m.impl("sparse_ffn_plain_by_size", sparse_ffn_plain_by_size);
  m.impl("quant_sparse_ffn_plain_by_size", quant_sparse_ffn_plain_by_size);
  m.impl("quantize", quantize);
  m.impl("dequantize", dequantize);
  m.impl("attention_step", attention_step);
  m.impl("dense_ffn", dense_ffn);
  m.impl("add_norm", add_norm);
  m.impl("core_counts", core_counts);
  m.impl("timed_read", timed_read_of);
  m.impl("advise_huge_pages", advise_huge_pages_for);
}
