// The FFN with int8 and int4 weights.
#include "ffn_loop.h"
#include "quant_rows.h"
#include "variants.h"

namespace partinfer {
namespace PARTINFER_ISA {

void ffn_quant(const FfnTask& task) {
  if (task.type == Type::Q8)
    ffn<QuantRows<8>>(task);
  else
    ffn<QuantRows<4>>(task);
}

// Where column j of a row is in the order of quant_add_rows.
template <int BITS>
inline int64_t place_of(int64_t j) {
  constexpr int PARTS = Packing<BITS>::PARTS;
  int64_t byte = j, part = 0;
  if constexpr (BITS == 4) {
    byte = j / GROUP * 16 + j % 16;
    part = j % GROUP / 16;
  }
  const int64_t chunk = byte / BYTES, inside = byte % BYTES;
  const int64_t quarter = inside / 16, vector = inside % 16 / 4, lane = inside % 4;
  return chunk * BYTES * PARTS + part * BYTES + vector * LANES + quarter * 4 + lane;
}

template <int BITS>
inline void finish_bits(const FinishTask& task) {
  float total[COLUMN_BLOCK];
  for (int64_t t = 0; t < task.tokens; ++t)
    for (int64_t start = task.begin; start < task.end; start += COLUMN_BLOCK) {
      // A whole block, also where the row ends inside it: y is that long, and columns stay inside their block.
      const float* y = task.y + t * task.y_stride + start;
      for (int64_t j = 0; j < COLUMN_BLOCK; j += LANES) {
        F sum = load(y + j);
        for (int64_t other = 1; other < task.sums; ++other) sum = add(sum, load(y + other * task.sum_stride + j));
        store(total + j, sum);
      }
      for (int64_t j = start; j < smaller(start + COLUMN_BLOCK, task.end); ++j) {
        const float scale = task.column_scales == nullptr ? 1.0f : task.column_scales[j];
        store_element(task.out, task.out_type, t * task.hidden + j, total[place_of<BITS>(j - start)] * scale);
      }
    }
}

void finish_quant(const FinishTask& task) {
  if (task.type == Type::Q8)
    finish_bits<8>(task);
  else
    finish_bits<4>(task);
}

}  // namespace PARTINFER_ISA
}  // namespace partinfer
