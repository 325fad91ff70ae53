// Included first by every kernel source. The same sources are compiled once per instruction set, each time with that
// set's compiler flags and its own namespace (-DPARTINFER_ISA=...): nothing in here may be shared between variants, or
// the linker could hand AVX-512 code to a CPU without it. So: one namespace per variant, and no standard library.
#pragma once

#include <stddef.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "types.h"

#ifndef PARTINFER_ISA
#error "compile with -DPARTINFER_ISA=<name of the variant>"
#endif

#if defined(__AVX2__) || defined(__aarch64__)
#define PARTINFER_UNROLL _Pragma("GCC unroll 16")
#else
#define PARTINFER_UNROLL  // the scalar variant is there to be right and small
#endif

namespace partinfer {
namespace PARTINFER_ISA {

inline float bits_to_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline uint32_t float_to_bits(float value) { return __builtin_bit_cast(uint32_t, value); }

inline float to_float(float a) { return a; }
inline float to_float(bf16_t a) { return bits_to_float(uint32_t(a.bits) << 16); }
inline float to_float(f16_t a) {
  const uint32_t sign = uint32_t(a.bits & 0x8000u) << 16;
  const uint32_t magnitude = a.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude << 13));
  // Normal or not: shifted into place the value is 2^112 too small, and one product repairs both.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}

inline bf16_t to_bf16(float a) {
  const uint32_t bits = float_to_bits(a);
  if (a != a) return {0x7fc0};
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
inline f16_t to_f16(float a) {
  const uint32_t bits = float_to_bits(a), sign = (bits >> 16) & 0x8000u;
  const float size = bits_to_float(bits & 0x7fffffffu);
  if (a != a) return {uint16_t(sign | 0x7e00u)};
  if (size >= 65520.0f) return {uint16_t(sign | 0x7c00u)};
  if (size < 0x1p-14f) return {uint16_t(sign | uint32_t(__builtin_rintf(size * 0x1p24f)))};
  const uint32_t shifted = (bits & 0x7fffffffu) - (112u << 23);
  return {uint16_t(sign | ((shifted + 0xfffu + ((shifted >> 13) & 1u)) >> 13))};
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "vec_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "vec_avx2.h"
#elif defined(__aarch64__) && defined(__ARM_NEON)
#include "vec_neon.h"
#else
#include "vec_scalar.h"
#endif

constexpr int32_t U4_OFFSET = 8;  // 4-bit weights are stored as value + 8

template <int N>
inline void sums(const F (&vectors)[N], float* out) {
  constexpr int EIGHTS = N / 8 * 8;
  PARTINFER_UNROLL
  for (int i = 0; i < EIGHTS; i += 8) sum8(vectors + i, out + i);
  PARTINFER_UNROLL
  for (int i = EIGHTS; i < N; ++i) out[i] = sum(vectors[i]);
}

#ifndef PARTINFER_MASKED_TAILS
// The last `count` < LANES elements of a row, and zeros.
template <class T>
inline F load_tail(const T* p, int64_t count) {
  T lanes[LANES];
  __builtin_memset(lanes, 0, sizeof(lanes));
  __builtin_memcpy(lanes, p, size_t(count) * sizeof(T));
  return load(lanes);
}
inline I8 load_bytes_tail(const char* p, int64_t count) {
  char bytes[BYTES];
  __builtin_memset(bytes, 0, sizeof(bytes));
  __builtin_memcpy(bytes, p, size_t(count));
  return load_bytes(bytes);
}
#endif

template <class T>
inline void store_tail(T* p, F a, int64_t count) {
  T lanes[LANES];
  store(lanes, a);
  __builtin_memcpy(p, lanes, size_t(count) * sizeof(T));
}

template <class T>
inline F load_part(const T* p, int64_t count) {
  return count < LANES ? load_tail(p, count) : load(p);
}
template <class T>
inline void store_part(T* p, F a, int64_t count) {
  count < LANES ? store_tail(p, a, count) : store(p, a);
}

constexpr int64_t LINE_BYTES = 64;  // of a cache line

// Into the second-level cache: the rows that come next are often too big for the first, and this is what hides DRAM. With
// AVX-512 into the first one as well, which those processors have more of: listed rows of 4 bits then come 7 to 20 % faster.
inline void prefetch(const char* p) { __builtin_prefetch(p, 0, LANES == 16 ? 3 : 2); }

// Rows that follow each other in memory are read one after the other: the hardware's prefetchers then do most of the
// work, if software reaches no further ahead than this many bytes (farther, and they lose track).
constexpr int64_t RUN_AHEAD = 1024;

inline float element(const Vector& vector, int64_t i) {
  if (vector.data == nullptr) return 0.0f;
  switch (vector.type) {
    case Type::BF16:
      return to_float(reinterpret_cast<const bf16_t*>(vector.data)[i]);
    case Type::F16:
      return to_float(reinterpret_cast<const f16_t*>(vector.data)[i]);
    default:
      return reinterpret_cast<const float*>(vector.data)[i];
  }
}

inline void store_element(char* out, Type type, int64_t i, float value) {
  switch (type) {
    case Type::BF16:
      reinterpret_cast<bf16_t*>(out)[i] = to_bf16(value);
      return;
    case Type::F16:
      reinterpret_cast<f16_t*>(out)[i] = to_f16(value);
      return;
    default:
      reinterpret_cast<float*>(out)[i] = value;
  }
}

struct RowRef {
  const char* data;
  const uint16_t* scales;
};

inline int64_t row_number(const Rows& rows, int64_t position) {
  return position < rows.prefix ? position : rows.index[position - rows.prefix];
}

// Whether the rows follow each other in memory.
inline bool one_run(const Rows& rows) { return rows.end <= rows.prefix; }

inline RowRef row_at(const Matrix& matrix, int64_t row) {
  return {matrix.data + row * matrix.row_bytes, matrix.scales + row * matrix.row_scales};
}

// The rows that come after R rows which are read side by side, for prefetching. Where they follow each other, their lines
// are asked for in the order of memory: DRAM and the hardware's prefetchers then do better than by alternating between rows.
template <int R>
struct RowsAhead {
  const char* place[R];
  int64_t pace;  // bytes of them for each byte of a row

  RowsAhead(const RowRef* next, int64_t row_bytes) {
    const bool in_order = next[R - 1].data - next[0].data == (R - 1) * row_bytes;
    pace = in_order ? R : 1;
    for (int r = 0; r < R; ++r) place[r] = in_order ? next[0].data + r * LINE_BYTES : next[r].data;
  }

  // Of row r, when all rows are read up to a byte that begins a line.
  void prefetch_for(int r, int64_t byte) const { prefetch(place[r] + pace * byte); }
};

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace PARTINFER_ISA
}  // namespace partinfer
