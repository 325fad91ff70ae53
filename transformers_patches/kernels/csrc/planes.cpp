// Rows of a weight in planes, put together to rows of 8 bits.
#include "quant_rows.h"
#include "variants.h"

namespace partinfer {
namespace PARTINFER_ISA {

// A group of both planes: nibble k of a byte pair belongs to columns k and k + 16 (quant_rows.h).
inline void join_group(const uint8_t* __restrict high, const uint8_t* __restrict low, uint8_t* __restrict out) {
  for (int k = 0; k < GROUP / 2; ++k) {
    out[k] = uint8_t(uint8_t(high[k] << 4) ^ 0x80u) | (low[k] & 15u);
    out[GROUP / 2 + k] = uint8_t((high[k] & 0xf0u) ^ 0x80u) | uint8_t(low[k] >> 4);
  }
}

void join_rows(const Planes& planes, int64_t hidden, int64_t count, int8_t* out, int64_t stride) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t start = i * planes.row_bytes;
    const uint8_t* high = reinterpret_cast<const uint8_t*>(planes.high) + start;
    const uint8_t* low = reinterpret_cast<const uint8_t*>(planes.low) + start;
    uint8_t* row = reinterpret_cast<uint8_t*>(out) + i * stride;
    for (int64_t g = 0; g < hidden / GROUP; ++g)
      join_group(high + g * GROUP / 2, low + g * GROUP / 2, row + g * GROUP);
  }
}

namespace {

// The groups of a pair as a Q8 row has them.
inline void join_pair(const Planes& planes, int32_t row, int64_t group, uint8_t* out) {
  const int64_t start = row * planes.row_bytes + group * GROUP / 2;
  for (int g = 0; g < 2; ++g)
    join_group(reinterpret_cast<const uint8_t*>(planes.high) + start + g * GROUP / 2,
               reinterpret_cast<const uint8_t*>(planes.low) + start + g * GROUP / 2, out + g * GROUP);
}

}  // namespace

void add_fine(const Planes& planes, const int32_t* rows, int64_t count, const FinePair* pairs, float* out) {
  constexpr int AT_ONCE = 8;
  for (int64_t i = 0; i < count; i += AT_ONCE) {
    F acc[AT_ONCE];
    for (int r = 0; r < AT_ONCE; ++r) {
      const int32_t row = rows[smaller(i + r, count - 1)];
      acc[r] = zero();
      PARTINFER_UNROLL
      for (int e = 0; e < FINE_PAIRS; ++e) {
        const FinePair& pair = pairs[e];
        alignas(64) uint8_t weights[2 * GROUP];
        join_pair(planes, row, pair.group, weights);
        PARTINFER_UNROLL
        for (int64_t b = 0; b < 2 * GROUP; b += BYTES) {
          const I32 sum = dot_s8(load_i32(pair.start + b / 4), load_bytes(weights + b), load_bytes(pair.q + b));
          const uint16_t* scales = planes.scales + row * planes.row_scales + pair.group;
          acc[r] = fma(to_float(sum), spread_pair(scales, pair.scales, b), acc[r]);
        }
      }
    }
    float some[AT_ONCE];
    sums(acc, some);
    for (int r = 0; r < AT_ONCE && i + r < count; ++r) out[i + r] += some[r];
  }
}

}  // namespace PARTINFER_ISA
}  // namespace partinfer
