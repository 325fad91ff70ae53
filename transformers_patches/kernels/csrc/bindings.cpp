// The torch ops: arguments are checked here, then handed to the drivers as plain pointers.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

#include "arguments.h"
#include "bus_errors.h"
#include "by_input.h"
#include "core_counts.h"
#include "layouts.h"
#include "probe.h"
#include "typical_size.h"

namespace {

using namespace partinfer;

Tensor sparse_ffn(const Tensor& x, const Tensor& gate, const Tensor& up, const Tensor& down, int64_t prefix,
                  const optional<Tensor>& index, c10::string_view activation, const optional<Tensor>& bias_gate,
                  const optional<Tensor>& bias_up) {
  const Input2d input = input_of(x);
  Tensor out = at::empty(x.sizes(), x.options());
  FfnCall call = gated_call(input, gate, up, down, prefix, index, activation, out);
  call.gate_bias = vector_of(bias_gate, "bias_gate", gate.size(0));
  call.up_bias = vector_of(bias_up, "bias_up", gate.size(0));
  run_ffn(*current().load(), call, at::get_num_threads());
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
                        const Tensor& up_scales, const Tensor& down, const Tensor& down_scales,
                        const optional<Tensor>& column_scales, int64_t bits, int64_t prefix,
                        const optional<Tensor>& index, c10::string_view activation,
                        const optional<Tensor>& bias_gate, const optional<Tensor>& bias_up) {
  const Input2d input = input_of(x);
  Tensor out = at::empty(x.sizes(), x.options());
  FfnCall call = gated_call(input, {gate, gate_scales}, {up, up_scales}, {down, down_scales, column_scales}, bits, prefix,
                            index, activation, out);
  call.gate_bias = vector_of(bias_gate, "bias_gate", gate.size(0));
  call.up_bias = vector_of(bias_up, "bias_up", gate.size(0));
  run_ffn(*current().load(), call, at::get_num_threads());
  return out;
}

Tensor quant_sparse_ffn_plain(const Tensor& x, const Tensor& fc1, const Tensor& fc1_scales,
                              const optional<Tensor>& bias1, const Tensor& fc2, const Tensor& fc2_scales,
                              const optional<Tensor>& column_scales, int64_t bits, int64_t prefix,
                              const optional<Tensor>& index, c10::string_view activation) {
  const Input2d input = input_of(x);
  Tensor out = at::empty(x.sizes(), x.options());
  const FfnCall call =
      plain_call(input, {fc1, fc1_scales}, bias1, {fc2, fc2_scales, column_scales}, bits, prefix, index, activation, out);
  run_ffn(*current().load(), call, at::get_num_threads());
  return out;
}

Tensor weighted_rows_of(const Tensor& h, Type type, const Matrix& weight, const float* column_scales, int64_t rows,
                        int64_t columns) {
  std::vector<int64_t> shape = h.sizes().vec();
  shape.back() = columns;
  Tensor out = at::empty(shape, h.options());
  const Tensor values = in_order(h);
  FfnCall call;
  call.type = type;
  call.down = weight;
  call.column_scales = column_scales;
  call.rows.prefix = rows;
  call.x = pointer(values);
  call.x_type = float_type(values, "h");
  call.tokens = columns == 0 ? 0 : out.numel() / columns;
  call.hidden = columns;
  call.out = static_cast<char*>(out.data_ptr());
  run_weighted_rows(*current().load(), call, at::get_num_threads());
  return out;
}

// Columns of a weight whose rows are multiplied with the last dimension of h.
int64_t columns_for(const Tensor& h, const Tensor& weight) {
  const int64_t rows = rows_of(weight, "weight");
  TORCH_CHECK_VALUE(h.dim() >= 1 && h.size(-1) == rows, "h must be [..., ", rows, "] like the weight's rows, got ",
                    h.sizes());
  return weight.size(1);
}

Tensor weighted_rows(const Tensor& h, const Tensor& weight) {
  const int64_t columns = columns_for(h, weight), rows = weight.size(0);
  check_matrix(weight, "weight", rows, columns);
  return weighted_rows_of(h, float_type(weight, "weight"), float_matrix(weight), nullptr, rows, columns);
}

Tensor quant_weighted_rows(const Tensor& h, const Tensor& weight, const Tensor& scales,
                           const optional<Tensor>& column_scales, int64_t bits) {
  const Type type = quant_type(bits);
  const int64_t columns = columns_for(h, weight) * (type == Type::Q4 ? 2 : 1), rows = weight.size(0);
  const Matrix matrix = quant_matrix(weight, scales, "weight", rows, columns, type);
  return weighted_rows_of(h, type, matrix, column_scales_of({weight, scales, column_scales}, columns), rows, columns);
}

// x [..., inputs], each token by itself: the outputs, and how many inputs each has read, int64 [tokens].
std::tuple<Tensor, Tensor> by_input(const Tensor& x, const Tensor& weight, const optional<Tensor>& scales,
                                    const optional<Tensor>& column_scales, int64_t bits, at::TensorList vectors,
                                    double threshold) {
  const ByInput layer = by_input_of(weight, scales, column_scales, bits, vectors, threshold);
  const Input2d input = input_of(x);
  TORCH_CHECK_VALUE(input.hidden == layer.inputs, "x must be [..., ", layer.inputs, "], got ", x.sizes());
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = layer.outputs;
  Tensor out = at::empty(shape, x.options().dtype(at::kFloat));
  Tensor read = at::empty({input.tokens}, x.options().dtype(at::kLong));
  const Type type = float_type(x, "x");
  const char* values = pointer(input.x);
  for (int64_t t = 0; t < input.tokens; ++t)
    read.mutable_data_ptr<int64_t>()[t] =
        run_by_input(*current().load(), layer, values + t * layer.inputs * element_size(type), type,
                     out.mutable_data_ptr<float>() + t * layer.outputs, at::get_num_threads());
  return {out.to(x.scalar_type()), read};
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
  if (input.hidden == 0) return bias.has_value() ? out.zero_().add_(*bias) : out.zero_();
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

std::tuple<Tensor, Tensor> screened_linear(const Tensor& x, const Tensor& data, const Tensor& scales,
                                           const Tensor& errors, const optional<Tensor>& whole, int64_t wanted,
                                           double tolerance, double temperature) {
  const Input2d input = input_of(x);
  ScreenedCall call = screened_call(data, scales, errors, whole, input.hidden);
  call.wanted = wanted;
  call.tolerance = float(tolerance);
  call.temperature = float(temperature);
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = call.rows;
  Tensor out = at::empty(shape, x.options()), exact = at::empty({input.tokens}, errors.options().dtype(at::kLong));
  call.x = pointer(input.x);
  call.x_type = float_type(x, "x");
  call.tokens = input.tokens;
  call.out = static_cast<char*>(out.data_ptr());
  call.exact = exact.mutable_data_ptr<int64_t>();
  run_screened(*current().load(), call, at::get_num_threads());
  return {out, exact};
}

// values: int8 [rows, hidden] beside planes of the same.
void check_joined(const Tensor& values, const Tensor& planes) {
  TORCH_CHECK_VALUE(values.scalar_type() == at::kChar && planes.scalar_type() == at::kByte && planes.dim() == 3 &&
                        planes.size(0) == 2 && planes.size(2) * 2 % GROUP == 0,
                    "expected int8 and two uint8 planes of groups of ", GROUP, " columns, got ", values.scalar_type(),
                    " ", values.sizes(), " and ", planes.scalar_type(), " ", planes.sizes());
  check_matrix(values, "values", planes.size(1), 2 * planes.size(2));
  check_matrix(planes.select(0, 0), "planes", planes.size(1), planes.size(2));
}

void join_planes(const Tensor& data, const Tensor& out) {
  check_joined(out, data);
  const char* high = pointer(data);
  run_join(*current().load(), {high, high + data.stride(0), nullptr, data.stride(1), 0}, data.size(1), out.size(1),
           reinterpret_cast<int8_t*>(mutable_pointer(out)), stride_of(out), at::get_num_threads());
}

void split_planes(const Tensor& values, const Tensor& out) {
  check_joined(values, out);
  char* high = mutable_pointer(out);
  split_rows(reinterpret_cast<const int8_t*>(pointer(values)), stride_of(values), out.size(1), values.size(1), high,
             high + out.stride(0), out.stride(1));
}

// One token at a time: every token chooses its own neurons. Returns how many were computed for each.
Tensor run_all_by_up(const FfnCall& call, const Tensor& scale, int64_t rows, int64_t keep, double threshold) {
  Tensor computed = at::empty({call.tokens}, scale.options().dtype(at::kLong));
  const int64_t row_bytes = call.hidden * element_size(call.x_type);
  ByUpCall one = by_up_call(call, scale, rows, keep, threshold);
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
                                                  const Tensor& down_scales, const optional<Tensor>& column_scales,
                                                  int64_t bits, int64_t prefix,
                                                  const optional<Tensor>& index, const Tensor& scale, int64_t keep,
                                                  double threshold, c10::string_view activation) {
  const Input2d input = input_of(x);
  Tensor out = at::empty(x.sizes(), x.options());
  FfnCall call = gated_call(input, {gate, gate_scales}, {up, up_scales}, {down, down_scales, column_scales}, bits, prefix,
                            index, activation, out);
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
                                                          const Tensor& fc2_scales, const optional<Tensor>& column_scales,
                                                          int64_t bits, int64_t prefix,
                                                          const optional<Tensor>& index, const Tensor& scale,
                                                          int64_t keep, double threshold, c10::string_view activation) {
  const Input2d input = input_of(x);
  Tensor out = at::empty(x.sizes(), x.options());
  const FfnCall call =
      plain_call(input, {fc1, fc1_scales}, bias1, {fc2, fc2_scales, column_scales}, bits, prefix, index, activation, out);
  return {out, run_all_by_up(call, scale, fc1.size(0), keep, threshold)};
}

ConvertTask convert_task(const Tensor& floats, const Tensor& data, const Tensor& scales, int64_t bits) {
  const int64_t rows = rows_of(floats, "the floats"), hidden = floats.size(1);
  const Type type = quant_type(bits);
  const Matrix matrix = quant_matrix(data, scales, "data", rows, hidden, type);
  check_matrix(floats, "the floats", rows, hidden);
  TORCH_CHECK_VALUE(floats.is_contiguous(), "the floats must be contiguous, got strides ", floats.strides());
  ConvertTask task;
  task.type = type;
  task.floats = mutable_pointer(floats);
  task.float_type = float_type(floats, "the floats");
  task.data = mutable_pointer(data);
  task.scales = reinterpret_cast<uint16_t*>(mutable_pointer(scales));
  task.row_bytes = matrix.row_bytes;
  task.row_scales = matrix.row_scales;
  task.hidden = hidden;
  return task;
}

void quantize(const Tensor& floats, int64_t bits, const optional<Tensor>& column_weights, const Tensor& data,
              const Tensor& scales) {
  ConvertTask task = convert_task(floats, data, scales, bits);
  if (column_weights) {
    TORCH_CHECK_VALUE(column_weights->scalar_type() == at::kFloat && column_weights->is_contiguous() &&
                          column_weights->is_cpu() && column_weights->numel() == task.hidden,
                      "column_weights must be float32 [", task.hidden, "], contiguous");
    task.column_weights = reinterpret_cast<const float*>(pointer(*column_weights));
  }
  run_convert(current().load()->quantise_rows, task, floats.size(0), at::get_num_threads());
}

void dequantize(const Tensor& data, const Tensor& scales, int64_t bits, const Tensor& out) {
  const ConvertTask task = convert_task(out, data, scales, bits);
  run_convert(current().load()->dequantise_rows, task, out.size(0), at::get_num_threads());
}

std::tuple<Tensor, Tensor> attention_step(const Tensor& x, const optional<Tensor>& delta, at::TensorList norms,
                                          at::TensorList norm_biases, double eps, at::TensorList weights,
                                          at::TensorList scales, const c10::List<optional<Tensor>>& biases, int64_t bits,
                                          const optional<Tensor>& cosine, const optional<Tensor>& sine,
                                          const Tensor& keys, const Tensor& values, int64_t length, int64_t window,
                                          double scale) {
  TORCH_CHECK_VALUE(keys.dim() == 4, "keys must be [1, heads, capacity, head size], got ", keys.sizes());
  AttentionCall call =
      attention_call({norms, norm_biases, eps}, weights, scales, biases, bits, window, scale, keys.size(-1));
  check_one_token(x, norms[0], "x");
  place_in_cache(call, keys, values, length);
  Tensor sum = at::empty(x.sizes(), x.options()), next = at::empty(x.sizes(), x.options());
  call.x = pointer(x);
  call.delta = vector_like(delta, x, x.numel(), "delta");
  set_rope(call, x, cosine, sine);
  call.sum = static_cast<char*>(sum.data_ptr());
  call.next = static_cast<char*>(next.data_ptr());
  run_attention(*current().load(), call, at::get_num_threads());
  return {sum, next};
}

Tensor dense_ffn(const Tensor& x, at::TensorList weights, at::TensorList scales,
                 const c10::List<optional<Tensor>>& biases, int64_t bits, c10::string_view activation) {
  const int64_t hidden = x.numel();
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.is_contiguous() && x.size(-1) == hidden, "x must be one token, got ", x.sizes());
  DenseFfnCall call = dense_call(float_type(x, "x"), hidden, weights, scales, biases, bits, activation);
  Tensor out = at::empty(x.sizes(), x.options());
  call.x = pointer(x);
  call.out = static_cast<char*>(out.data_ptr());
  run_dense_ffn(*current().load(), call, at::get_num_threads());
  return out;
}

Tensor add_norm(const Tensor& x, const Tensor& delta, const Tensor& weight, const optional<Tensor>& bias, double eps) {
  const int64_t hidden = x.numel();
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.is_contiguous() && x.size(-1) == hidden, "x must be one token, got ", x.sizes());
  Tensor sum = at::empty(x.sizes(), x.options()), out = at::empty(x.sizes(), x.options());
  current().load()->norm({float_type(x, "x"), pointer(x), vector_like(delta, x, hidden, "delta"),
                          static_cast<char*>(sum.data_ptr()), norm_of(weight, bias, eps, x, hidden, "weight"), hidden,
                          static_cast<char*>(out.data_ptr())});
  return out;
}

Tensor core_counts(const Tensor& h, double token_sparsity) {
  TORCH_CHECK_VALUE(h.dim() == 2 && h.size(0) > 0, "h must be [tokens, neurons] with at least a token, got ", h.sizes());
  TORCH_CHECK_VALUE(token_sparsity >= 0.0 && token_sparsity <= 1.0, "token_sparsity must be in [0, 1], got ",
                    token_sparsity);
  const Tensor values = in_order(h);
  Tensor counts = at::empty({h.size(1)}, h.options().dtype(at::kLong));
  count_core_neurons(*current().load(), float_type(values, "h"), pointer(values), h.size(0), h.size(1),
                     token_sparsity, counts.mutable_data_ptr<int64_t>(), at::get_num_threads());
  return counts;
}

Tensor most_marked(const Tensor& counts, const Tensor& priority, int64_t first, int64_t wanted) {
  const int64_t neurons = counts.numel();
  for (const Tensor& part : {counts, priority})
    TORCH_CHECK_VALUE(part.scalar_type() == at::kLong && part.dim() == 1 && part.numel() == neurons && part.is_contiguous(),
                      "counts and priority must be contiguous int64 [", neurons, "], got ", part.scalar_type(), " ",
                      part.sizes());
  TORCH_CHECK_VALUE(first >= 0 && first <= neurons && wanted >= 0 && wanted <= neurons - first, "can't choose ", wanted,
                    " of ", neurons, " neurons from position ", first, " on");
  if (neurons > 0) {
    const auto range_of = [neurons](const Tensor& part) {
      const int64_t* values = reinterpret_cast<const int64_t*>(pointer(part));
      return std::minmax_element(values, values + neurons);
    };
    const auto [first_place, last_place] = range_of(priority);
    const auto [least, most] = range_of(counts);
    const int64_t highest = std::numeric_limits<int64_t>::max() / 2;
    TORCH_CHECK_VALUE(*first_place >= 0 && *last_place < highest && *least >= 0 && *most <= highest / (*last_place + 1),
                      "counts and priorities must be numbers from 0 on whose product fits into 62 bits, got from ", *least,
                      " to ", *most, " and from ", *first_place, " to ", *last_place);
  }
  Tensor chosen = at::empty({wanted}, counts.options().dtype(at::kInt));
  choose_most_marked(counts.const_data_ptr<int64_t>(), priority.const_data_ptr<int64_t>(), neurons, first, wanted,
                     chosen.mutable_data_ptr<int32_t>());
  return chosen;
}

Tensor sum_of_squares(const Tensor& values) {
  TORCH_CHECK_VALUE(values.dim() == 2, "values must be [tokens, neurons], got ", values.sizes());
  const Tensor rows = in_order(values);
  Tensor sums = at::empty({values.size(1)}, values.options().dtype(at::kFloat));
  sum_squares(*current().load(), float_type(rows, "values"), pointer(rows), rows.size(0), rows.size(1),
              sums.mutable_data_ptr<float>(), at::get_num_threads());
  return sums;
}

Tensor typical_scale_of(const Tensor& sums, int64_t tokens, const optional<Tensor>& prior, int64_t prior_tokens,
                        const Tensor& norms) {
  const int64_t neurons = sums.numel();
  const auto floats_of = [neurons](const Tensor& part) {
    const bool fits = part.scalar_type() == at::kFloat && part.dim() == 1 && part.numel() == neurons;
    TORCH_CHECK_VALUE(fits && part.is_contiguous(),
                      "sums, prior and norms must be contiguous float32 [", neurons, "], got ", part.scalar_type(), " ",
                      part.sizes());
    return reinterpret_cast<const float*>(pointer(part));
  };
  TORCH_CHECK_VALUE(tokens >= 0 && prior_tokens > 0, "tokens can't be ", tokens, ", nor prior_tokens ", prior_tokens);
  Tensor scale = at::empty({neurons}, sums.options());
  typical_scale(floats_of(sums), tokens, prior.has_value() ? floats_of(*prior) : nullptr, prior_tokens, floats_of(norms),
                neurons, scale.mutable_data_ptr<float>());
  return scale;
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
  TORCH_CHECK_VALUE(data.is_contiguous(), "data must be contiguous");
  return advise_huge_pages(mutable_pointer(data), data.numel() * int64_t(data.element_size()));
}

// data: all of a mapping, uint8. Returns where it begins, by which `forget_mapping` knows it.
int64_t watch_mapping_of(const Tensor& data) {
  TORCH_CHECK_VALUE(data.scalar_type() == at::kByte && data.dim() == 1 && data.is_contiguous() && data.numel() > 0,
                    "expected the bytes of a mapping, got ", data.scalar_type(), " ", data.sizes());
  const char* begin = pointer(data);
  watch_mapping(begin, data.numel());
  return reinterpret_cast<int64_t>(begin);
}

void forget_mapping_at(int64_t begin) { forget_mapping(reinterpret_cast<const void*>(begin)); }

}  // namespace

TORCH_LIBRARY(partinfer, m) {
  m.def(
      "sparse_ffn(Tensor x, Tensor gate, Tensor up, Tensor down, int prefix, Tensor? index, str activation, "
      "Tensor? bias_gate, Tensor? bias_up) -> Tensor");
  m.def(
      "sparse_ffn_plain(Tensor x, Tensor fc1, Tensor? bias1, Tensor fc2, int prefix, Tensor? index, str activation) "
      "-> Tensor");
  m.def(
      "quant_sparse_ffn(Tensor x, Tensor gate, Tensor gate_scales, Tensor up, Tensor up_scales, Tensor down, "
      "Tensor down_scales, Tensor? column_scales, int bits, int prefix, Tensor? index, str activation, "
      "Tensor? bias_gate, Tensor? bias_up) -> Tensor");
  m.def(
      "quant_sparse_ffn_plain(Tensor x, Tensor fc1, Tensor fc1_scales, Tensor? bias1, Tensor fc2, Tensor fc2_scales, "
      "Tensor? column_scales, int bits, int prefix, Tensor? index, str activation) -> Tensor");
  m.def("weighted_rows(Tensor h, Tensor weight) -> Tensor");
  m.def("quant_weighted_rows(Tensor h, Tensor weight, Tensor scales, Tensor? column_scales, int bits) -> Tensor");
  m.def(
      "by_input(Tensor x, Tensor weight, Tensor? scales, Tensor? column_scales, int bits, Tensor[] vectors, "
      "float threshold) -> (Tensor, Tensor)");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("quant_linear(Tensor x, Tensor weight, Tensor scales, int bits, Tensor? bias) -> Tensor");
  m.def(
      "screened_linear(Tensor x, Tensor data, Tensor scales, Tensor errors, Tensor? whole, int wanted, "
      "float tolerance, float temperature) -> (Tensor, Tensor)");
  m.def("join_planes(Tensor data, Tensor(a!) out) -> ()");
  m.def("split_planes(Tensor values, Tensor(a!) out) -> ()");
  m.def(
      "sparse_ffn_by_up(Tensor x, Tensor gate, Tensor up, Tensor down, int prefix, Tensor? index, Tensor scale, "
      "int keep_count, float threshold, str activation) -> (Tensor, Tensor)");
  m.def(
      "quant_sparse_ffn_by_up(Tensor x, Tensor gate, Tensor gate_scales, Tensor up, Tensor up_scales, Tensor down, "
      "Tensor down_scales, Tensor? column_scales, int bits, int prefix, Tensor? index, Tensor scale, int keep_count, "
      "float threshold, str activation) -> (Tensor, Tensor)");
  m.def(
      "sparse_ffn_plain_by_size(Tensor x, Tensor fc1, Tensor? bias1, Tensor fc2, int prefix, Tensor? index, "
      "Tensor scale, int keep_count, float threshold, str activation) -> (Tensor, Tensor)");
  m.def(
      "quant_sparse_ffn_plain_by_size(Tensor x, Tensor fc1, Tensor fc1_scales, Tensor? bias1, Tensor fc2, "
      "Tensor fc2_scales, Tensor? column_scales, int bits, int prefix, Tensor? index, Tensor scale, int keep_count, "
      "float threshold, str activation) -> (Tensor, Tensor)");
  m.def("quantize(Tensor floats, int bits, Tensor? column_weights, Tensor(a!) data, Tensor(b!) scales) -> ()");
  m.def("dequantize(Tensor data, Tensor scales, int bits, Tensor(a!) out) -> ()");
  m.def(
      "attention_step(Tensor x, Tensor? delta, Tensor[] norms, Tensor[] norm_biases, float eps, Tensor[] weights, "
      "Tensor[] scales, Tensor?[] biases, int bits, Tensor? cosine, Tensor? sine, Tensor(a!) keys, Tensor(b!) values, "
      "int length, int window, float scale) -> (Tensor, Tensor)");
  m.def(
      "dense_ffn(Tensor x, Tensor[] weights, Tensor[] scales, Tensor?[] biases, int bits, str activation) -> Tensor");
  m.def("add_norm(Tensor x, Tensor delta, Tensor weight, Tensor? bias, float eps) -> Tensor");
  m.def("core_counts(Tensor h, float token_sparsity) -> Tensor");
  m.def("most_marked(Tensor counts, Tensor priority, int first, int wanted) -> Tensor");
  m.def("sum_of_squares(Tensor values) -> Tensor");
  m.def("typical_scale(Tensor sums, int tokens, Tensor? prior, int prior_tokens, Tensor norms) -> Tensor");
  m.def("timed_read(Tensor data) -> float");
  m.def("advise_huge_pages(Tensor data) -> bool");
  m.def("watch_mapping(Tensor data) -> int");
  m.def("forget_mapping(int begin) -> ()", forget_mapping_at);
  m.def("variants() -> str[]", variants);
  m.def("variant() -> str", variant);
  m.def("set_variant(str name) -> ()", set_variant);
}

TORCH_LIBRARY_IMPL(partinfer, CPU, m) {
  m.impl("sparse_ffn", sparse_ffn);
  m.impl("sparse_ffn_plain", sparse_ffn_plain);
  m.impl("quant_sparse_ffn", quant_sparse_ffn);
  m.impl("quant_sparse_ffn_plain", quant_sparse_ffn_plain);
  m.impl("weighted_rows", weighted_rows);
  m.impl("by_input", by_input);
  m.impl("quant_weighted_rows", quant_weighted_rows);
  m.impl("linear", linear);
  m.impl("quant_linear", quant_linear);
  m.impl("screened_linear", screened_linear);
  m.impl("join_planes", join_planes);
  m.impl("split_planes", split_planes);
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
  m.impl("most_marked", most_marked);
  m.impl("sum_of_squares", sum_of_squares);
  m.impl("typical_scale", typical_scale_of);
  m.impl("timed_read", timed_read_of);
  m.impl("advise_huge_pages", advise_huge_pages_for);
  m.impl("watch_mapping", watch_mapping_of);
}
