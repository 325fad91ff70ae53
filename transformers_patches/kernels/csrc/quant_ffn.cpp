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

// The first `count` of a block's columns, in their order, times their scales.
template <class T>
inline void store_columns(const float* columns, const float* scales, int64_t count, T* out) {
  for (int64_t j = 0; j < count; j += LANES) {
    const F value = load(columns + j);
    store_part(out + j, scales == nullptr ? value : mul(value, load_part(scales + j, count - j)), count - j);
  }
}

inline void store_columns(const FinishTask& task, const float* columns, int64_t token, int64_t start) {
  const int64_t count = smaller(COLUMN_BLOCK, task.end - start), place = token * task.hidden + start;
  const float* scales = task.column_scales == nullptr ? nullptr : task.column_scales + start;
  switch (task.out_type) {
    case Type::BF16:
      return store_columns(columns, scales, count, reinterpret_cast<bf16_t*>(task.out) + place);
    case Type::F16:
      return store_columns(columns, scales, count, reinterpret_cast<f16_t*>(task.out) + place);
    default:
      return store_columns(columns, scales, count, reinterpret_cast<float*>(task.out) + place);
  }
}

template <int BITS>
inline void finish_bits(const FinishTask& task) {
  float total[COLUMN_BLOCK], columns[COLUMN_BLOCK];
  for (int64_t t = 0; t < task.tokens; ++t)
    for (int64_t start = task.begin; start < task.end; start += COLUMN_BLOCK) {
      // A whole block, also where the row ends inside it: y is that long, and columns stay inside their block.
      const float* y = task.y + t * task.y_stride + start;
      for (int64_t j = 0; j < COLUMN_BLOCK; j += LANES) {
        F sum = load(y + j);
        for (int64_t other = 1; other < task.sums; ++other) sum = add(sum, load(y + other * task.sum_stride + j));
        store(total + j, sum);
      }
      in_order<BITS>(total, COLUMN_BLOCK, columns);
      store_columns(task, columns, t, start);
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
