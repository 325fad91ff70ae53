// The FFN that chooses its neurons per token: the gated one from up·x, the plain one from its activations. Same threads
// as run_ffn, in one parallel region.
#include <algorithm>
#include <vector>

#include "by_input.h"
#include "shared_ffn.h"

namespace partinfer {
namespace {

struct Selection {
  std::vector<float> values, scores;   // [candidates]
  std::vector<int32_t> rows;           // of the kept ones, with room for all
  std::vector<float> kept_values;      // likewise
};

const Matrix& first_of(const FfnCall& call) { return call.up.data != nullptr ? call.up : call.gate; }

void score(const Kernels& kernels, const ByUpCall& call, const Input& x, Range range, Selection& selection) {
  const Rows all{call.ffn.rows.prefix, call.ffn.rows.index, range.begin, range.end};
  if (call.up.inputs > 0) return kernels.score_candidates(all, selection.values.data(), call.size, selection.scores.data());
  LinearTask task;
  task.type = call.ffn.type;
  const bool gated = call.ffn.up.data != nullptr;
  task.weight = first_of(call.ffn);
  if (!gated) task.bias = call.ffn.gate_bias;
  task.rows = all;
  task.x = x;
  task.out = reinterpret_cast<char*>(selection.values.data());
  task.out_type = Type::F32;
  (quantised(task.type) ? kernels.linear_quant : kernels.linear_float)(task);
  if (!gated)
    kernels.gate_values(call.ffn.activation, &selection.values[size_t(range.begin)], nullptr, range.end - range.begin);
  kernels.score_candidates(task.rows, selection.values.data(), call.size, selection.scores.data());
}

}  // namespace

int64_t run_by_up(const Kernels& kernels, const ByUpCall& call, int threads, Read* read) {
  static thread_local Scratch scratch;
  static thread_local Selection kept;
  Selection& selection = kept;  // the caller's, for all threads of the region
  const int64_t candidates = call.ffn.rows.prefix + call.ffn.rows.count;
  const bool by_input = call.up.inputs > 0;
  const int64_t first_bytes = by_input ? 0 : first_of(call.ffn).row_bytes;
  const int64_t useful_bytes = by_input ? bytes_per_neuron(call.ffn) : first_bytes;
  const int useful = useful_threads(candidates * useful_bytes, threads);
  const int64_t y_count = most_sums(useful) * y_stride_of(call.ffn.hidden);
  selection.values.resize(size_t(candidates));
  selection.scores.resize(size_t(candidates));
  selection.rows.resize(size_t(candidates + KEEP_ROOM));
  selection.kept_values.resize(size_t(candidates + KEEP_ROOM));
  int64_t inputs_read = 0, down_read = 0;
  if (by_input)
    inputs_read = run_by_input(kernels, call.up, call.ffn.x, call.ffn.x_type, selection.values.data(), threads);
  scratch.reserve(input_bytes(1, call.ffn.hidden) + Scratch::padded(size_t(y_count) * sizeof(float)));
  const Input x = prepare(kernels, call.ffn.type, call.ffn.x, call.ffn.x_type, 0, 1, call.ffn.hidden, scratch);
  SharedFfn shared;
  share_ffn(call.ffn, x, 0, scratch.take<float>(y_count), shared);
  shared.bytes_each -= first_bytes;
  shared.fetch = call.fetch;
  shared.task.down_size = call.down_size;
  shared.task.down_threshold = call.down_threshold;
  shared.task.down_read = call.down_size == nullptr ? nullptr : &down_read;
  if (call.ffn.up.data == nullptr && !by_input) {
    shared.task.gate = Matrix{};
    shared.task.gate_bias = Vector{};
  }
  shared.task.up = Matrix{};  // its products are known by then
  Taken taken;
  parallel(useful, [&](int worker, int workers) {
    const int computing = std::min(useful, workers);
    if (worker < computing) {
      const Split rows = by_input ? Split{candidates, candidates, 0} : split(candidates, first_bytes, candidates * first_bytes, computing);
      rows_of_thread(rows, taken, worker, computing, [&](Range range) { score(kernels, call, x, range, selection); });
    }
    wait_for_all(workers);
    if (worker == 0) {
      shared.positions =
          kernels.keep_candidates(rows_of(call.ffn.rows, {0, candidates}), selection.values.data(),
                                  selection.scores.data(), call.keep, call.threshold, selection.rows.data(),
                                  selection.kept_values.data());
      if (call.fetch != nullptr)
        call.fetch->begin(call.fetch_layer, selection.rows.data(), shared.positions, std::min(useful, workers));
      shared.task.rows = {0, selection.rows.data(), 0, shared.positions};
      shared.task.up_values = selection.kept_values.data();
    }
    wait_for_all(workers);
    compute_and_finish(kernels, shared, worker, workers, useful);
  });
  if (call.fetch != nullptr) call.fetch->end(call.fetch_layer);
  if (read != nullptr) {
    read->ffn = inputs_read;
    read->neurons = shared.positions;
    read->down = call.down_size == nullptr ? shared.positions : down_read;
  }
  return shared.positions;
}

}  // namespace partinfer
