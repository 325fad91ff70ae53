// In place of the compiler's header: AVX-512 as plain loops, so that its variants can be checked on a processor without
// it. Most is SIMDe's (Debian: libsimde-dev); what its version 0.7.4 lacks or gets wrong is here. Slow, but the same bits.
#pragma once

#define SIMDE_NO_NATIVE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/avx512/dpbf16.h>
#include <simde/x86/avx512/dpbusd.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulated {

template <class T, int N>
struct Lanes {
  T v[N];
};

template <class To, class From>
inline To bits(const From& from) {
  static_assert(sizeof(To) <= sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// Vector Out of 16 values f(lane), each a T.
template <class Out, class T, class Function>
inline Out each(const Function& f) {
  Lanes<T, 16> out;
  for (int i = 0; i < 16; ++i) out.v[i] = f(i);
  return bits<Out>(out);
}

// The first 16 values of a vector, each converted to T by C++'s rules.
template <class Out, class T, class From, class Vector>
inline Out converted(const Vector& vector) {
  const auto in = bits<Lanes<From, 16>>(vector);
  return each<Out, T>([&](int i) { return T(in.v[i]); });
}

inline __m512 cvtepi32_ps(__m512i a) { return converted<__m512, float, int32_t>(a); }
inline __m256i cvtepi32_epi16(__m512i a) { return converted<__m256i, int16_t, int32_t>(a); }
inline __m512i cvtepi8_epi32(__m128i a) { return converted<__m512i, int32_t, int8_t>(a); }
inline __m512i cvtepu8_epi32(__m128i a) { return converted<__m512i, int32_t, uint8_t>(a); }
inline __m512i cvtepu16_epi32(__m256i a) { return converted<__m512i, int32_t, uint16_t>(a); }
inline __m512 cvtph_ps(__m256i a) { return converted<__m512, float, _Float16>(a); }
inline __m256i cvtps_ph(__m512 a, int) { return converted<__m256i, _Float16, float>(a); }

inline __m512i cvtps_epi32(__m512 a) {
  const auto in = bits<Lanes<float, 16>>(a);
  return each<__m512i, int32_t>([&](int i) { return int32_t(std::nearbyint(in.v[i])); });
}

inline __m512i maskz_loadu_epi8(uint64_t mask, const void* p) {
  Lanes<uint8_t, 64> out;
  for (int i = 0; i < 64; ++i) out.v[i] = mask >> i & 1 ? static_cast<const uint8_t*>(p)[i] : 0;
  return bits<__m512i>(out);
}

inline __m512 permutevar_ps(__m512 a, __m512i b) {
  const auto in = bits<Lanes<float, 16>>(a);
  const auto place = bits<Lanes<int32_t, 16>>(b);
  return each<__m512, float>([&](int i) { return in.v[i / 4 * 4 + (place.v[i] & 3)]; });
}

inline float reduce_add_ps(__m512 a) {
  auto in = bits<Lanes<float, 16>>(a);
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) in.v[i] += in.v[i + half];
  return in.v[0];
}

inline __m512i madd_epi16(__m512i a, __m512i b) {
  const auto x = bits<Lanes<int16_t, 32>>(a), y = bits<Lanes<int16_t, 32>>(b);
  return each<__m512i, int32_t>([&](int i) { return x.v[2 * i] * y.v[2 * i] + x.v[2 * i + 1] * y.v[2 * i + 1]; });
}

inline __m512 shuffle_f32x4(__m512 a, __m512 b, int order) {
  const auto x = bits<Lanes<float, 16>>(a), y = bits<Lanes<float, 16>>(b);
  return each<__m512, float>([&](int i) { return (i < 8 ? x : y).v[(order >> i / 4 * 2 & 3) * 4 + i % 4]; });
}

template <class T, class Vector>
inline Vector compressed(uint16_t mask, Vector a) {
  const auto in = bits<Lanes<T, 16>>(a);
  Lanes<T, 16> out = {};
  int count = 0;
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) out.v[count++] = in.v[i];
  return bits<Vector>(out);
}
inline __m512i maskz_compress_epi32(uint16_t mask, __m512i a) { return compressed<int32_t>(mask, a); }
inline __m512 maskz_compress_ps(uint16_t mask, __m512 a) { return compressed<float>(mask, a); }

}  // namespace emulated

#undef _mm512_madd_epi16
#undef _mm512_maskz_compress_epi32
#undef _mm512_maskz_compress_ps
#undef _mm512_shuffle_f32x4
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#define _mm512_cvtepi32_epi16 emulated::cvtepi32_epi16
#define _mm512_cvtepi8_epi32 emulated::cvtepi8_epi32
#define _mm512_cvtepu8_epi32 emulated::cvtepu8_epi32
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtph_ps emulated::cvtph_ps
#define _mm512_cvtps_ph emulated::cvtps_ph
#define _mm512_cvtps_epi32 emulated::cvtps_epi32
#define _mm512_maskz_loadu_epi8 emulated::maskz_loadu_epi8
#define _mm512_permutevar_ps emulated::permutevar_ps
#define _mm512_reduce_add_ps emulated::reduce_add_ps
#define _mm512_madd_epi16 emulated::madd_epi16
#define _mm512_shuffle_f32x4 emulated::shuffle_f32x4
#define _mm512_maskz_compress_epi32 emulated::maskz_compress_epi32
#define _mm512_maskz_compress_ps emulated::maskz_compress_ps
#define __mmask16 uint16_t

// Every processor runs these loops, and none of their values lives in a register of 512 bits.
#define __builtin_cpu_supports(feature) 1
#define asm(...)
