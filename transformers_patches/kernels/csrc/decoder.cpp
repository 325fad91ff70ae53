// The decoder layers of a model as one object that takes a token through any run of them in a single call. Between
// small operations of Python, caches that weights have just flushed make every step slow; here nothing is looked up.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "arguments.h"
#include "rows_on_disk.h"

namespace {

using namespace partinfer;
using Biases = c10::List<optional<Tensor>>;

enum class Ffn { NONE, DENSE, ACTIVE, BY_UP };

struct Layer {
  AttentionCall attention;
  Ffn kind = Ffn::NONE;
  DenseFfnCall dense;
  ByUpCall rows;                  // the FFN of ACTIVE, too
  std::vector<const char*> added;  // [hidden] each: what is added to the FFN's output, one after the other
  Tensor norm;                    // says type and size
  std::vector<Tensor> attention_weights, ffn_weights;  // kept alive
  c10::intrusive_ptr<RowsOnDisk> on_disk;  // where the FFN's rows of gate and down are, if not all are in memory
  Read read, total;               // by the last token, and by all since they were last asked for
};

void keep(std::vector<Tensor>& kept, const optional<Tensor>& tensor) {
  if (tensor.has_value()) kept.push_back(*tensor);
}

void keep(std::vector<Tensor>& kept, at::TensorList weights, at::TensorList scales, const Biases& biases) {
  kept.insert(kept.end(), weights.begin(), weights.end());
  kept.insert(kept.end(), scales.begin(), scales.end());
  for (size_t i = 0; i < biases.size(); ++i) keep(kept, biases.get(i));
}

class Decoder : public torch::CustomClassHolder {
 public:
  // The attention of the next layer, as in the op attention_step.
  void add_layer(std::vector<Tensor> norms, std::vector<Tensor> norm_biases, double eps, std::vector<Tensor> weights,
                 std::vector<Tensor> scales, Biases biases, int64_t bits, int64_t window, double scale,
                 int64_t head_dim) {
    Layer layer;
    layer.attention = attention_call({norms, norm_biases, eps}, weights, scales, biases, bits, window, scale, head_dim);
    layer.norm = norms[0];
    check_like_first(layer);
    keep(layer.attention_weights, weights, scales, biases);
    keep(layer.attention_weights, norms, norm_biases, Biases());
    layers_.push_back(std::move(layer));
  }

  // The same with weights that are stored by input: q, k and v in one, and o. vectors: mean, norm and constant of both.
  void add_layer_by_input(std::vector<Tensor> norms, std::vector<Tensor> norm_biases, double eps,
                          std::vector<Tensor> weights, std::vector<Tensor> scales, std::vector<Tensor> column_scales,
                          int64_t bits, std::vector<Tensor> vectors, std::vector<double> thresholds, int64_t window,
                          double scale, int64_t head_dim, int64_t kv_heads) {
    TORCH_CHECK_VALUE(weights.size() == 2 && vectors.size() == 6 && thresholds.size() == 2 &&
                          (scales.empty() || scales.size() == 2) && (column_scales.empty() || column_scales.size() == 2),
                      "expected two weights with three vectors and a threshold each");
    const auto part = [&](size_t i) {
      const optional<Tensor> scale_of = scales.empty() ? optional<Tensor>() : scales[i];
      const optional<Tensor> columns = column_scales.empty() ? optional<Tensor>() : column_scales[i];
      return by_input_of(weights[i], scale_of, columns, bits, at::TensorList(vectors).slice(3 * i, 3), thresholds[i]);
    };
    Layer layer;
    layer.attention = attention_call({norms, norm_biases, eps}, part(0), part(1), window, scale, head_dim, kv_heads);
    layer.norm = norms[0];
    check_like_first(layer);
    keep(layer.attention_weights, weights, scales, Biases());
    keep(layer.attention_weights, vectors, column_scales, Biases());
    keep(layer.attention_weights, norms, norm_biases, Biases());
    layers_.push_back(std::move(layer));
  }

  // What the attention of a layer by input reads from now on.
  void set_input_thresholds(int64_t number, double attention, double output) {
    AttentionCall& call = at(number).attention;
    TORCH_CHECK_VALUE(call.qkv_inputs.inputs > 0, "layer ", number, " isn't stored by input");
    TORCH_CHECK_VALUE(!std::isnan(attention) && !std::isnan(output), "thresholds must be numbers");
    call.qkv_inputs.threshold = float(attention);
    call.o_inputs.threshold = float(output);
  }

  // What all layers have read since this was last asked: int64 [layers, 5], in the order of `Read`.
  Tensor take_counts() {
    Tensor counts = at::empty({int64_t(layers_.size()), 5}, at::TensorOptions().dtype(at::kLong));
    int64_t* out = counts.mutable_data_ptr<int64_t>();
    for (Layer& layer : layers_) {
      for (const int64_t count : {layer.total.attention, layer.total.output, layer.total.ffn, layer.total.neurons, layer.total.down})
        *out++ = count;
      layer.total = Read();
    }
    return counts;
  }

  // A layer's FFN is dense, as in the op dense_ffn.
  void set_dense(int64_t number, std::vector<Tensor> weights, std::vector<Tensor> scales, Biases biases, int64_t bits,
                 std::string activation) {
    Layer& layer = at(number);
    layer.dense = dense_call(layer.attention.type, layer.attention.hidden, weights, scales, biases, bits, activation);
    layer.kind = Ffn::DENSE;
    layer.on_disk.reset();
    layer.ffn_weights.clear();
    keep(layer.ffn_weights, weights, scales, biases);
  }

  // A layer's FFN is that of some rows of gate, up and down, as in the op sparse_ffn, or of fc1 and fc2, as in
  // sparse_ffn_plain; with `size` the token keeps `keep_count` of them, or those above `threshold`, as in sparse_ffn_by_up
  // and sparse_ffn_plain_by_size. added: [hidden] each, onto the output. up_vectors: mean, norm and constant if up is
  // stored by input, [hidden, rows], with column scales of its own; up_threshold is for its inputs. down_size: float32
  // [rows], with which only rows of down are read whose |h| * size is above down_threshold.
  void set_active(int64_t number, std::vector<Tensor> weights, std::vector<Tensor> scales,
                  const optional<Tensor>& column_scales, Biases biases, int64_t bits, std::string activation,
                  int64_t prefix, const optional<Tensor>& index, const optional<Tensor>& size, int64_t keep_count,
                  double threshold, std::vector<Tensor> added, std::vector<Tensor> up_vectors,
                  const optional<Tensor>& up_column_scales, double up_threshold, const optional<Tensor>& down_size,
                  double down_threshold) {
    Layer& layer = at(number);
    const bool by_input = !up_vectors.empty();
    const auto rows_like = by_input ? gate_and_down_rows : weights.size() == 2 ? plain_rows : gated_rows;
    const FfnCall call = rows_like(layer, {weights, scales, biases, bits}, column_scales, activation, prefix, index);
    const int64_t rows = weights[0].size(0);
    ByUpCall checked;
    checked.ffn = call;
    if (size.has_value()) checked = by_up_call(call, *size, rows, keep_count, threshold);
    TORCH_CHECK_VALUE(size.has_value() || (!by_input && !down_size.has_value()), "inputs and rows of down are chosen with `size` only");
    if (by_input) {
      const optional<Tensor> up_scales = scales.empty() ? optional<Tensor>() : scales[1];
      checked.up = by_input_of(weights[1], up_scales, up_column_scales, bits, up_vectors, up_threshold);
      TORCH_CHECK_VALUE(checked.up.inputs == call.hidden && checked.up.outputs == rows && prefix == rows,
                        "up by input must be [", call.hidden, ", ", rows, "], all neurons candidates, got ",
                        weights[1].sizes(), " and ", prefix);
    }
    if (down_size.has_value()) {
      TORCH_CHECK_VALUE(!std::isnan(down_threshold), "down_threshold must be a number, got NaN");
      checked.down_size = floats_of(*down_size, "down_size", rows);
      checked.down_threshold = float(down_threshold);
    }
    std::vector<const char*> vectors;
    for (const Tensor& one : added) vectors.push_back(vector_like(one, layer.norm, layer.attention.hidden, "added"));
    check_nothing_ignored(size.has_value() && weights.size() == 3, scales, column_scales, biases);
    // nothing changes before all of it has been checked
    layer.rows = checked;
    layer.added = std::move(vectors);
    layer.kind = size.has_value() ? Ffn::BY_UP : Ffn::ACTIVE;
    layer.on_disk.reset();
    layer.ffn_weights = std::move(added);
    keep(layer.ffn_weights, weights, scales, biases);
    keep(layer.ffn_weights, column_scales);
    keep(layer.ffn_weights, index);
    keep(layer.ffn_weights, size);
    keep(layer.ffn_weights, up_vectors, at::TensorList(), Biases());
    keep(layer.ffn_weights, up_column_scales);
    keep(layer.ffn_weights, down_size);
  }

  // A layer's FFN chooses by up, as above, and its rows of gate and down are layer `of_disk` of `on_disk`: a record is both
  // rows, then the scales of both. up, up_scales: of all rows, float or quantised to so many bits.
  void set_active_on_disk(int64_t number, const c10::intrusive_ptr<RowsOnDisk>& on_disk, int64_t of_disk, const Tensor& up,
                          const optional<Tensor>& up_scales, const optional<Tensor>& column_scales, int64_t bits,
                          std::string activation, int64_t prefix, const optional<Tensor>& index, const Tensor& size,
                          int64_t keep_count, double threshold, std::vector<Tensor> added) {
    Layer& layer = at(number);
    TORCH_CHECK_VALUE(on_disk != nullptr, "expected rows on disk, got none");
    const Input2d like = input_of(layer.norm);
    const int64_t rows = rows_of(up, "up"), hidden = like.hidden;
    TORCH_CHECK_VALUE(on_disk->rows(of_disk) == rows, "up has ", rows, " rows, on disk there are ", on_disk->rows(of_disk));
    TORCH_CHECK_VALUE(column_scales.has_value() <= up_scales.has_value(), "column scales belong to quantised weights");
    const Type type = up_scales.has_value() ? quant_type(bits) : float_type(up, "up");
    FfnCall call = ffn_call(type, like, rows, prefix, index, activation, layer.norm);
    int64_t row_bytes = hidden * int64_t(up.element_size()), scale_bytes = 0;
    if (up_scales.has_value()) {
      call.up = quant_matrix(up, *up_scales, "up", rows, hidden, type);
      call.column_scales = column_scales_of({up, *up_scales, column_scales}, hidden);
      row_bytes = type == Type::Q8 ? hidden : hidden / 2;
      scale_bytes = hidden / GROUP * 2;
    } else {
      check_matrix(up, "up", rows, hidden);
      call.up = float_matrix(up);
    }
    const int64_t needed = 2 * (row_bytes + scale_bytes);
    TORCH_CHECK_VALUE(on_disk->record() >= needed && on_disk->record() < needed + UNIT, "a record of these rows has ", needed,
                      " bytes, on disk it has ", on_disk->record());
    const char* memory = on_disk->memory();
    const auto part = [&](int64_t which) {
      Matrix matrix{memory + which * row_bytes, nullptr, UNIT, 0};
      if (scale_bytes == 0) return matrix;
      matrix.scales = reinterpret_cast<const uint16_t*>(memory + 2 * row_bytes + which * scale_bytes);
      matrix.row_scales = UNIT / 2;
      return matrix;
    };
    call.gate = part(0);
    call.down = part(1);
    ByUpCall checked = by_up_call(call, size, rows, keep_count, threshold);
    checked.fetch = on_disk.get();
    checked.fetch_layer = of_disk;
    std::vector<const char*> vectors;
    for (const Tensor& one : added) vectors.push_back(vector_like(one, layer.norm, layer.attention.hidden, "added"));
    // nothing changes before all of it has been checked
    layer.rows = checked;
    layer.added = std::move(vectors);
    layer.kind = Ffn::BY_UP;
    layer.on_disk = on_disk;
    layer.ffn_weights = std::move(added);
    layer.ffn_weights.push_back(up);
    layer.ffn_weights.push_back(size);
    keep(layer.ffn_weights, up_scales);
    keep(layer.ffn_weights, column_scales);
    keep(layer.ffn_weights, index);
  }

  // The norm after the last layer.
  void set_norm(const Tensor& weight, const optional<Tensor>& bias, double eps) {
    check_one_token(weight, at(0).norm, "norm");
    last_norm_ = norm_of(weight, bias, eps, weight, weight.numel(), "the last norm's bias");
    norm_ = weight;
    norm_bias_ = bias;
  }

  // What comes before the first layer, the embeddings, and after the last norm, the head: two linear layers with `hidden`
  // columns and a row for each token. They are needed for `logits` only, and the norm has to be set before. screen: what
  // the head is screened with, as in the op screened_linear (both planes then are the head itself).
  void set_embedding_and_head(std::vector<Tensor> embedding, std::vector<Tensor> embedding_scales,
                              int64_t embedding_bits, std::vector<Tensor> head, std::vector<Tensor> head_scales,
                              Biases head_bias, int64_t head_bits, const optional<Tensor>& screen,
                              const optional<Tensor>& screen_scales, const optional<Tensor>& screen_errors) {
    TORCH_CHECK_VALUE(norm_.defined(), "set_norm first");
    Biases none;
    none.push_back(optional<Tensor>());
    // nothing changes if one of them doesn't fit
    const Embedding before = embedding_of({embedding, embedding_scales, none, embedding_bits});
    const Head after = head_of({head, head_scales, head_bias, head_bits}, screen, screen_scales, screen_errors);
    embedding_ = before;
    head_ = after;
    end_weights_.clear();
    keep(end_weights_, embedding, embedding_scales, none);
    keep(end_weights_, head, head_scales, head_bias);
    for (const optional<Tensor>& part : {screen, screen_scales, screen_errors}) keep(end_weights_, part);
  }

  // Token `id` through all layers: the logits of what comes next, [1, 1, vocabulary], the neurons that each FFN computed,
  // and the logits that were computed exactly: all, or of a head in planes what is asked for (screened.h). position: a learned
  // embedding of the token's place, [hidden], if the model has such. The rest as in `run`.
  std::tuple<Tensor, Tensor, int64_t> logits(int64_t id, const optional<Tensor>& position,
                                             const optional<Tensor>& cosine, const optional<Tensor>& sine,
                                             std::vector<Tensor> keys, std::vector<Tensor> values, int64_t length,
                                             int64_t wanted, double tolerance, double temperature) {
    TORCH_CHECK_VALUE(!end_weights_.empty(), "set_embedding_and_head first");
    TORCH_CHECK_VALUE(id >= 0 && id < embedding_.rows, "token ids are 0 to ", embedding_.rows - 1, ", got ", id);
    const Kernels& kernels = *current().load();
    const Tensor x = at::empty({1, 1, norm_.numel()}, norm_.options());
    look_up(kernels, id, x);
    if (const char* place = vector_like(position, x, x.numel(), "position"))
      add_vector(kernels, float_type(x, "x"), static_cast<char*>(x.data_ptr()), place, x.numel());
    const auto [sum, out, computed] = run(0, int64_t(layers_.size()), x, {}, cosine, sine, keys, values, length);
    Tensor logits = at::empty({1, 1, head_.rows}, x.options());
    char* place = static_cast<char*>(logits.data_ptr());
    if (!head_.screened) {
      run_linear(kernels, linear_call(head_.whole, float_type(x, "x"), pointer(out), place), at::get_num_threads());
      return {logits, computed, head_.rows};
    }
    ScreenedCall call = head_.planes;
    int64_t exact = 0;
    call.wanted = wanted;
    call.tolerance = float(tolerance);
    call.temperature = float(temperature);
    call.x = pointer(out);
    call.x_type = float_type(x, "x");
    call.tokens = 1;
    call.out = place;
    call.exact = &exact;
    run_screened(kernels, call, at::get_num_threads());
    return {logits, computed, exact};
  }

  // Takes one token, x [1, 1, hidden] plus the output `delta` of the layer before, through the layers first … last - 1.
  // keys, values: of those layers, [1, heads, capacity, head size], filled up to `length`. Returns what comes out as x
  // and delta, after the last layer x + delta and the norm of it, and for every layer the neurons that its FFN computed,
  // int64 (0 for one that is dense).
  std::tuple<Tensor, Tensor, Tensor> run(int64_t first, int64_t last, const Tensor& x, const optional<Tensor>& delta,
                                         const optional<Tensor>& cosine, const optional<Tensor>& sine,
                                         std::vector<Tensor> keys, std::vector<Tensor> values, int64_t length) {
    TORCH_CHECK_VALUE(0 <= first && first < last && last <= int64_t(layers_.size()) &&
                          int64_t(keys.size()) == last - first && keys.size() == values.size(),
                      "expected keys and values of some of ", layers_.size(), " layers, got layers ", first, " to ",
                      last, ", ", keys.size(), " keys and ", values.size(), " values");
    check_one_token(x, at(first).norm, "x");
    for (int64_t number = first; number < last; ++number) {  // before the first layer writes into its cache
      Layer& layer = at(number);
      TORCH_CHECK_VALUE(layer.kind != Ffn::NONE, "a layer has no FFN yet: call set_dense or set_active for layer ", number);
      place_in_cache(layer.attention, keys[size_t(number - first)], values[size_t(number - first)], length);
      set_rope(layer.attention, x, cosine, sine);
    }
    const bool ends = last == int64_t(layers_.size());
    TORCH_CHECK_VALUE(!ends || norm_.defined(), "the last layer needs a norm behind it: call set_norm");
    Tensor sum = at::empty(x.sizes(), x.options()), out = at::empty(x.sizes(), x.options());
    Tensor next = at::empty(x.sizes(), x.options());
    Tensor computed = at::empty({last - first}, x.options().dtype(at::kLong));
    const char* from = pointer(x);
    const char* add = vector_like(delta, x, x.numel(), "delta");
    const Kernels& kernels = *current().load();
    const int threads = at::get_num_threads();
    for (int64_t number = first; number < last; ++number) {
      Layer& layer = at(number);
      AttentionCall& call = layer.attention;
      call.x = from;
      call.delta = add;
      call.sum = static_cast<char*>(sum.data_ptr());
      call.next = static_cast<char*>(next.data_ptr());
      layer.read = Read();
      call.read = &layer.read;
      run_attention(kernels, call, threads);
      computed.mutable_data_ptr<int64_t>()[number - first] =
          ffn(kernels, layer, call.next, static_cast<char*>(out.data_ptr()), threads);
      add_read(layer.total, layer.read);
      from = call.sum;
      add = pointer(out);
    }
    if (ends)
      kernels.norm({float_type(x, "x"), from, add, static_cast<char*>(sum.data_ptr()), last_norm_, x.numel(),
                    static_cast<char*>(out.data_ptr())});
    return {sum, out, computed};
  }

 private:
  void check_like_first(const Layer& layer) const {
    if (layers_.empty()) return;
    const Tensor& like = layers_[0].norm;
    TORCH_CHECK_VALUE(layer.norm.numel() == like.numel() && layer.norm.scalar_type() == like.scalar_type(),
                      "all layers must have the hidden size and the type of the first, ", like.numel(), " and ",
                      like.scalar_type(), ", got ", layer.norm.numel(), " and ", layer.norm.scalar_type());
  }

  Layer& at(int64_t number) {
    TORCH_CHECK_VALUE(number >= 0 && number < int64_t(layers_.size()), "there are ", layers_.size(),
                      " layers, got number ", number);
    return layers_[size_t(number)];
  }

  // What a layer's kind of FFN would leave out without a word.
  static void check_nothing_ignored(bool chooses_by_up, const std::vector<Tensor>& scales,
                                    const optional<Tensor>& column_scales, const Biases& biases) {
    TORCH_CHECK_VALUE(!column_scales.has_value() || !scales.empty(), "column scales belong to quantised weights");
    const size_t last = biases.size() - 1;
    TORCH_CHECK_VALUE(!biases.get(last).has_value(), "a bias of the last projection belongs into `added`");
    for (size_t i = 0; chooses_by_up && i < last; ++i)
      TORCH_CHECK_VALUE(!biases.get(i).has_value(), "a gated FFN that chooses by up can't have biases");
  }

  // x and out are set for every token; `layer.norm` is like both
  static FfnCall gated_rows(const Layer& layer, const LayerWeights& given, const optional<Tensor>& column_scales,
                            const std::string& activation, int64_t prefix, const optional<Tensor>& index) {
    const auto& [weights, scales, biases, bits] = given;
    given.check(3);
    const Input2d like = input_of(layer.norm);
    FfnCall call =
        scales.empty()
            ? gated_call(like, weights[0], weights[1], weights[2], prefix, index, activation, layer.norm)
            : gated_call(like, {weights[0], scales[0]}, {weights[1], scales[1]}, {weights[2], scales[2], column_scales},
                         bits, prefix, index, activation, layer.norm);
    call.gate_bias = vector_of(biases.get(0), "bias_gate", weights[0].size(0));
    call.up_bias = vector_of(biases.get(1), "bias_up", weights[0].size(0));
    return call;
  }

  // `up` is stored by input, and checked for itself
  static FfnCall gate_and_down_rows(const Layer& layer, const LayerWeights& given, const optional<Tensor>& column_scales,
                                    const std::string& activation, int64_t prefix, const optional<Tensor>& index) {
    const auto& [weights, scales, biases, bits] = given;
    given.check(3);
    const Input2d like = input_of(layer.norm);
    if (scales.empty()) return plain_call(like, weights[0], {}, weights[2], prefix, index, activation, layer.norm);
    return plain_call(like, {weights[0], scales[0]}, {}, {weights[2], scales[2], column_scales}, bits, prefix, index,
                      activation, layer.norm);
  }

  static FfnCall plain_rows(const Layer& layer, const LayerWeights& given, const optional<Tensor>& column_scales,
                            const std::string& activation, int64_t prefix, const optional<Tensor>& index) {
    const auto& [weights, scales, biases, bits] = given;
    given.check(2);
    const Input2d like = input_of(layer.norm);
    if (scales.empty())
      return plain_call(like, weights[0], biases.get(0), weights[1], prefix, index, activation, layer.norm);
    return plain_call(like, {weights[0], scales[0]}, biases.get(0), {weights[1], scales[1], column_scales}, bits, prefix,
                      index, activation, layer.norm);
  }

  struct Embedding {
    LayerWeight whole;
    Planes planes;  // instead, if it has a high plane
    int64_t rows = 0;
  };

  struct Head {
    bool screened = false;
    LayerWeight whole;
    ScreenedCall planes;
    int64_t rows = 0;
  };

  Embedding embedding_of(const LayerWeights& given) const {
    given.check(1);
    Embedding embedding;
    const Tensor& data = given.weights[0];
    TORCH_CHECK_VALUE(!given.scales.empty() || data.scalar_type() == norm_.scalar_type(),
                      "embeddings must be quantised or ", norm_.scalar_type(), ", got ", data.scalar_type());
    if (data.dim() == 3) {
      TORCH_CHECK_VALUE(!given.scales.empty() && given.bits == 8, "embeddings in planes are quantised to 8 bits");
      TORCH_CHECK_VALUE(2 * data.size(2) == norm_.numel(), "embedding must have ", norm_.numel(), " columns, got ",
                        2 * data.size(2));
      embedding.planes = planes_of(data, given.scales[0], "embedding");
      embedding.rows = data.size(1);
    } else {
      embedding.whole = given.weight(0, norm_.numel(), "embedding");
      embedding.rows = embedding.whole.rows;
    }
    return embedding;
  }

  Head head_of(const LayerWeights& given, const optional<Tensor>& screen, const optional<Tensor>& scales,
               const optional<Tensor>& errors) const {
    given.check(1);
    Head head;
    head.screened = screen.has_value();
    if (!head.screened) {
      head.whole = given.weight(0, norm_.numel(), "head");
      head.rows = head.whole.rows;
      return head;
    }
    TORCH_CHECK_VALUE(scales.has_value() && errors.has_value() && !given.biases.get(0).has_value(),
                      "screening needs scales and errors, and a head without a bias");
    optional<Tensor> whole;
    if (screen->dim() == 2) whole = given.weights[0];
    head.planes = screened_call(*screen, *scales, *errors, whole, norm_.numel());
    head.rows = head.planes.rows;
    return head;
  }

  // x = the embedding of a token
  void look_up(const Kernels& kernels, int64_t id, const Tensor& x) const {
    const bool joined = embedding_.planes.high != nullptr;
    const Matrix& matrix = embedding_.whole.matrix;
    const char* row = matrix.data + id * matrix.row_bytes;
    if (!joined && embedding_.whole.type != Type::Q8 && embedding_.whole.type != Type::Q4) {
      std::memcpy(x.data_ptr(), row, x.nbytes());
      return;
    }
    ConvertTask task;
    std::vector<int8_t> values;
    if (joined) {
      Planes planes = embedding_.planes;
      planes.high += id * planes.row_bytes;
      planes.low += id * planes.row_bytes;
      values.resize(size_t(x.numel() + PAD));
      kernels.join_rows(planes, x.numel(), 1, values.data(), x.numel());
      row = reinterpret_cast<const char*>(values.data());
      task.scales = const_cast<uint16_t*>(planes.scales) + id * planes.row_scales;
    } else {
      task.type = embedding_.whole.type;
      task.scales = const_cast<uint16_t*>(matrix.scales) + id * matrix.row_scales;
    }
    task.floats = static_cast<char*>(x.data_ptr());
    task.float_type = float_type(x, "x");
    task.data = const_cast<char*>(row);
    task.hidden = x.numel();
    task.end = 1;
    kernels.dequantise_rows(task);
  }

  static void add_read(Read& total, const Read& one) {
    total.attention += one.attention;
    total.output += one.output;
    total.ffn += one.ffn;
    total.neurons += one.neurons;
    total.down += one.down;
  }

  static int64_t ffn(const Kernels& kernels, Layer& layer, const char* x, char* out, int threads) {
    int64_t computed = 0;
    FfnCall& rows = layer.rows.ffn;
    rows.x = layer.dense.x = x;
    rows.out = layer.dense.out = out;
    switch (layer.kind) {
      case Ffn::DENSE:
        run_dense_ffn(kernels, layer.dense, threads);
        return 0;
      case Ffn::ACTIVE:
        run_ffn(kernels, rows, threads);
        computed = rows.rows.prefix + rows.rows.count;
        break;
      case Ffn::BY_UP:
        computed = run_by_up(kernels, layer.rows, threads, &layer.read);
        break;
      default:
        break;  // `run` has refused it
    }
    for (const char* added : layer.added) add_vector(kernels, layer.attention.type, out, added, rows.hidden);
    return computed;
  }

  std::vector<Layer> layers_;
  Norm last_norm_;
  Tensor norm_;  // its weight
  optional<Tensor> norm_bias_;
  Embedding embedding_;
  Head head_;
  std::vector<Tensor> end_weights_;  // kept alive
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(partinfer, m) {
  m.class_<RowsOnDisk>("RowsOnDisk")  // before Decoder, which takes it
      .def(torch::init<std::vector<std::string>, int64_t, int64_t, int64_t>())
      .def("add_layer", &RowsOnDisk::add_layer)
      .def("load", &RowsOnDisk::load)
      .def("view", &RowsOnDisk::view)
      .def("fetch", &RowsOnDisk::fetch)
      .def("take_counts", &RowsOnDisk::take_counts)
      .def("bytes_in_memory", &RowsOnDisk::bytes_in_memory);
  m.class_<Decoder>("Decoder")
      .def(torch::init<>())
      .def("add_layer", &Decoder::add_layer)
      .def("add_layer_by_input", &Decoder::add_layer_by_input)
      .def("set_input_thresholds", &Decoder::set_input_thresholds)
      .def("take_counts", &Decoder::take_counts)
      .def("set_dense", &Decoder::set_dense)
      .def("set_active", &Decoder::set_active)
      .def("set_active_on_disk", &Decoder::set_active_on_disk)
      .def("set_norm", &Decoder::set_norm)
      .def("set_embedding_and_head", &Decoder::set_embedding_and_head)
      .def("run", &Decoder::run)
      .def("logits", &Decoder::logits);
}
