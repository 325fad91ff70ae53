#include "by_input.h"

#include <vector>

#include "shared_ffn.h"

namespace partinfer {
namespace {

struct Chosen {
  std::vector<float> scores, kept_values;
  std::vector<int32_t> rows;
};

}  // namespace

int64_t run_by_input(const Kernels& kernels, const ByInput& layer, const char* x, Type x_type, float* out, int threads) {
  static thread_local Scratch scratch;
  static thread_local Chosen chosen;
  const size_t inputs = size_t(layer.inputs);
  const int64_t y_count = most_sums(threads) * y_stride_of(layer.outputs);
  chosen.scores.resize(inputs + PAD);
  chosen.kept_values.resize(inputs + PAD);
  chosen.rows.resize(inputs + PAD);
  scratch.reserve(Scratch::padded(inputs * sizeof(float)) + Scratch::padded(size_t(y_count) * sizeof(float)));
  float* apart = scratch.take<float>(layer.inputs);  // x - mean
  kernels.widen(x_type, x, layer.inputs, apart);
  for (int64_t j = 0; j < layer.inputs; ++j) apart[j] -= layer.mean[j];

  FfnCall call;
  call.type = layer.type;
  call.down = layer.weight;
  call.column_scales = layer.column_scales;
  call.hidden = layer.outputs;
  call.x_type = Type::F32;
  call.out = reinterpret_cast<char*>(out);
  Input one;  // only its size is asked for
  one.tokens = 1;
  one.hidden = layer.outputs;
  SharedFfn shared;
  share_ffn(call, one, 0, scratch.take<float>(y_count), shared);
  if (layer.threshold < 0.0f) {  // all inputs: rows that follow each other
    shared.positions = layer.inputs;
    shared.task.rows = {layer.inputs, nullptr, 0, layer.inputs};
    shared.task.up_values = apart;
  } else {
    const Rows all{layer.inputs, nullptr, 0, layer.inputs};
    kernels.score_candidates(all, apart, layer.norm, chosen.scores.data());
    shared.positions = kernels.keep_candidates(all, apart, chosen.scores.data(), -1, layer.threshold, chosen.rows.data(),
                                               chosen.kept_values.data());
    shared.task.rows = {0, chosen.rows.data(), 0, shared.positions};
    shared.task.up_values = chosen.kept_values.data();
  }
  const int useful = useful_threads(shared.positions * layer.weight.row_bytes, threads);
  parallel(useful, [&](int worker, int workers) { compute_and_finish(kernels, shared, worker, workers, useful); });
  for (int64_t j = 0; j < layer.outputs; ++j) out[j] += layer.constant[j];
  return shared.positions;
}

}  // namespace partinfer
