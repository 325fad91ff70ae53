// How the drivers (threads.cpp, by_up.cpp) split an FFN over threads: ranges of neurons, then ranges of columns.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>

#include "fetch.h"
#include "input.h"
#include "scratch.h"
#include "shares.h"
#include "threads.h"

namespace partinfer {

inline Rows rows_of(const ActiveRows& active, Range range) { return {active.prefix, active.index, range.begin, range.end}; }

inline bool quantised(Type type) { return type == Type::Q8 || type == Type::Q4; }

// From row to row there may be more than a row: two matrices may be interleaved. Not so for up.
inline int64_t bytes_per_neuron(const FfnCall& call) {
  return call.up.data != nullptr ? 3 * call.up.row_bytes : call.gate.row_bytes + call.down.row_bytes;
}

// Columns to which listed rows are added at a time: more floats don't stay in a core's first cache, beside what is read.
inline int64_t columns_at_once() {
  constexpr int64_t USUAL = 32768;  // bytes, where the system doesn't say
  static const int64_t columns = [] {
#ifdef _SC_LEVEL1_DCACHE_SIZE
    const int64_t bytes = sysconf(_SC_LEVEL1_DCACHE_SIZE);
#else
    const int64_t bytes = 0;
#endif
    return (bytes > 0 ? bytes : USUAL) * 3 / 4 / int64_t(sizeof(float));
  }();
  return columns;
}
constexpr int64_t WHOLE_COLUMNS = 512;  // the kernels work out the scales of so many together
constexpr int64_t PART_OF_SUMS = 4;  // a part reads at least so many times the bytes of its sums, which cost time as well

inline int64_t bytes_of(Type type, int64_t columns) {
  return type == Type::F32 ? 4 * columns : type == Type::Q8 ? columns : type == Type::Q4 ? columns / 2 : 2 * columns;
}

// A task whose h is known, for some of the columns. begin: a multiple of COLUMN_BLOCK.
inline FfnTask columns_of(FfnTask task, int64_t begin, int64_t end) {
  task.down.data += bytes_of(task.type, begin);
  task.down.scales += begin / GROUP;
  task.y += begin;
  task.x.hidden = end - begin;
  return task;
}

// Everything that the threads of one FFN call share.
struct SharedFfn {
  FfnTask task;
  FinishTask finish;
  int64_t positions, bytes_each;
  Fetch* fetch = nullptr;  // what reads the rows of gate and down, if they are not all in memory
  Taken taken;

  Split split_over(int workers) const {
    const int64_t sums = task.x.tokens * task.y_stride * int64_t(sizeof(float));
    return split(positions, bytes_each, positions * bytes_each, workers, std::max(BYTES_PER_PART, PART_OF_SUMS * sums));
  }
};

// Sums of a thread's share, then those of each part of the rest, have a y of their own: they are added in this order,
// whoever computed them.
inline int64_t most_sums(int useful) { return useful == 1 ? 1 : useful + MAX_PARTS; }

// The rows of a task, in its order.
inline void run_rows(const Kernels& kernels, const FfnTask& task) {
  const auto run = quantised(task.type) ? kernels.ffn_quant : kernels.ffn_float;
  const int64_t columns = task.x.hidden, blocks = (columns + columns_at_once() - 1) / columns_at_once();
  if (task.gate.data != nullptr || task.down_size != nullptr || blocks == 1) return run(task);
  for (int64_t block = 0; block < blocks; ++block) {
    const Range range = share(columns, WHOLE_COLUMNS, block, blocks);
    run(columns_of(task, range.begin, range.end));
  }
}

inline void compute(const Kernels& kernels, SharedFfn& shared, int worker, int workers) {
  const Split split = shared.split_over(workers);
  const auto sum_up = [&](int64_t number, std::initializer_list<Range> ranges) {
    FfnTask task = shared.task;
    task.y += number * shared.finish.sum_stride;
    std::memset(task.y, 0, size_t(task.x.tokens * task.y_stride) * sizeof(float));
    for (const Range& range : ranges) {
      // What is summed up in which order does not depend on how much is computed at a time.
      const int64_t step = shared.fetch == nullptr ? std::max<int64_t>(1, range.end - range.begin) : FETCH_BLOCK;
      for (int64_t begin = range.begin; begin < range.end; begin += step) {
        task.rows.begin = begin;
        task.rows.end = std::min(begin + step, range.end);
        if (shared.fetch != nullptr) shared.fetch->wait(task.rows.begin, task.rows.end);
        run_rows(kernels, task);
      }
    }
  };
  // Every thread gets its share of the prefix, which reads faster, and its share of the list.
  const int64_t prefix = std::min(shared.task.rows.prefix, split.fixed);
  const Range run = share(prefix, ROW_BLOCK, worker, workers);
  const Range list = share(split.fixed - prefix, ROW_BLOCK, worker, workers);
  sum_up(worker, {run, {prefix + list.begin, prefix + list.end}});
  shared.taken.share_out(split.parts, [&](int64_t number) { sum_up(workers + number, {split.part(number)}); });
}

inline void finish(const Kernels& kernels, const SharedFfn& shared, int worker, int workers, int64_t sums) {
  FinishTask task = shared.finish;
  const Range range = share(task.hidden, COLUMN_BLOCK, worker, workers);
  task.begin = range.begin;
  task.end = range.end;
  task.sums = sums;
  (quantised(task.type) ? kernels.finish_quant : kernels.finish_float)(task);
}

inline void compute_and_finish(const Kernels& kernels, SharedFfn& shared, int worker, int workers, int useful) {
  const int computing = std::min(useful, workers);
  if (worker < computing) compute(kernels, shared, worker, computing);
  wait_for_all(workers);
  if (worker < computing) finish(kernels, shared, worker, computing, computing + shared.split_over(computing).parts);
}

inline int64_t y_stride_of(int64_t hidden) { return (hidden + COLUMN_BLOCK - 1) / COLUMN_BLOCK * COLUMN_BLOCK; }

inline void share_ffn(const FfnCall& call, const Input& x, int64_t first_token, float* y, SharedFfn& shared) {
  const int64_t stride = y_stride_of(call.hidden);
  shared.positions = call.rows.prefix + call.rows.count;
  shared.bytes_each = bytes_per_neuron(call);
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
  shared.finish.sum_stride = x.tokens * stride;
  shared.finish.y_stride = stride;
  shared.finish.tokens = x.tokens;
  shared.finish.hidden = call.hidden;
  shared.finish.column_scales = call.column_scales;
  shared.finish.out = call.out + first_token * call.hidden * element_size(call.x_type);
  shared.finish.out_type = call.x_type;
}

}  // namespace partinfer
