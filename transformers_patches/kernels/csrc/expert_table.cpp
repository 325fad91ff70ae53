// The experts of a mixture as one object: a token's experts are named by their numbers, and nothing is looked up.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <vector>

#include "arguments.h"
#include "experts.h"

namespace {

using namespace partinfer;

const float* floats_of(const optional<Tensor>& tensor, const char* name, int64_t size) {
  if (!tensor.has_value()) return nullptr;
  TORCH_CHECK_VALUE(tensor->scalar_type() == at::kFloat && tensor->dim() == 1 && tensor->size(0) == size &&
                        tensor->is_contiguous(),
                    name, " must be contiguous float32 [", size, "], got ", tensor->scalar_type(), " ", tensor->sizes());
  return reinterpret_cast<const float*>(pointer(*tensor));
}

class Experts : public torch::CustomClassHolder {
 public:
  // bits: of quantised weights, 0 for floats.
  Experts(int64_t count, int64_t neurons, int64_t hidden, std::string activation, int64_t bits)
      : bits_(bits), entries_(size_t(checked(count))) {
    call_.neurons = checked(neurons);
    call_.hidden = checked(hidden);
    call_.activation = activation == "clamped_silu" ? Activation::CLAMPED_SILU : activation_of(activation);
    if (bits != 0) call_.type = quant_type(bits);
  }

  // The rows of one expert: gate, up and down [n, hidden] each, n at most `neurons`, their scales if they are quantised.
  // biases: of gate and of up, [n]. down_bias: float32 [hidden].
  void set(int64_t number, std::vector<Tensor> weights, std::vector<Tensor> scales, const optional<Tensor>& column_scales,
           c10::List<optional<Tensor>> biases, const optional<Tensor>& down_bias) {
    TORCH_CHECK_VALUE(weights.size() == 3 && biases.size() == 2 && scales.size() == (bits_ == 0 ? 0 : 3),
                      "expected gate, up and down, their scales if they are quantised, and two biases, got ",
                      weights.size(), ", ", scales.size(), " and ", biases.size());
    Entry entry;
    const int64_t neurons = weights[0].dim() == 2 ? weights[0].size(0) : 0;
    TORCH_CHECK_VALUE(neurons > 0 && neurons <= call_.neurons, "an expert has 1 to ", call_.neurons, " neurons, got ",
                      weights[0].sizes());
    entry.expert.neurons = neurons;
    const char* names[] = {"gate", "up", "down"};
    Matrix* matrices[] = {&entry.expert.gate, &entry.expert.up, &entry.expert.down};
    for (size_t i = 0; i < 3; ++i) {
      check_matrix_of(weights[i], scales, i, names[i], neurons, *matrices[i]);
      entry.kept.push_back(weights[i]);
    }
    entry.kept.insert(entry.kept.end(), scales.begin(), scales.end());
    entry.expert.column_scales = floats_of(column_scales, "column scales", call_.hidden);
    entry.expert.gate_bias = vector_of(biases.get(0), "the bias of gate", neurons);
    entry.expert.up_bias = vector_of(biases.get(1), "the bias of up", neurons);
    entry.expert.down_bias = floats_of(down_bias, "the bias of down", call_.hidden);
    for (const optional<Tensor>& tensor : {column_scales, biases.get(0), biases.get(1), down_bias})
      if (tensor.has_value()) entry.kept.push_back(*tensor);
    Entry& place = at(number);
    if (place.expert.neurons == neurons) {
      entry.size = place.size;
      entry.expert.size = place.expert.size;
    }
    place = std::move(entry);
  }

  // From now on an expert computes only its neurons with the largest |up·x| * size; without it all of them.
  void set_size(int64_t number, const optional<Tensor>& size) {
    Entry& entry = at(number);
    TORCH_CHECK_VALUE(!entry.kept.empty(), "expert ", number, " has no rows");
    entry.expert.size = floats_of(size, "size", entry.expert.neurons);
    entry.size = size;
  }

  // For one token x: the sum of the FFNs of the experts with these numbers, int64, times their shares. keep: how many
  // neurons an expert with a size computes. Returns it in x's type, and how many neurons were computed.
  std::tuple<Tensor, int64_t> run(const Tensor& x, const Tensor& chosen, const Tensor& shares, int64_t keep) {
    TORCH_CHECK_VALUE(x.dim() >= 1 && x.is_contiguous() && x.numel() == call_.hidden && x.size(-1) == call_.hidden,
                      "x must be one token of ", call_.hidden, " values, got ", x.sizes());
    TORCH_CHECK_VALUE(chosen.scalar_type() == at::kLong && chosen.is_contiguous() && chosen.numel() == shares.numel(),
                      "expected the numbers of experts, int64, and as many shares, got ", chosen.scalar_type(), " ",
                      chosen.sizes(), " and ", shares.sizes());
    TORCH_CHECK_VALUE(keep >= 0, "keep can't be ", keep);
    const int64_t* numbers = reinterpret_cast<const int64_t*>(pointer(chosen));
    std::vector<const Expert*> experts;
    for (int64_t i = 0; i < chosen.numel(); ++i) {
      const Entry& entry = at(numbers[i]);
      TORCH_CHECK_VALUE(!entry.kept.empty(), "expert ", numbers[i], " has no rows");
      for (const Tensor& tensor : entry.kept) check_memory(tensor);
      experts.push_back(&entry.expert);
    }
    const Tensor factors = shares.to(at::kFloat).contiguous();
    const Tensor out = at::empty(x.sizes(), x.options().dtype(at::kFloat));
    ExpertsCall call = call_;
    call.experts = experts.data();
    call.count = int64_t(experts.size());
    call.shares = reinterpret_cast<const float*>(pointer(factors));
    call.keep = keep;
    call.x = pointer(x);
    call.x_type = float_type(x, "x");
    call.out = out.mutable_data_ptr<float>();
    const int64_t computed = run_experts(*current().load(), call, at::get_num_threads());
    return {out.to(x.scalar_type()), computed};
  }

 private:
  struct Entry {
    Expert expert;
    std::vector<Tensor> kept;  // alive as long as the pointers into them
    optional<Tensor> size;
  };

  static int64_t checked(int64_t number) {
    TORCH_CHECK_VALUE(number > 0, "a mixture needs experts, neurons and a hidden size above 0, got ", number);
    return number;
  }

  Entry& at(int64_t number) {
    TORCH_CHECK_VALUE(number >= 0 && number < int64_t(entries_.size()), "there is no expert ", number, " of ",
                      entries_.size());
    return entries_[size_t(number)];
  }

  void check_matrix_of(const Tensor& weight, const std::vector<Tensor>& scales, size_t i, const char* name, int64_t neurons,
                       Matrix& matrix) {
    if (bits_ != 0) {
      matrix = quant_matrix(weight, scales[i], name, neurons, call_.hidden, call_.type);
      return;
    }
    check_matrix(weight, name, neurons, call_.hidden);
    const Type type = float_type(weight, name);
    TORCH_CHECK_VALUE(!typed_ || type == call_.type, name, " has another type than the experts before");
    call_.type = type;
    typed_ = true;
    matrix = float_matrix(weight);
  }

  ExpertsCall call_;  // what all tokens have in common
  int64_t bits_;
  bool typed_ = false;  // whether the type of float weights is known
  std::vector<Entry> entries_;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(partinfer, m) {
  m.class_<Experts>("Experts")
      .def(torch::init<int64_t, int64_t, int64_t, std::string, int64_t>())
      .def("set", &Experts::set)
      .def("set_size", &Experts::set_size)
      .def("run", &Experts::run);
}
