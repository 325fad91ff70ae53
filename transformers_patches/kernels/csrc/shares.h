// How the threads of a region share rows out.
//
// Most rows are given out beforehand, one range for every thread: long ranges are read fastest. The last ones are the
// rest, in small parts that whoever is done takes: threads are seldom done together, and all wait for the last. What
// is computed never depends on who takes a part.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace partinfer {

constexpr int64_t ROW_BLOCK = 8;             // a thread's share is a multiple of this many rows
constexpr int64_t BYTES_PER_THREAD = 65536;  // below this, waking another thread costs more than it reads
constexpr int64_t MAX_PARTS = 8;
constexpr int64_t REST = 6;                  // the rest is one in so many
constexpr int64_t BYTES_PER_PART = 32768;    // at least: every part begins with a row that nobody has prefetched

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

// Rows [0, fixed) are shares, rows [fixed, count) the rest.
struct Split {
  int64_t fixed = 0, count = 0;
  int64_t parts = 0;

  Range part(int64_t number) const {
    const Range range = share(count - fixed, ROW_BLOCK, number, parts);
    return {fixed + range.begin, fixed + range.end};
  }
};

// count rows of row_bytes each, the last ones of a region that reads region_bytes. No part reads less than part_bytes.
inline Split split(int64_t count, int64_t row_bytes, int64_t region_bytes, int workers,
                   int64_t part_bytes = BYTES_PER_PART) {
  if (workers == 1) return {count, count, 0};
  const int64_t rest_bytes = std::min(region_bytes / REST, count * row_bytes);
  const int64_t parts = std::min(MAX_PARTS, rest_bytes / part_bytes);
  if (parts == 0) return {count, count, 0};
  return {std::max<int64_t>(0, count - rest_bytes / row_bytes) / ROW_BLOCK * ROW_BLOCK, count, parts};
}

// Which parts of a region's rest have been taken.
class Taken {
 public:
  // Calls f(number) for every part below `count` that this thread gets.
  template <class Function>
  void share_out(int64_t count, const Function& f) {
    for (int64_t number; (number = next_.fetch_add(1, std::memory_order_relaxed)) < count;) f(number);
  }

 private:
  std::atomic<int64_t> next_{0};
};

// Calls f(range) for all rows that a thread has of a split: its share of the fixed ones, then parts of the rest.
template <class Function>
void rows_of_thread(const Split& split, Taken& taken, int worker, int workers, const Function& f) {
  f(share(split.fixed, ROW_BLOCK, worker, workers));
  taken.share_out(split.parts, [&](int64_t number) { f(split.part(number)); });
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

}  // namespace partinfer
