// AVX2 with FMA and F16C.
#pragma once

constexpr int LANES = 8;
constexpr int MAX_ACCUMULATORS = 8;

struct F {
  __m256 v;
};

inline F zero() { return {_mm256_setzero_ps()}; }
inline F set1(float a) { return {_mm256_set1_ps(a)}; }
inline F load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline F load(const bf16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
inline F load(const f16_t* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
inline F repeat(f16_t a) { return {_mm256_cvtph_ps(_mm_set1_epi16(int16_t(a.bits)))}; }
inline F load(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
// 2 LANES values: those at even places, those at odd ones.
inline void load_even_odd(const bf16_t* p, F& even, F& odd) {
  const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  even.v = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
  odd.v = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000u))));
}
inline void interleave(F even, F odd, F& low, F& high) {
  const __m256 a = _mm256_unpacklo_ps(even.v, odd.v), b = _mm256_unpackhi_ps(even.v, odd.v);
  low.v = _mm256_permute2f128_ps(a, b, 0x20);
  high.v = _mm256_permute2f128_ps(a, b, 0x31);
}
inline void store(float* p, F a) { _mm256_storeu_ps(p, a.v); }
inline void store(f16_t* p, F a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(bf16_t* p, F a) {
  const __m256i bits = _mm256_castps_si256(a.v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));  // half to even
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i halves = _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), _mm256_set1_epi32(0x7fc0), nan);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1)));
}
inline F add(F a, F b) { return {_mm256_add_ps(a.v, b.v)}; }
inline F mul(F a, F b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline F divide(F a, F b) { return {_mm256_div_ps(a.v, b.v)}; }
// The larger one of a, which is not negative, and |b|.
inline F max_size(F a, F b) { return {_mm256_max_ps(a.v, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), b.v))}; }
inline float sum(F a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}

// The sums of eight vectors, in a third of the operations of eight times one.
inline void sum8(const F* v, float* out) {
  const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(v[0].v, v[1].v), _mm256_hadd_ps(v[2].v, v[3].v));
  const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(v[4].v, v[5].v), _mm256_hadd_ps(v[6].v, v[7].v));
  _mm256_storeu_ps(out, _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)));
}

constexpr int BYTES = 32;
constexpr int32_t S8_OFFSET = 0;

struct I8 {
  __m256i v;
};
struct I32 {
  __m256i v;
};

inline I8 load_bytes(const void* p) { return {_mm256_loadu_si256(static_cast<const __m256i*>(p))}; }
inline I32 load_i32(const int32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
inline I8 low_nibbles(I8 a) { return {_mm256_and_si256(a.v, _mm256_set1_epi8(15))}; }
inline I8 high_nibbles(I8 a) { return {_mm256_and_si256(_mm256_srli_epi16(a.v, 4), _mm256_set1_epi8(15))}; }
inline I8 set_bytes(int8_t a) { return {_mm256_set1_epi8(a)}; }
inline void store_bytes(void* p, I8 a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a.v); }
inline void store(int32_t* p, I32 a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v); }
inline I32 negative(I32 a) { return {_mm256_sub_epi32(_mm256_setzero_si256(), a.v)}; }
inline I32 round_to_i32(F a) { return {_mm256_cvtps_epi32(a.v)}; }
// The lowest bytes of four lanes side by side.
inline I8 join_bytes(I32 a, I32 b, I32 c, I32 d) {
  const __m256i odd = _mm256_set1_epi16(int16_t(0xff00));
  const __m256i low = _mm256_blendv_epi8(a.v, _mm256_slli_epi32(b.v, 8), odd);
  const __m256i high = _mm256_blendv_epi8(c.v, _mm256_slli_epi32(d.v, 8), odd);
  return {_mm256_blend_epi16(low, _mm256_slli_epi32(high, 16), 0xaa)};
}
// The low and the high four bits of LANES bytes as floats.
inline void load_nibbles(const char* p, F& low, F& high) {
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  low.v = _mm256_cvtepi32_ps(_mm256_and_si256(wide, _mm256_set1_epi32(15)));
  high.v = _mm256_cvtepi32_ps(_mm256_srli_epi32(wide, 4));
}
inline I32 dot_u4(I32 acc, I8 w, I8 x) {
  const __m256i pairs = _mm256_maddubs_epi16(w.v, x.v);
  return {_mm256_add_epi32(acc.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
}

#define PARTINFER_DOT_U4_HALVES 1
// Both halves of groups of 4 bits: two pairs together fit 16 bits, too.
inline I32 dot_u4_halves(const I8 (&w)[2], const I8 (&x)[2]) {
  const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(w[0].v, x[0].v), _mm256_maddubs_epi16(w[1].v, x[1].v));
  return {_mm256_madd_epi16(pairs, _mm256_set1_epi16(1))};
}

#define PARTINFER_TAIL_OF_MORE 1
// `count` < LANES values that at least as many others precede, and zeros.
inline F load_tail_of_more(const f16_t* p, int64_t count) {
  alignas(32) static const int8_t moves[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                               -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
  const __m128i last = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + count - LANES));
  const __m128i move = _mm_loadu_si128(reinterpret_cast<const __m128i*>(moves + 2 * (LANES - count)));
  return {_mm256_cvtph_ps(_mm_shuffle_epi8(last, move))};
}

#define PARTINFER_PAIRS_OF_HALVES 1
// Two values, and zeros; and each of them in four lanes.
inline F load_pair(const float* p) {
  return {_mm256_zextps128_ps256(_mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
inline F load_pair(const f16_t* p) {
  int32_t pair;
  __builtin_memcpy(&pair, p, 4);
  return {_mm256_zextps128_ps256(_mm_cvtph_ps(_mm_cvtsi32_si128(pair)))};
}
inline F halves_of_pair(F a) { return {_mm256_permutevar8x32_ps(a.v, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1))}; }

// (w with x's sign) * |x|: weights are within -127 … 127, as quantize writes them, so pairs stay below 2^15.
inline I32 dot_s8(I32 acc, I8 w, I8 x) {
  return dot_u4(acc, I8{_mm256_abs_epi8(x.v)}, I8{_mm256_sign_epi8(w.v, x.v)});
}
inline F to_float(I32 a) { return {_mm256_cvtepi32_ps(a.v)}; }

template <int GROUP_BYTES>
inline __m256i spread_bits(const void* p) {
  const float* values = static_cast<const float*>(p);
  if constexpr (GROUP_BYTES == 32) return _mm256_castps_si256(_mm256_broadcast_ss(values));
  __m256 pairs;  // of values of either type, so that no pointer type fits
  asm("vbroadcastsd %1, %0" : "=x"(pairs) : "m"(*static_cast<const char(*)[8]>(p)));
  return _mm256_castps_si256(_mm256_permutevar_ps(pairs, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1)));
}
template <int GROUP_BYTES>
inline F spread(const float* p) {
  return {_mm256_castsi256_ps(spread_bits<GROUP_BYTES>(p))};
}
template <int GROUP_BYTES>
inline I32 spread(const int32_t* p) {
  return {spread_bits<GROUP_BYTES>(p)};
}
template <int GROUP_BYTES>
inline I8 spread_bytes(const int32_t* p) {
  return {spread_bits<GROUP_BYTES>(p)};
}
inline void interleave2(I8 a, I8 b, I8 (&out)[2]) {
  out[0].v = _mm256_unpacklo_epi8(a.v, b.v);
  out[1].v = _mm256_unpackhi_epi8(a.v, b.v);
}

#define PARTINFER_ADD_PAIRS 1
// Integers of 16 bits, those of one group in each half of the register.
struct I16 {
  __m256i v;
};
// p[0] and p[1], which fit 16 bits, in a half each.
inline I16 spread16(const int32_t* p) {
  const __m256i wide = spread_bits<16>(p);
  return {_mm256_packs_epi32(wide, wide)};
}
// Of four rows' factors of two groups: rows 2 PAIR and 2 PAIR + 1, one group's in each half.
template <int PAIR>
inline I8 spread_pair_of_factors(const int32_t* four) {
  __m256i groups;
  asm("vbroadcastsd %1, %0" : "=x"(groups) : "m"(*reinterpret_cast<const char(*)[8]>(four)));
  constexpr int16_t a = 0x0100 + 0x0202 * PAIR, b = a + 0x0404;
  return {_mm256_shuffle_epi8(groups, _mm256_setr_epi16(a, a, a, a, a, a, a, a, b, b, b, b, b, b, b, b))};
}
// acc + the products of neighbouring bytes, two and two together.
inline I16 dot_pairs(I16 acc, I8 w, I8 c) { return {_mm256_add_epi16(acc.v, _mm256_maddubs_epi16(w.v, c.v))}; }
// first[0 … 7] += the lower half times a scale, second[0 … 7] += the upper half times another.
inline void add_sums16(I16 sums, F scale, F second_scale, float* first, float* second) {
  const F low{_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm256_castsi256_si128(sums.v)))};
  const F high{_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm256_extracti128_si256(sums.v, 1)))};
  store(first, fma(low, scale, load(first)));
  store(second, fma(high, second_scale, load(second)));
}

inline void interleave4(const I8 (&r)[4], I8 (&out)[4]) {
  const __m256i low01 = _mm256_unpacklo_epi8(r[0].v, r[1].v), high01 = _mm256_unpackhi_epi8(r[0].v, r[1].v);
  const __m256i low23 = _mm256_unpacklo_epi8(r[2].v, r[3].v), high23 = _mm256_unpackhi_epi8(r[2].v, r[3].v);
  out[0].v = _mm256_unpacklo_epi16(low01, low23);
  out[1].v = _mm256_unpackhi_epi16(low01, low23);
  out[2].v = _mm256_unpacklo_epi16(high01, high23);
  out[3].v = _mm256_unpackhi_epi16(high01, high23);
}
