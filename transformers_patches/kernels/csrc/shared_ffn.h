// How the drivers (threads.cpp, by_up.cpp) split an FFN over threads: ranges of neurons, then ranges of columns.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstring>

#include "input.h"
#include "scratch.h"
#include "threads.h"

namespace partinfer {

constexpr int64_t ROW_BLOCK = 8;             // a thread's share is a multiple of this many rows
constexpr int64_t BYTES_PER_THREAD = 65536;  // below this, waking another thread costs more than it reads

struct Range {
  int64_t begin, end;
};

inline Range share(int64_t count, int64_t block, int64_t worker, int64_t workers) {
  const int64_t blocks = (count + block - 1) / block;
  return {std::min(count, blocks * worker / workers * block), std::min(count, blocks * (worker + 1) / workers * block)};
}

inline int useful_threads(int64_t bytes, int threads) {
  return int(std::max<int64_t>(1, std::min<int64_t>(threads, bytes / BYTES_PER_THREAD)));
}

// f(worker, workers) on `threads` threads of the pool. The pool is always woken as a whole: libgomp ends and restarts
// threads when the size of the team changes.
template <class Function>
void parallel(int threads, const Function& f) {
  if (threads == 1 || omp_in_parallel()) {
    f(0, 1);
    return;
  }
#pragma omp parallel
  f(omp_get_thread_num(), omp_get_num_threads());
}

inline void wait_for_all(int workers) {
  if (workers == 1) return;
#pragma omp barrier
}

inline Rows rows_of(const ActiveRows& active, Range range) { return {active.prefix, active.index, range.begin, range.end}; }

inline bool quantised(Type type) { return type == Type::Q8 || type == Type::Q4; }

// From row to row there may be more than a row: two matrices take turns. Not so for up.
inline int64_t bytes_per_neuron(const FfnCall& call) {
  return call.up.data != nullptr ? 3 * call.up.row_bytes : call.gate.row_bytes + call.down.row_bytes;
}

// Everything that the threads of one FFN call share.
struct SharedFfn {
  FfnTask task;
  FinishTask finish;
  int64_t positions;
};

inline void compute(const Kernels& kernels, const SharedFfn& shared, int worker, int workers) {
  FfnTask task = shared.task;
  task.y = task.y + worker * shared.finish.thread_stride;
  std::memset(task.y, 0, size_t(task.x.tokens * task.y_stride) * sizeof(float));
  // Every thread gets its share of the prefix, which reads faster, and its share of the list.
  const int64_t prefix = std::min(shared.task.rows.prefix, shared.positions);
  const Range run = share(prefix, ROW_BLOCK, worker, workers);
  const Range list = share(shared.positions - prefix, ROW_BLOCK, worker, workers);
  for (const Range& range : {run, Range{prefix + list.begin, prefix + list.end}}) {
    task.rows.begin = range.begin;
    task.rows.end = range.end;
    if (range.begin < range.end) (quantised(task.type) ? kernels.ffn_quant : kernels.ffn_float)(task);
  }
}

inline void finish(const Kernels& kernels, const SharedFfn& shared, int worker, int workers, int computed_by) {
  FinishTask task = shared.finish;
  const Range range = share(task.hidden, COLUMN_BLOCK, worker, workers);
  task.begin = range.begin;
  task.end = range.end;
  task.threads = computed_by;
  (quantised(task.type) ? kernels.finish_quant : kernels.finish_float)(task);
}

inline void compute_and_finish(const Kernels& kernels, const SharedFfn& shared, int worker, int workers, int useful) {
  const int computing = std::min(useful, workers);
  if (worker < computing) compute(kernels, shared, worker, computing);
  wait_for_all(workers);
  if (worker < computing) finish(kernels, shared, worker, computing, computing);
}

inline int64_t y_stride_of(int64_t hidden) { return (hidden + COLUMN_BLOCK - 1) / COLUMN_BLOCK * COLUMN_BLOCK; }

inline SharedFfn share_ffn(const FfnCall& call, const Input& x, int64_t first_token, float* y) {
  const int64_t stride = y_stride_of(call.hidden);
  SharedFfn shared;
  shared.positions = call.rows.prefix + call.rows.count;
  shared.task.type = call.type;
  shared.task.gate = call.gate;
  shared.task.up = call.up;
  shared.task.down = call.down;
  shared.task.gate_bias = call.gate_bias;
  shared.task.up_bias = call.up_bias;
  shared.task.activation = call.activation;
  shared.task.rows = rows_of(call.rows, {0, shared.positions});
  shared.task.x = x;
  shared.task.y = y;
  shared.task.y_stride = stride;
  shared.finish.type = call.type;
  shared.finish.y = y;
  shared.finish.thread_stride = x.tokens * stride;
  shared.finish.y_stride = stride;
  shared.finish.tokens = x.tokens;
  shared.finish.hidden = call.hidden;
  shared.finish.out = call.out + first_token * call.hidden * element_size(call.x_type);
  shared.finish.out_type = call.x_type;
  return shared;
}

}  // namespace partinfer
