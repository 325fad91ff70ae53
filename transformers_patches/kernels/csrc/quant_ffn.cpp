// The FFN with int8 and int4 weights.
#include "ffn_loop.h"
#include "quant_rows.h"
#include "variants.h"

namespace partinfer {
namespace PARTINFER_ISA {

// Between rows of gate, more rows of down at a time were not faster.
template <int BITS>
inline void ffn_of(const FfnTask& task) {
  if (task.gate.data != nullptr) return ffn<QuantRows<BITS>>(task);
  ffn<QuantRows<BITS, QUANT_ADD_ROWS_WIDE<BITS>>>(task);
}

void ffn_quant(const FfnTask& task) {
  if (task.type == Type::Q8)
    ffn_of<8>(task);
  else
    ffn_of<4>(task);
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
