#include "probe.h"

#include <omp.h>

#include <chrono>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace partinfer {

double timed_read(const Kernels& kernels, const char* data, int64_t bytes, int threads) {
  const auto start = std::chrono::steady_clock::now();
  if (threads == 1) {
    kernels.read_all(data, bytes);
  } else {
#pragma omp parallel
    {
      const int64_t workers = omp_get_num_threads(), worker = omp_get_thread_num();
      const int64_t begin = bytes * worker / workers, end = bytes * (worker + 1) / workers;
      kernels.read_all(data + begin, end - begin);
    }
  }
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
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
