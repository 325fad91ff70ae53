#include "threads.h"

#include "shared_ffn.h"

namespace partinfer {

void run_ffn(const Kernels& kernels, const FfnCall& call, int threads) {
  static thread_local Scratch scratch;
  const int64_t positions = call.rows.prefix + call.rows.count;
  const int useful = useful_threads(positions * bytes_per_neuron(call), threads);
  for (int64_t first = 0; first < call.tokens; first += MAX_TOKENS) {
    const int64_t tokens = std::min(MAX_TOKENS, call.tokens - first);
    const int64_t y_count = useful * tokens * y_stride_of(call.hidden);
    scratch.reserve(input_bytes(tokens, call.hidden) + Scratch::padded(size_t(y_count) * sizeof(float)));
    const Input x = prepare(kernels, call.type, call.x, call.x_type, first, tokens, call.hidden, scratch);
    const SharedFfn shared = share_ffn(call, x, first, scratch.take<float>(y_count));
    parallel(useful, [&](int worker, int workers) { compute_and_finish(kernels, shared, worker, workers, useful); });
  }
}

void run_linear(const Kernels& kernels, const LinearCall& call, int threads) {
  static thread_local Scratch scratch;
  const int useful = useful_threads(call.rows * call.weight.row_bytes, threads);
  for (int64_t first = 0; first < call.tokens; first += MAX_TOKENS) {
    const int64_t tokens = std::min(MAX_TOKENS, call.tokens - first);
    scratch.reserve(input_bytes(tokens, call.hidden));
    LinearTask shared;
    shared.type = call.type;
    shared.weight = call.weight;
    shared.bias = call.bias;
    shared.x = prepare(kernels, call.type, call.x, call.x_type, first, tokens, call.hidden, scratch);
    shared.out = call.out + first * call.rows * element_size(call.x_type);
    shared.out_type = call.x_type;
    shared.out_stride = call.rows;
    parallel(useful, [&](int worker, int workers) {
      const int computing = std::min(useful, workers);
      if (worker >= computing) return;
      LinearTask task = shared;
      const Range range = share(call.rows, ROW_BLOCK, worker, computing);
      task.rows = {call.rows, nullptr, range.begin, range.end};
      (quantised(task.type) ? kernels.linear_quant : kernels.linear_float)(task);
    });
  }
}

void run_convert(void (*convert)(const ConvertTask&), const ConvertTask& task, int64_t rows, int threads) {
  const int useful = useful_threads(rows * task.hidden, threads);
  parallel(useful, [&](int worker, int workers) {
    const int computing = std::min(useful, workers);
    if (worker >= computing) return;
    const Range range = share(rows, 1, worker, computing);
    ConvertTask part = task;
    part.begin = range.begin;
    part.end = range.end;
    convert(part);
  });
}

}  // namespace partinfer
