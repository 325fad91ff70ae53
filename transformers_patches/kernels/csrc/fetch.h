// What an FFN asks of rows that may have to be read from disk first (rows_on_disk.cpp).
#pragma once

#include <cstdint>

namespace partinfer {

constexpr int64_t FETCH_BLOCK = 256;  // positions that are computed at a time; a multiple of the kernels' own blocks
constexpr int64_t UNIT = 64;          // bytes: rows of gate and down lie at multiples of this from where memory begins

class Fetch {
 public:
  virtual ~Fetch() = default;
  // Puts where a layer's rows are, in units, in the place of their numbers, and begins to read those that are
  // not in memory. The positions are shared by so many workers.
  virtual void begin(int64_t layer, int32_t* rows, int64_t count, int workers) noexcept = 0;
  // Returns when the rows at positions [begin, end) have been read, or could not be.
  virtual void wait(int64_t begin, int64_t end) noexcept = 0;
  // After all of them have been computed. Throws if a row could not be read.
  virtual void end(int64_t layer) = 0;
};

}  // namespace partinfer
