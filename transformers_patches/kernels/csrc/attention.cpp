#include "attention.h"

#include <cmath>

#include "shared_ffn.h"

namespace partinfer {
namespace {

constexpr int64_t ATTENTION_WORK = 4;  // bytes of the cache take as much time as so many of weights

// What each thread's positions give: [threads, heads, head_dim], [threads, heads], [threads, heads].
struct Parts {
  float *out, *highest, *total;
};

// out [heads, head_dim] = the softmax over all positions.
void join(const AttentionCall& call, const Parts& parts, int64_t count, float* out) {
  for (int64_t head = 0; head < call.heads; ++head) {
    float highest = parts.highest[head], total = 0.0f;
    for (int64_t p = 1; p < count; ++p) highest = std::max(highest, parts.highest[p * call.heads + head]);
    const auto weight = [&](int64_t p) {
      return std::exp(call.scale * (parts.highest[p * call.heads + head] - highest));
    };
    for (int64_t p = 0; p < count; ++p) total += parts.total[p * call.heads + head] * weight(p);
    float* mine = out + head * call.head_dim;
    for (int64_t p = 0; p < count; ++p) {
      const float factor = weight(p) / total;
      const float* values = parts.out + (p * call.heads + head) * call.head_dim;
      for (int64_t i = 0; i < call.head_dim; ++i) mine[i] = (p == 0 ? 0.0f : mine[i]) + factor * values[i];
    }
  }
}

}  // namespace

void attend_all(const Kernels& kernels, const AttentionCall& call, const char* q, float* out, int threads) {
  static thread_local Scratch scratch;
  const int64_t size = element_size(call.type), group = call.heads / call.kv_heads, end = call.length + 1;
  const int64_t begin = call.window > 0 ? std::max<int64_t>(0, end - call.window) : 0;
  const int64_t cache_stride = call.capacity * call.head_dim * size;
  const bool raw = call.type == Type::BF16 && *kernels.bf16_input;
  const int64_t bytes = 2 * call.kv_heads * (end - begin) * call.head_dim * size;
  const int useful = int(std::min<int64_t>(useful_threads(ATTENTION_WORK * bytes, threads), end - begin));
  const int64_t score_stride = end - begin, y_stride = y_stride_of(call.head_dim), q_count = call.heads * call.head_dim;
  scratch.reserve(Scratch::padded(size_t(q_count) * sizeof(float)) +
                  Scratch::padded(size_t(useful * q_count) * sizeof(float)) +
                  2 * Scratch::padded(size_t(useful * call.heads) * sizeof(float)) +
                  Scratch::padded(size_t(useful * MAX_TOKENS * score_stride) * sizeof(float)) +
                  Scratch::padded(size_t(useful * MAX_TOKENS * y_stride) * sizeof(float)));
  float* wide = scratch.take<float>(q_count);
  const Parts parts{scratch.take<float>(useful * q_count), scratch.take<float>(useful * call.heads),
                    scratch.take<float>(useful * call.heads)};
  float* scores = scratch.take<float>(useful * MAX_TOKENS * score_stride);
  float* y = scratch.take<float>(useful * MAX_TOKENS * y_stride);
  if (!raw) kernels.widen(call.type, q, q_count, wide);
  int64_t used = 1;
  parallel(useful, [&](int worker, int workers) {
    const int computing = std::min(useful, workers);
    if (worker == 0) used = computing;
    if (worker >= computing) return;
    const Range range = share(end - begin, 1, worker, computing);
    for (int64_t head = 0; head < call.kv_heads; ++head)
      for (int64_t first = 0; first < group; first += MAX_TOKENS) {
        const int64_t query = head * group + first, place = query * call.head_dim;
        AttendTask task;
        task.type = call.type;
        task.keys = call.keys + head * cache_stride;
        task.values = call.values + head * cache_stride;
        task.begin = begin + range.begin;
        task.end = begin + range.end;
        task.head_dim = call.head_dim;
        task.q.tokens = std::min(MAX_TOKENS, group - first);
        task.q.hidden = call.head_dim;
        if (raw)
          task.q.bf16 = reinterpret_cast<const bf16_t*>(q) + place;
        else
          task.q.f32 = wide + place;
        task.scale = call.scale;
        task.scores = scores + worker * MAX_TOKENS * score_stride;
        task.score_stride = score_stride;
        task.y = y + worker * MAX_TOKENS * y_stride;
        task.y_stride = y_stride;
        task.out = parts.out + worker * q_count + place;
        task.highest = parts.highest + worker * call.heads + query;
        task.total = parts.total + worker * call.heads + query;
        kernels.attend(task);
      }
  });
  join(call, parts, used, out);
}

}  // namespace partinfer
