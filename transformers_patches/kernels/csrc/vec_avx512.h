// AVX-512 F, BW, DQ, VL; with AVX512_BF16 and AVX512_VNNI where the compiler was told that they are there.
#pragma once

constexpr int LANES = 16;
constexpr int MAX_ACCUMULATORS = 16;

struct F {
  __m512 v;
};

inline F zero() { return {_mm512_setzero_ps()}; }
inline F set1(float a) { return {_mm512_set1_ps(a)}; }
inline F load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline F load(const bf16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline F repeat(f16_t a) { return {_mm512_cvtph_ps(_mm256_set1_epi16(int16_t(a.bits)))}; }
inline F load(const f16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline F load(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
// 2 LANES values: those at even places, those at odd ones. Two plain operations, where widening takes four.
inline void load_even_odd(const bf16_t* p, F& even, F& odd) {
  const __m512i pairs = _mm512_loadu_si512(p);
  even.v = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  odd.v = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000u))));
}
inline void interleave(F even, F odd, F& low, F& high) {
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  low.v = _mm512_permutex2var_ps(even.v, first, odd.v);
  high.v = _mm512_permutex2var_ps(even.v, _mm512_add_epi32(first, _mm512_set1_epi32(8)), odd.v);
}
inline void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
inline void store(f16_t* p, F a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(bf16_t* p, F a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
// The first `count` < LANES elements, and zeros: masked loads, where others go through memory.
#define PARTINFER_MASKED_TAILS 1
inline __m512i load_bits(const void* p, int64_t bytes) {
  return _mm512_maskz_loadu_epi8((1ull << bytes) - 1, p);
}
inline F load_tail(const float* p, int64_t count) { return {_mm512_castsi512_ps(load_bits(p, count * 4))}; }
inline F load_tail(const bf16_t* p, int64_t count) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(load_bits(p, count * 2)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline F load_tail(const f16_t* p, int64_t count) {
  return {_mm512_cvtph_ps(_mm512_castsi512_si256(load_bits(p, count * 2)))};
}
inline F add(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F mul(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F divide(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
// The larger one of a, which is not negative, and |b|.
inline F max_size(F a, F b) { return {_mm512_max_ps(a.v, _mm512_abs_ps(b.v))}; }
inline float sum(F a) { return _mm512_reduce_add_ps(a.v); }

// The sums of eight vectors, in a third of the operations of eight times one.
inline void sum8(const F* v, float* out) {
  const auto pairs = [](__m512 a, __m512 b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); };
  const auto fours = [](__m512 a, __m512 b) {
    const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  };
  const __m512 low = fours(pairs(v[0].v, v[1].v), pairs(v[2].v, v[3].v));
  const __m512 high = fours(pairs(v[4].v, v[5].v), pairs(v[6].v, v[7].v));
  const __m512 halves = _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
  const __m512 all = _mm512_add_ps(halves, _mm512_shuffle_f32x4(halves, halves, 0xb1));
  _mm_storeu_ps(out, _mm512_castps512_ps128(all));
  _mm_storeu_ps(out + 4, _mm512_extractf32x4_ps(all, 2));
}

#define PARTINFER_COMPRESS 1
using Lanes = __mmask16;
inline Lanes larger(F a, F b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
inline Lanes same(F a, F b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
// The chosen of LANES numbers from `first` on, and of the values, side by side; LANES of each are written. How many.
inline int compress(Lanes chosen, int32_t first, F values, int32_t* numbers, float* out) {
  const __m512i steps = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i all = _mm512_add_epi32(_mm512_set1_epi32(first), steps);
  _mm512_storeu_si512(numbers, _mm512_maskz_compress_epi32(chosen, all));
  _mm512_storeu_ps(out, _mm512_maskz_compress_ps(chosen, values.v));
  return __builtin_popcount(chosen);
}

#ifdef __AVX512BF16__
// 32 bfloat16 at once, products exact and summed in float32.
#define PARTINFER_BF16_DOT 1
struct BF {
  __m512bh v;
};
inline BF load_pairs(const bf16_t* p) { return {(__m512bh)_mm512_loadu_si512(p)}; }
inline BF load_pairs_tail(const bf16_t* p, int64_t count) { return {(__m512bh)load_bits(p, count * 2)}; }
inline F dot_pairs(BF a, BF b, F c) { return {_mm512_dpbf16_ps(c.v, a.v, b.v)}; }
#endif

constexpr int BYTES = 64;

struct I8 {
  __m512i v;
};
struct I32 {
  __m512i v;
};

inline I8 load_bytes(const void* p) { return {_mm512_loadu_si512(p)}; }
inline I8 load_bytes_tail(const char* p, int64_t count) { return {load_bits(p, count)}; }
inline I32 load_i32(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline I8 low_nibbles(I8 a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
inline I8 high_nibbles(I8 a) { return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(15))}; }
inline I8 set_bytes(int8_t a) { return {_mm512_set1_epi8(a)}; }
inline void store_bytes(void* p, I8 a) { _mm512_storeu_si512(p, a.v); }
inline void store(int32_t* p, I32 a) { _mm512_storeu_si512(p, a.v); }
inline I32 negative(I32 a) { return {_mm512_sub_epi32(_mm512_setzero_si512(), a.v)}; }
inline I32 round_to_i32(F a) { return {_mm512_cvtps_epi32(a.v)}; }
// The lowest bytes of four lanes side by side.
inline I8 join_bytes(I32 a, I32 b, I32 c, I32 d) {
  const __m512i low = _mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaaull, a.v, _mm512_slli_epi32(b.v, 8));
  const __m512i high = _mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaaull, c.v, _mm512_slli_epi32(d.v, 8));
  return {_mm512_mask_blend_epi16(0xaaaaaaaau, low, _mm512_slli_epi32(high, 16))};
}
// The low and the high four bits of LANES bytes as floats.
inline void load_nibbles(const char* p, F& low, F& high) {
  const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  low.v = _mm512_cvtepi32_ps(_mm512_and_si512(wide, _mm512_set1_epi32(15)));
  high.v = _mm512_cvtepi32_ps(_mm512_srli_epi32(wide, 4));
}
#ifdef __AVX512VNNI__
// vpdpbusd wants one unsigned factor: weights go in as w + 128, and the accumulator starts at -128 * sum(x).
constexpr int32_t S8_OFFSET = 128;
inline I32 dot_s8(I32 acc, I8 w, I8 x) {
  return {_mm512_dpbusd_epi32(acc.v, _mm512_xor_si512(w.v, _mm512_set1_epi8(-128)), x.v)};
}
inline I32 dot_u4(I32 acc, I8 w, I8 x) { return {_mm512_dpbusd_epi32(acc.v, w.v, x.v)}; }
#else
constexpr int32_t S8_OFFSET = 0;
inline I32 dot_u4(I32 acc, I8 w, I8 x) {
  const __m512i pairs = _mm512_maddubs_epi16(w.v, x.v);
  return {_mm512_add_epi32(acc.v, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
}
inline I32 dot_s8(I32 acc, I8 w, I8 x) {
  const __m512i signed_x = _mm512_mask_sub_epi8(x.v, _mm512_movepi8_mask(w.v), _mm512_setzero_si512(), x.v);
  return dot_u4(acc, I8{_mm512_abs_epi8(w.v)}, I8{signed_x});
}
#endif
inline F to_float(I32 a) { return {_mm512_cvtepi32_ps(a.v)}; }

// One value per group of GROUP_BYTES weight bytes -> the lanes that the group's bytes sum into.
template <int GROUP_BYTES>
inline __m512i spread_bits(const void* p) {
  if constexpr (GROUP_BYTES == 32) {
    long long two;
    __builtin_memcpy(&two, p, 8);
    const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    return _mm512_castps_si512(_mm512_permutevar_ps(_mm512_castsi512_ps(_mm512_set1_epi64(two)), lanes));
  } else {
    const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const __m512 four = _mm512_broadcast_f32x4(_mm_loadu_ps(static_cast<const float*>(p)));
    return _mm512_castps_si512(_mm512_permutevar_ps(four, lanes));
  }
}
template <int GROUP_BYTES>
inline F spread(const float* p) {
  return {_mm512_castsi512_ps(spread_bits<GROUP_BYTES>(p))};
}
template <int GROUP_BYTES>
inline I32 spread(const int32_t* p) {
  return {spread_bits<GROUP_BYTES>(p)};
}
#define PARTINFER_SPREAD_FROM_REGISTER 1
// The same, from one of 16 values in a register on.
template <int GROUP_BYTES>
inline F spread_from(F values, int64_t first) {
  const __m512i lanes = GROUP_BYTES == 32 ? _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1)
                                          : _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  return {_mm512_permutexvar_ps(_mm512_add_epi32(lanes, _mm512_set1_epi32(int(first))), values.v)};
}
#define PARTINFER_SPREAD_PAIR 1
// Two scales, multiplied with others, over the lanes of their groups' 32 bytes each.
inline F spread_pair(const uint16_t* scales, const float* others, int64_t) {
  int32_t pair;
  double two;
  __builtin_memcpy(&pair, scales, 4);
  __builtin_memcpy(&two, others, 8);
  const __m128 products = _mm_mul_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(pair)), _mm_castpd_ps(_mm_set_sd(two)));
  const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  return {_mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(products))};
}
// Sums of 4-bit products of 64 packed bytes each (dot_u4 of both halves: a lane is within 15240) as one sum per group of 16
// bytes: two lanes together still fit 16 bits, so that half the width and multiply-adds do what shuffles and sums would.
#define PARTINFER_SUM_GROUPS 1
inline I32 sum_groups(const I32 (&s)[4]) {
  const __m512i ones = _mm512_set1_epi16(1);
  const __m512i low = _mm512_madd_epi16(_mm512_packs_epi32(s[0].v, s[1].v), ones);
  const __m512i high = _mm512_madd_epi16(_mm512_packs_epi32(s[2].v, s[3].v), ones);
  const __m512i turned = _mm512_madd_epi16(_mm512_packs_epi32(low, high), ones);  // lane 4 q + k is group 4 k + q
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return {_mm512_permutexvar_epi32(order, turned)};
}
// In a register, where the compiler would load what two operations take twice: loads are what it has fewest of.
inline I8 load_once(const char* p) {
  __m512i bytes = _mm512_loadu_si512(p);
  asm("" : "+v"(bytes));
  return {bytes};
}
inline I8 load_halves(const char* low, const char* high) {
  const __m512i both = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low)));
  return {_mm512_inserti64x4(both, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(high)), 1)};
}
inline I8 repeat_half(const void* p) {
  return {_mm512_broadcast_i64x4(_mm256_loadu_si256(static_cast<const __m256i*>(p)))};
}
inline F repeat_pair(const float* p) {
  double pair;
  __builtin_memcpy(&pair, p, 8);
  return {_mm512_castpd_ps(_mm512_set1_pd(pair))};
}
// The first two values of eight places, side by side.
inline F load_pairs_of(const f16_t* const (&p)[8]) {
  int32_t pairs[8];
  for (int i = 0; i < 8; ++i) __builtin_memcpy(pairs + i, p[i], 4);
  return {_mm512_cvtph_ps(_mm256_setr_epi32(pairs[0], pairs[1], pairs[2], pairs[3], pairs[4], pairs[5], pairs[6], pairs[7]))};
}
// out[i] = a[2 i] + a[2 i + 1]
inline void sum_pairs(F a, float* out) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 0, 2, 4, 6, 8, 10, 12, 14);
  const __m512 odd = _mm512_permutexvar_ps(_mm512_add_epi32(even, _mm512_set1_epi32(1)), a.v);
  _mm256_storeu_ps(out, _mm256_add_ps(_mm512_castps512_ps256(_mm512_permutexvar_ps(even, a.v)), _mm512_castps512_ps256(odd)));
}
template <int GROUP_BYTES>
inline I8 spread_bytes(const int32_t* p) {
  return {spread_bits<GROUP_BYTES>(p)};
}
// Bytes of four rows side by side: lane i of quarter q of out[k] holds column 16 q + 4 k + i of the rows.
inline void interleave4(const I8 (&r)[4], I8 (&out)[4]) {
  const __m512i low01 = _mm512_unpacklo_epi8(r[0].v, r[1].v), high01 = _mm512_unpackhi_epi8(r[0].v, r[1].v);
  const __m512i low23 = _mm512_unpacklo_epi8(r[2].v, r[3].v), high23 = _mm512_unpackhi_epi8(r[2].v, r[3].v);
  out[0].v = _mm512_unpacklo_epi16(low01, low23);
  out[1].v = _mm512_unpackhi_epi16(low01, low23);
  out[2].v = _mm512_unpacklo_epi16(high01, high23);
  out[3].v = _mm512_unpackhi_epi16(high01, high23);
}
