// All neurons of the chosen experts count as one list, expert after expert, which the threads share. A piece of it is some
// rows of one expert and has a sum of its own: what a sum is multiplied with differs from expert to expert.
#include "experts.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "shared_ffn.h"

namespace partinfer {
namespace {

constexpr int ANYONE = -1;  // owner of a piece that whoever is done takes

struct Piece {
  int64_t expert, begin, end;  // positions in the expert's list
  int owner;
};

// The work of one pass over the experts' lists, cut into pieces in order.
struct Pieces {
  std::vector<Piece> all;
  std::vector<int64_t> first;  // [count + 1]: an expert's pieces are first[e] … first[e + 1] - 1
  int64_t rest = 0;            // the first piece without an owner

  // count_of(e): positions of an expert's list. bytes_each: what is read for one.
  template <class Counts>
  void cut(int64_t count, const Counts& count_of, int64_t bytes_each, int workers) {
    int64_t total = 0;
    for (int64_t e = 0; e < count; ++e) total += count_of(e);
    const Split whole = split(total, bytes_each, total * bytes_each, workers);
    all.clear();
    first.assign(1, 0);
    int64_t before = 0;
    for (int64_t e = 0; e < count; ++e) {
      const auto add = [&](Range range, int owner) {
        const int64_t begin = std::max(range.begin, before), end = std::min(range.end, before + count_of(e));
        if (begin < end) all.push_back({e, begin - before, end - before, owner});
      };
      for (int worker = 0; worker < workers; ++worker) add(share(whole.fixed, ROW_BLOCK, worker, workers), worker);
      for (int64_t part = 0; part < whole.parts; ++part) add(whole.part(part), ANYONE);
      before += count_of(e);
      first.push_back(int64_t(all.size()));
    }
    rest = std::count_if(all.begin(), all.end(), [](const Piece& piece) { return piece.owner != ANYONE; });
  }

  // f(number of the piece, piece) for those that a thread has.
  template <class Function>
  void of_thread(int worker, Taken& taken, const Function& f) const {
    const int64_t count = int64_t(all.size());
    for (int64_t i = 0; i < rest; ++i)
      if (all[size_t(i)].owner == worker) f(i, all[size_t(i)]);
    taken.share_out(count - rest, [&](int64_t i) { f(rest + i, all[size_t(rest + i)]); });
  }
};

// What the threads of a call share beside its arguments.
struct Shared {
  std::vector<float> values, scores, kept_values;  // [count, stride]: up·x, and of what is kept
  std::vector<int32_t> kept;                       // likewise
  std::vector<int64_t> kept_count;                 // [count]
  Pieces ups, ffns;
  Input x;
  float *y = nullptr, *one = nullptr;  // [pieces, y_stride]; [hidden], of one expert
  int64_t stride = 0, y_stride = 0;
};

// up·x of a piece, and what its neurons are worth.
void find_values(const Kernels& kernels, const ExpertsCall& call, Shared& shared, const Piece& piece) {
  const Expert& expert = *call.experts[piece.expert];
  float* values = &shared.values[size_t(piece.expert * shared.stride)];
  LinearTask task;
  task.type = call.type;
  task.weight = expert.up;
  task.bias = expert.up_bias;
  task.rows = {expert.neurons, nullptr, piece.begin, piece.end};
  task.x = shared.x;
  task.out = reinterpret_cast<char*>(values);
  (quantised(call.type) ? kernels.linear_quant : kernels.linear_float)(task);
  if (call.activation == Activation::CLAMPED_SILU)
    for (int64_t i = piece.begin; i < piece.end; ++i) values[i] = std::clamp(values[i], -CLAMP, CLAMP) + 1.0f;
  if (expert.size != nullptr)
    kernels.score_candidates(task.rows, values, expert.size, &shared.scores[size_t(piece.expert * shared.stride)]);
}

void choose(const Kernels& kernels, const ExpertsCall& call, Shared& shared, int64_t e) {
  const int64_t neurons = call.experts[e]->neurons;
  shared.kept_count[size_t(e)] = neurons;
  if (call.experts[e]->size == nullptr) return;
  const size_t place = size_t(e * shared.stride);
  shared.kept_count[size_t(e)] =
      kernels.keep_candidates({neurons, nullptr, 0, neurons}, &shared.values[place], &shared.scores[place],
                              std::min(call.keep, neurons), 0.0f, &shared.kept[place], &shared.kept_values[place]);
}

void compute_piece(const Kernels& kernels, const ExpertsCall& call, Shared& shared, bool values_known, int64_t number,
                   const Piece& piece) {
  const Expert& expert = *call.experts[piece.expert];
  const size_t place = size_t(piece.expert * shared.stride);
  FfnTask task;
  task.type = call.type;
  task.gate = expert.gate;
  task.gate_bias = expert.gate_bias;
  task.down = expert.down;
  task.activation = call.activation;
  task.x = shared.x;
  task.y = shared.y + number * shared.y_stride;
  task.y_stride = shared.y_stride;
  task.rows = {expert.neurons, nullptr, piece.begin, piece.end};
  if (!values_known) {
    task.up = expert.up;
    task.up_bias = expert.up_bias;
  } else if (expert.size == nullptr) {
    task.up_values = &shared.values[place];
  } else {
    task.rows = {0, &shared.kept[place], piece.begin, piece.end};
    task.up_values = &shared.kept_values[place];
  }
  std::memset(task.y, 0, size_t(shared.y_stride) * sizeof(float));
  (quantised(call.type) ? kernels.ffn_quant : kernels.ffn_float)(task);
}

// Some columns of the output: each expert's sums, times its share.
void finish_columns(const Kernels& kernels, const ExpertsCall& call, const Shared& shared, Range columns) {
  std::fill(call.out + columns.begin, call.out + columns.end, 0.0f);
  for (int64_t e = 0; e < call.count; ++e) {
    const int64_t first = shared.ffns.first[size_t(e)], sums = shared.ffns.first[size_t(e) + 1] - first;
    const Expert& expert = *call.experts[e];
    const auto add = [&](const float* values) {
      for (int64_t j = columns.begin; j < columns.end; ++j) call.out[j] += call.shares[e] * values[j];
    };
    if (sums > 0) {
      FinishTask task;
      task.type = call.type;
      task.y = shared.y + first * shared.y_stride;
      task.sums = sums;
      task.sum_stride = task.y_stride = shared.y_stride;
      task.tokens = 1;
      task.hidden = call.hidden;
      task.begin = columns.begin;
      task.end = columns.end;
      task.column_scales = expert.column_scales;
      task.out = reinterpret_cast<char*>(shared.one);
      (quantised(call.type) ? kernels.finish_quant : kernels.finish_float)(task);
      add(shared.one);
    }
    if (expert.down_bias != nullptr) add(expert.down_bias);
  }
}

// Room for everything, and the input in the form of the weights.
void prepare_shared(const Kernels& kernels, const ExpertsCall& call, int useful, Shared& shared) {
  static thread_local Scratch scratch;
  const int64_t pieces = call.count + useful + MAX_PARTS;
  shared.stride = call.neurons + KEEP_ROOM + PAD;
  shared.y_stride = y_stride_of(call.hidden);
  for (auto* floats : {&shared.values, &shared.scores, &shared.kept_values})
    floats->resize(size_t(call.count * shared.stride));
  shared.kept.resize(size_t(call.count * shared.stride));
  shared.kept_count.clear();
  for (int64_t e = 0; e < call.count; ++e) shared.kept_count.push_back(call.experts[e]->neurons);
  scratch.reserve(input_bytes(1, call.hidden) + Scratch::padded(size_t(pieces * shared.y_stride) * sizeof(float)) +
                  Scratch::padded(size_t(shared.y_stride) * sizeof(float)));
  shared.x = prepare(kernels, call.type, call.x, call.x_type, 0, 1, call.hidden, scratch);
  shared.y = scratch.take<float>(pieces * shared.y_stride);
  shared.one = scratch.take<float>(shared.y_stride);
}

// up·x of all neurons of all experts, and which of them are kept.
void choose_all(const Kernels& kernels, const ExpertsCall& call, Shared& shared, Taken& taken, int worker, int workers,
                int computing) {
  if (worker < computing)
    shared.ups.of_thread(worker, taken, [&](int64_t, const Piece& piece) { find_values(kernels, call, shared, piece); });
  wait_for_all(workers);
  for (int64_t e = worker; e < call.count && worker < computing; e += computing) choose(kernels, call, shared, e);
  wait_for_all(workers);
}

}  // namespace

int64_t run_experts(const Kernels& kernels, const ExpertsCall& call, int threads) {
  static thread_local Shared kept;
  Shared& shared = kept;  // the caller's, for all threads of the region
  const auto is_sparse = [](const Expert* expert) { return expert->size != nullptr; };
  const bool chooses = std::any_of(call.experts, call.experts + call.count, is_sparse);
  const bool values_known = chooses || call.activation == Activation::CLAMPED_SILU;
  const int64_t row_bytes = call.count > 0 ? call.experts[0]->up.row_bytes : 0;
  int64_t neurons = 0;
  for (int64_t e = 0; e < call.count; ++e) neurons += call.experts[e]->neurons;
  const int useful = useful_threads(3 * neurons * row_bytes, threads);
  prepare_shared(kernels, call, useful, shared);
  Taken ups, ffns;  // parts of the rest
  const auto all_of = [&](int64_t e) { return call.experts[e]->neurons; };
  const auto kept_of = [&](int64_t e) { return shared.kept_count[size_t(e)]; };
  parallel(useful, [&](int worker, int workers) {
    const int computing = std::min(useful, workers);
    if (values_known) {
      if (worker == 0) shared.ups.cut(call.count, all_of, row_bytes, computing);
      wait_for_all(workers);
      choose_all(kernels, call, shared, ups, worker, workers, computing);
    }
    if (worker == 0) shared.ffns.cut(call.count, kept_of, (values_known ? 2 : 3) * row_bytes, computing);
    wait_for_all(workers);
    if (worker < computing)
      shared.ffns.of_thread(worker, ffns, [&](int64_t number, const Piece& piece) {
        compute_piece(kernels, call, shared, values_known, number, piece);
      });
    wait_for_all(workers);
    if (worker < computing) finish_columns(kernels, call, shared, share(call.hidden, COLUMN_BLOCK, worker, computing));
  });
  int64_t computed = 0;
  for (int64_t e = 0; e < call.count; ++e) computed += kept_of(e);
  return computed;
}

}  // namespace partinfer
