// The FFN with float32, bfloat16 and float16 weights.
#include "ffn_loop.h"
#include "float_rows.h"
#include "variants.h"

namespace partinfer {
namespace PARTINFER_ISA {

// Rows of gate and up are read 4 neurons at a time where they are listed, and then 4 rows of down are read faster than 8
// after two such groups. Where they follow each other it makes no difference.
template <class W, class X>
inline void ffn_of(const FfnTask& task) {
  if (task.up.data != nullptr) return ffn<FloatRows<W, X>>(task);
  ffn<FloatRows<W, X, FLOAT_ADD_ROWS_WIDE>>(task);
}

void ffn_float(const FfnTask& task) {
  switch (task.type) {
    case Type::F32:
      return ffn_of<float, float>(task);
    case Type::F16:
      return ffn_of<f16_t, float>(task);
    default:
#ifdef PARTINFER_BF16_DOT
      if (task.x.bf16 != nullptr) return ffn_of<bf16_t, bf16_t>(task);
#endif
      return ffn_of<bf16_t, float>(task);
  }
}

template <class T>
inline void widen_all(const T* values, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(out + i, load(values + i));
  for (; i < count; ++i) out[i] = to_float(values[i]);
}

void widen(Type from, const char* values, int64_t count, float* out) {
  switch (from) {
    case Type::BF16:
      return widen_all(reinterpret_cast<const bf16_t*>(values), count, out);
    case Type::F16:
      return widen_all(reinterpret_cast<const f16_t*>(values), count, out);
    default:
      return widen_all(reinterpret_cast<const float*>(values), count, out);
  }
}

#ifdef PARTINFER_BF16_DOT
extern const bool bf16_input = true;
#else
extern const bool bf16_input = false;
#endif

template <class W, class Out>
inline void finish(const FinishTask& task) {
  for (int64_t t = 0; t < task.tokens; ++t) {
    Out* out = reinterpret_cast<Out*>(task.out) + t * task.hidden;
    const float* y = task.y + t * task.y_stride;
    const auto sums = [&](int64_t place) {
      F total = load(y + place);
      for (int64_t sum = 1; sum < task.sums; ++sum)
        total = add(total, load(y + sum * task.sum_stride + place));
      return total;
    };
    columns_in_order<W>(task.begin, task.end, task.hidden, sums,
                        [&](int64_t j, F values, int64_t count) { store_part(out + j, values, count); });
  }
}

template <class W>
inline void finish_to(const FinishTask& task) {
  switch (task.out_type) {
    case Type::BF16:
      return finish<W, bf16_t>(task);
    case Type::F16:
      return finish<W, f16_t>(task);
    default:
      return finish<W, float>(task);
  }
}

void finish_float(const FinishTask& task) {
  task.type == Type::BF16 ? finish_to<bf16_t>(task) : finish_to<float>(task);
}

}  // namespace PARTINFER_ISA
}  // namespace partinfer
