#include "threads.h"

#include "shared_ffn.h"

namespace partinfer {

void run_ffn(const Kernels& kernels, const FfnCall& call, int threads) {
  static thread_local Scratch scratch;
  const int64_t positions = call.rows.prefix + call.rows.count;
  const int useful = useful_threads(positions * bytes_per_neuron(call), threads);
  for (int64_t first = 0; first < call.tokens; first += MAX_TOKENS) {
    const int64_t tokens = std::min(MAX_TOKENS, call.tokens - first);
    const int64_t y_count = most_sums(useful) * tokens * y_stride_of(call.hidden);
    scratch.reserve(input_bytes(tokens, call.hidden) + Scratch::padded(size_t(y_count) * sizeof(float)));
    const Input x = prepare(kernels, call.type, call.x, call.x_type, first, tokens, call.hidden, scratch);
    SharedFfn shared;
    share_ffn(call, x, first, scratch.take<float>(y_count), shared);
    parallel(useful, [&](int worker, int workers) { compute_and_finish(kernels, shared, worker, workers, useful); });
  }
}

void run_weighted_rows(const Kernels& kernels, const FfnCall& call, int threads) {
  static thread_local Scratch scratch;
  const int64_t rows = call.rows.prefix;
  const int useful = useful_threads(rows * bytes_per_neuron(call), threads);
  for (int64_t first = 0; first < call.tokens; first += MAX_TOKENS) {
    const int64_t tokens = std::min(MAX_TOKENS, call.tokens - first);
    const int64_t y_count = most_sums(useful) * tokens * y_stride_of(call.hidden);
    scratch.reserve(Scratch::padded(size_t(tokens * rows) * sizeof(float)) +
                    Scratch::padded(size_t(y_count) * sizeof(float)));
    Input x;  // only its size is asked for
    x.tokens = tokens;
    x.hidden = call.hidden;
    SharedFfn shared;
    share_ffn(call, x, first, scratch.take<float>(y_count), shared);
    const char* h = call.x + first * rows * element_size(call.x_type);
    shared.task.up_values = as_float32(kernels, h, call.x_type, tokens * rows, scratch);
    shared.task.value_stride = rows;
    parallel(useful, [&](int worker, int workers) { compute_and_finish(kernels, shared, worker, workers, useful); });
  }
}

namespace {

constexpr int MAX_LINEARS = 3;

LinearTask linear_task(const LinearCall& call, const Input& x, int64_t first) {
  LinearTask task;
  task.type = call.type;
  task.weight = call.weight;
  task.bias = call.bias;
  task.x = x;
  task.out = call.out + first * call.rows * element_size(call.x_type);
  task.out_type = call.x_type;
  task.out_stride = call.rows;
  task.rows = {call.rows, nullptr, 0, call.rows};
  return task;
}

void compute_rows(const Kernels& kernels, LinearTask task, Range range) {
  task.rows.begin = range.begin;
  task.rows.end = range.end;
  (quantised(task.type) ? kernels.linear_quant : kernels.linear_float)(task);
}

// The tasks of one region; the rest is the last one's.
void compute_linears(const Kernels& kernels, const LinearTask* tasks, int count, Taken& taken, int worker, int workers) {
  int64_t bytes = 0;
  for (int i = 0; i < count; ++i) bytes += tasks[i].rows.end * tasks[i].weight.row_bytes;
  for (int i = 0; i + 1 < count; ++i)
    compute_rows(kernels, tasks[i], share(tasks[i].rows.end, ROW_BLOCK, worker, workers));
  const LinearTask& last = tasks[count - 1];
  const Split rows = split(last.rows.end, last.weight.row_bytes, bytes, workers);
  rows_of_thread(rows, taken, worker, workers, [&](Range range) { compute_rows(kernels, last, range); });
}

}  // namespace

void run_linear(const Kernels& kernels, const LinearCall& call, int threads) {
  static thread_local Scratch scratch;
  const int useful = useful_threads(call.rows * call.weight.row_bytes, threads);
  for (int64_t first = 0; first < call.tokens; first += MAX_TOKENS) {
    const int64_t tokens = std::min(MAX_TOKENS, call.tokens - first);
    scratch.reserve(input_bytes(tokens, call.hidden));
    const Input x = prepare(kernels, call.type, call.x, call.x_type, first, tokens, call.hidden, scratch);
    const LinearTask task = linear_task(call, x, first);
    Taken taken;
    parallel(useful, [&](int worker, int workers) {
      const int computing = std::min(useful, workers);
      if (worker < computing) compute_linears(kernels, &task, 1, taken, worker, computing);
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

void run_linears(const Kernels& kernels, const LinearCall* calls, int count, int threads) {
  static thread_local Scratch scratch;
  int64_t bytes = 0;
  for (int i = 0; i < count; ++i) bytes += calls[i].rows * calls[i].weight.row_bytes;
  const int useful = useful_threads(bytes, threads);
  scratch.reserve(input_bytes(1, calls[0].hidden));
  const Input x = prepare(kernels, calls[0].type, calls[0].x, calls[0].x_type, 0, 1, calls[0].hidden, scratch);
  LinearTask tasks[MAX_LINEARS];
  for (int i = 0; i < count; ++i) tasks[i] = linear_task(calls[i], x, 0);
  Taken taken;
  parallel(useful, [&](int worker, int workers) {
    const int computing = std::min(useful, workers);
    if (worker < computing) compute_linears(kernels, tasks, count, taken, worker, computing);
  });
}

}  // namespace partinfer
