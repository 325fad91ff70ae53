// Matrix-vector products with float32, bfloat16 and float16 weights.
#include "float_rows.h"
#include "linear_loop.h"
#include "variants.h"

namespace partinfer {
namespace PARTINFER_ISA {

void linear_float(const LinearTask& task) {
  switch (task.type) {
    case Type::F32:
      return linear<FloatRows<float, float>>(task);
    case Type::F16:
      return linear<FloatRows<f16_t, float>>(task);
    default:
#ifdef PARTINFER_BF16_DOT
      if (task.x.bf16 != nullptr) return linear<FloatRows<bf16_t, bf16_t>>(task);
#endif
      return linear<FloatRows<bf16_t, float>>(task);
  }
}

}  // namespace PARTINFER_ISA
}  // namespace partinfer
