#include "layouts.h"

#include <algorithm>

#include "shares.h"

namespace partinfer {

void split_rows(const int8_t* values, int64_t stride, int64_t rows, int64_t hidden, char* high, char* low,
                int64_t row_bytes) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t g = 0; g < hidden / GROUP; ++g) {
      const uint8_t* in = reinterpret_cast<const uint8_t*>(values) + row * stride + g * GROUP;
      char* upper = high + row * row_bytes + g * GROUP / 2;
      char* lower = low + row * row_bytes + g * GROUP / 2;
      for (int k = 0; k < GROUP / 2; ++k) {
        const uint8_t first = in[k] ^ 0x80u, second = in[GROUP / 2 + k] ^ 0x80u;
        upper[k] = char(first >> 4 | (second & 0xf0u));
        lower[k] = char((first & 15u) | second << 4);
      }
    }
}

void run_join(const Kernels& kernels, const Planes& planes, int64_t rows, int64_t hidden, int8_t* out, int64_t stride,
              int threads) {
  const int useful = useful_threads(rows * hidden, threads);
  parallel(useful, [&](int worker, int workers) {
    const int computing = std::min(useful, workers);
    if (worker >= computing) return;
    const Range range = share(rows, 1, worker, computing);
    Planes part = planes;
    part.high += range.begin * planes.row_bytes;
    part.low += range.begin * planes.row_bytes;
    kernels.join_rows(part, hidden, range.end - range.begin, out + range.begin * stride, stride);
  });
}

}  // namespace partinfer
