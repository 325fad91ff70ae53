#include "probe.h"

#include <omp.h>

#include <chrono>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace partinfer {
namespace {

// Eight streams, as the kernels have, each prefetched as far ahead as the kernels do.
uint64_t read_all(const char* data, int64_t bytes) {
  constexpr int64_t STREAMS = 8, LINE = 64, AHEAD = 4096;
  const int64_t length = bytes / STREAMS / LINE * LINE;
  uint64_t sums[STREAMS] = {};
  for (int64_t offset = 0; offset < length; offset += LINE)
    for (int64_t s = 0; s < STREAMS; ++s) {
      const char* place = data + s * length + offset;
      __builtin_prefetch(place + AHEAD, 0, 2);
      uint64_t words[LINE / 8];
      std::memcpy(words, place, LINE);
      for (uint64_t word : words) sums[s] += word;
    }
  uint64_t total = 0;
  for (uint64_t sum : sums) total += sum;
  return total;
}

}  // namespace

double timed_read(const char* data, int64_t bytes, int threads) {
  uint64_t total = 0;
  const auto start = std::chrono::steady_clock::now();
  if (threads == 1) {
    total = read_all(data, bytes);
  } else {
#pragma omp parallel reduction(+ : total)
    {
      const int64_t workers = omp_get_num_threads(), worker = omp_get_thread_num();
      const int64_t begin = bytes * worker / workers, end = bytes * (worker + 1) / workers;
      total += read_all(data + begin, end - begin);
    }
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  // The sum is looked at, so the compiler can't leave the reads out.
  return total == 0x5bd1e995u ? seconds.count() * (1 + 1e-12) : seconds.count();
}

bool advise_huge_pages(char* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t PAGE = uintptr_t(2) << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + PAGE - 1) / PAGE * PAGE;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / PAGE * PAGE;
  return begin < end && madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE) == 0;
#else
  (void)data;
  (void)bytes;
  return false;
#endif
}

}  // namespace partinfer
