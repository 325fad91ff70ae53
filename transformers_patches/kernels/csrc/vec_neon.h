// NEON of ARMv8; with the dot-product instructions of ARMv8.2 where the compiler was told that they are there.
#pragma once

constexpr int LANES = 4;
constexpr int MAX_ACCUMULATORS = 16;

struct F {
  float32x4_t v;
};

inline F zero() { return {vdupq_n_f32(0)}; }
inline F set1(float a) { return {vdupq_n_f32(a)}; }
inline F load(const float* p) { return {vld1q_f32(p)}; }
inline F load(const bf16_t* p) {
  return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16))};
}
inline F load(const f16_t* p) {
  return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))))};
}
inline F repeat(f16_t a) { return {vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(a.bits)))}; }
inline F load(const int8_t* p) {
  const int32_t lanes[4] = {p[0], p[1], p[2], p[3]};
  return {vcvtq_f32_s32(vld1q_s32(lanes))};
}
// 2 LANES values: those at even places, those at odd ones.
inline void load_even_odd(const bf16_t* p, F& even, F& odd) {
  const uint32x4_t pairs = vreinterpretq_u32_u16(vld1q_u16(reinterpret_cast<const uint16_t*>(p)));
  even.v = vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16));
  odd.v = vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff0000u)));
}
inline void interleave(F even, F odd, F& low, F& high) {
  low.v = vzip1q_f32(even.v, odd.v);
  high.v = vzip2q_f32(even.v, odd.v);
}
inline void store(float* p, F a) { vst1q_f32(p, a.v); }
inline void store(f16_t* p, F a) {
  vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(a.v)));
}
inline void store(bf16_t* p, F a) {
  const uint32x4_t bits = vreinterpretq_u32_f32(a.v), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint16x4_t halves = vshrn_n_u32(vaddq_u32(vaddq_u32(bits, odd), vdupq_n_u32(0x7fff)), 16);  // half to even
  const uint16x4_t number = vmovn_u32(vceqq_f32(a.v, a.v));
  vst1_u16(reinterpret_cast<uint16_t*>(p), vbsl_u16(number, halves, vdup_n_u16(0x7fc0)));
}
inline F add(F a, F b) { return {vaddq_f32(a.v, b.v)}; }
inline F mul(F a, F b) { return {vmulq_f32(a.v, b.v)}; }
inline F fma(F a, F b, F c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
inline F divide(F a, F b) { return {vdivq_f32(a.v, b.v)}; }
// The larger one of a, which is not negative, and |b|.
inline F max_size(F a, F b) { return {vmaxq_f32(a.v, vabsq_f32(b.v))}; }
inline float sum(F a) { return vaddvq_f32(a.v); }
// The sums of eight vectors.
inline void sum8(const F* v, float* out) {
  vst1q_f32(out, vpaddq_f32(vpaddq_f32(v[0].v, v[1].v), vpaddq_f32(v[2].v, v[3].v)));
  vst1q_f32(out + 4, vpaddq_f32(vpaddq_f32(v[4].v, v[5].v), vpaddq_f32(v[6].v, v[7].v)));
}

constexpr int BYTES = 16;
constexpr int32_t S8_OFFSET = 0;

struct I8 {
  int8x16_t v;
};
struct I32 {
  int32x4_t v;
};

inline I8 load_bytes(const void* p) { return {vld1q_s8(static_cast<const int8_t*>(p))}; }
inline I32 load_i32(const int32_t* p) { return {vld1q_s32(p)}; }
inline I8 low_nibbles(I8 a) { return {vandq_s8(a.v, vdupq_n_s8(15))}; }
inline I8 high_nibbles(I8 a) { return {vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(a.v), 4))}; }
inline I8 set_bytes(int8_t a) { return {vdupq_n_s8(a)}; }
inline void store_bytes(void* p, I8 a) { vst1q_s8(static_cast<int8_t*>(p), a.v); }
inline void store(int32_t* p, I32 a) { vst1q_s32(p, a.v); }
inline I32 negative(I32 a) { return {vnegq_s32(a.v)}; }
inline I32 round_to_i32(F a) { return {vcvtnq_s32_f32(a.v)}; }
// The lowest bytes of four lanes side by side.
inline I8 join_bytes(I32 a, I32 b, I32 c, I32 d) {
  const int32x4_t low = vsliq_n_s32(a.v, b.v, 8), high = vsliq_n_s32(c.v, d.v, 8);
  return {vreinterpretq_s8_s32(vsliq_n_s32(low, high, 16))};
}
// The low and the high four bits of LANES bytes as floats.
inline void load_nibbles(const char* p, F& low, F& high) {
  uint32_t four;
  __builtin_memcpy(&four, p, 4);
  const uint8x8_t bytes = vcreate_u8(four);
  low.v = vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vand_u8(bytes, vdup_n_u8(15))))));
  high.v = vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vshr_n_u8(bytes, 4)))));
}
#ifdef __ARM_FEATURE_DOTPROD
inline I32 dot_s8(I32 acc, I8 w, I8 x) { return {vdotq_s32(acc.v, w.v, x.v)}; }
#else
inline I32 dot_s8(I32 acc, I8 w, I8 x) {
  const int16x8_t low = vmull_s8(vget_low_s8(w.v), vget_low_s8(x.v));
  const int16x8_t high = vmull_high_s8(w.v, x.v);
  return {vpadalq_s16(acc.v, vpaddq_s16(low, high))};
}
#endif
inline I32 dot_u4(I32 acc, I8 w, I8 x) { return dot_s8(acc, w, x); }
inline F to_float(I32 a) { return {vcvtq_f32_s32(a.v)}; }
template <int GROUP_BYTES>
inline F spread(const float* p) {
  return {vdupq_n_f32(*p)};
}
template <int GROUP_BYTES>
inline I32 spread(const int32_t* p) {
  return {vdupq_n_s32(*p)};
}
template <int GROUP_BYTES>
inline I8 spread_bytes(const int32_t* p) {
  return {vreinterpretq_s8_s32(vdupq_n_s32(*p))};
}
inline void interleave4(const I8 (&r)[4], I8 (&out)[4]) {
  const int16x8_t low01 = vreinterpretq_s16_s8(vzip1q_s8(r[0].v, r[1].v));
  const int16x8_t high01 = vreinterpretq_s16_s8(vzip2q_s8(r[0].v, r[1].v));
  const int16x8_t low23 = vreinterpretq_s16_s8(vzip1q_s8(r[2].v, r[3].v));
  const int16x8_t high23 = vreinterpretq_s16_s8(vzip2q_s8(r[2].v, r[3].v));
  out[0].v = vreinterpretq_s8_s16(vzip1q_s16(low01, low23));
  out[1].v = vreinterpretq_s8_s16(vzip2q_s16(low01, low23));
  out[2].v = vreinterpretq_s8_s16(vzip1q_s16(high01, high23));
  out[3].v = vreinterpretq_s8_s16(vzip2q_s16(high01, high23));
}
