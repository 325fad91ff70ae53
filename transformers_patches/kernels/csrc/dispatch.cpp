#include "dispatch.h"

#include <cstring>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "variants.h"

// One line per variant: the name, the namespace of its float kernels, that of its quantised ones, what the CPU needs.
#define PARTINFER_VARIANT(name, floats, quants, usable)                                                         \
  {{name, partinfer::floats::ffn_float, partinfer::floats::linear_float, partinfer::floats::finish_float,       \
    partinfer::floats::widen, partinfer::floats::read_all, partinfer::floats::norm, partinfer::floats::rotate,  \
    partinfer::floats::attend, partinfer::floats::gate_values,                                                  \
    partinfer::floats::score_candidates, partinfer::floats::keep_candidates, partinfer::floats::largest,        \
    partinfer::floats::count_bands, partinfer::floats::count_positive,                                         \
    partinfer::floats::mark_largest, partinfer::floats::add_squares, &partinfer::floats::bf16_input,            \
    partinfer::quants::ffn_quant, partinfer::quants::linear_quant, partinfer::quants::finish_quant,             \
    partinfer::quants::prepare_quant, partinfer::quants::quantise_rows, partinfer::quants::dequantise_rows,     \
    partinfer::quants::add_fine, partinfer::quants::join_rows},                                                  \
   usable}

PARTINFER_DECLARE_FLOAT(isa_scalar)
PARTINFER_DECLARE_QUANT(isa_scalar)
#ifdef PARTINFER_HAVE_AVX2
PARTINFER_DECLARE_FLOAT(isa_avx2)
PARTINFER_DECLARE_QUANT(isa_avx2)
#endif
#ifdef PARTINFER_HAVE_AVX512
PARTINFER_DECLARE_FLOAT(isa_avx512)
PARTINFER_DECLARE_QUANT(isa_avx512)
#endif
#ifdef PARTINFER_HAVE_AVX512_VNNI
PARTINFER_DECLARE_QUANT(isa_avx512_vnni)
#endif
#ifdef PARTINFER_HAVE_AVX512_BF16
PARTINFER_DECLARE_FLOAT(isa_avx512_bf16)
#endif
#ifdef PARTINFER_HAVE_NEON
PARTINFER_DECLARE_FLOAT(isa_neon)
PARTINFER_DECLARE_QUANT(isa_neon)
#endif
#ifdef PARTINFER_HAVE_NEON_DOTPROD
PARTINFER_DECLARE_QUANT(isa_neon_dotprod)
#endif

namespace partinfer {
namespace {

struct Variant {
  Kernels kernels;
  bool (*usable)();
};

bool always() { return true; }

#if defined(__x86_64__)
[[maybe_unused]] bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
[[maybe_unused]] bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
[[maybe_unused]] bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
[[maybe_unused]] bool has_avx512_bf16() { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }
#endif
#if defined(__aarch64__)
[[maybe_unused]] bool has_dotprod() { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }
#endif

const Variant VARIANTS[] = {
    PARTINFER_VARIANT("scalar", isa_scalar, isa_scalar, always),
#ifdef PARTINFER_HAVE_AVX2
    PARTINFER_VARIANT("avx2", isa_avx2, isa_avx2, has_avx2),
#endif
#ifdef PARTINFER_HAVE_AVX512
    PARTINFER_VARIANT("avx512", isa_avx512, isa_avx512, has_avx512),
#endif
#ifdef PARTINFER_HAVE_AVX512_VNNI
    PARTINFER_VARIANT("avx512_vnni", isa_avx512, isa_avx512_vnni, has_avx512_vnni),
#endif
#ifdef PARTINFER_HAVE_AVX512_BF16
    PARTINFER_VARIANT("avx512_bf16", isa_avx512_bf16, isa_avx512_vnni, has_avx512_bf16),
#endif
#ifdef PARTINFER_HAVE_NEON
    PARTINFER_VARIANT("neon", isa_neon, isa_neon, always),
#endif
#ifdef PARTINFER_HAVE_NEON_DOTPROD
    PARTINFER_VARIANT("neon_dotprod", isa_neon, isa_neon_dotprod, has_dotprod),
#endif
};

}  // namespace

int usable_variants(const Kernels* (&variants)[MAX_VARIANTS]) {
  int count = 0;
  for (const Variant& variant : VARIANTS)
    if (variant.usable()) variants[count++] = &variant.kernels;
  return count;
}

const Kernels* find_variant(const char* name) {
  for (const Variant& variant : VARIANTS)
    if (std::strcmp(variant.kernels.name, name) == 0 && variant.usable()) return &variant.kernels;
  return nullptr;
}

const Kernels* fastest_variant() {
  const Kernels* variants[MAX_VARIANTS];
  return variants[usable_variants(variants) - 1];
}

}  // namespace partinfer
