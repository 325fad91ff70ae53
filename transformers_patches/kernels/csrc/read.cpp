// Reads memory as fast as this instruction set can: the bandwidth probe.
#include "isa.h"
#include "variants.h"

namespace partinfer {
namespace PARTINFER_ISA {

uint64_t read_all(const char* data, int64_t bytes) {
  constexpr int64_t LINES = 4, STEP = LINES * 64, AHEAD = 1024;  // farther, and the hardware's prefetchers lose track
  uint64_t sums[STEP / 8] = {};
  for (int64_t offset = 0; offset + STEP <= bytes; offset += STEP) {
    for (int64_t line = 0; line < STEP; line += 64) prefetch(data + offset + line + AHEAD);
    uint64_t words[STEP / 8];
    __builtin_memcpy(words, data + offset, STEP);
    for (int64_t i = 0; i < STEP / 8; ++i) sums[i] += words[i];
  }
  uint64_t total = 0;
  for (uint64_t sum : sums) total += sum;
  return total;
}

}  // namespace PARTINFER_ISA
}  // namespace partinfer
