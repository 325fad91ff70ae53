// Four lanes in plain C++, for machines that none of the other variants fits.
#pragma once

#define VEC_LOOP for (int i = 0; i < 4; ++i)

constexpr int LANES = 4;
constexpr int MAX_ACCUMULATORS = 8;

struct F {
  float v[4];
};

inline F zero() { return F{{0, 0, 0, 0}}; }
inline F set1(float a) { return F{{a, a, a, a}}; }
inline F load(const float* p) { return F{{p[0], p[1], p[2], p[3]}}; }
inline F load(const bf16_t* p) {
  F r;
  VEC_LOOP r.v[i] = to_float(p[i]);
  return r;
}
inline F repeat(f16_t a) { return set1(to_float(a)); }
inline F load(const f16_t* p) {
  F r;
  VEC_LOOP r.v[i] = to_float(p[i]);
  return r;
}
inline F load(const int8_t* p) { return F{{float(p[0]), float(p[1]), float(p[2]), float(p[3])}}; }
// 2 LANES values: those at even places, those at odd ones.
inline void load_even_odd(const bf16_t* p, F& even, F& odd) {
  VEC_LOOP {
    even.v[i] = to_float(p[2 * i]);
    odd.v[i] = to_float(p[2 * i + 1]);
  }
}
inline void interleave(F even, F odd, F& low, F& high) {
  low = F{{even.v[0], odd.v[0], even.v[1], odd.v[1]}};
  high = F{{even.v[2], odd.v[2], even.v[3], odd.v[3]}};
}
inline void store(float* p, F a) { VEC_LOOP p[i] = a.v[i]; }
inline void store(f16_t* p, F a) { VEC_LOOP p[i] = to_f16(a.v[i]); }
inline void store(bf16_t* p, F a) { VEC_LOOP p[i] = to_bf16(a.v[i]); }
inline F add(F a, F b) {
  VEC_LOOP a.v[i] += b.v[i];
  return a;
}
inline F mul(F a, F b) {
  VEC_LOOP a.v[i] *= b.v[i];
  return a;
}
inline F fma(F a, F b, F c) {
  VEC_LOOP c.v[i] += a.v[i] * b.v[i];
  return c;
}
inline F divide(F a, F b) {
  VEC_LOOP a.v[i] /= b.v[i];
  return a;
}
// The larger one of a, which is not negative, and |b|.
inline F max_size(F a, F b) {
  VEC_LOOP {
    const float size = b.v[i] < 0 ? -b.v[i] : b.v[i];
    a.v[i] = size > a.v[i] ? size : a.v[i];
  }
  return a;
}
inline float sum(F a) { return (a.v[0] + a.v[1]) + (a.v[2] + a.v[3]); }
inline void sum8(const F* v, float* out) {
  for (int i = 0; i < 8; ++i) out[i] = sum(v[i]);
}

// Integers: 16 bytes and the 4 int32 lanes that they sum into, 4 neighbouring bytes each.
constexpr int BYTES = 16;
constexpr int32_t S8_OFFSET = 0;

struct I8 {
  int8_t v[16];
};
struct I32 {
  int32_t v[4];
};

inline I8 load_bytes(const void* p) {
  I8 r;
  __builtin_memcpy(r.v, p, 16);
  return r;
}
inline I32 load_i32(const int32_t* p) { return I32{{p[0], p[1], p[2], p[3]}}; }
inline I8 low_nibbles(I8 a) {
  for (int i = 0; i < 16; ++i) a.v[i] &= 15;
  return a;
}
inline I8 high_nibbles(I8 a) {
  for (int i = 0; i < 16; ++i) a.v[i] = int8_t(uint8_t(a.v[i]) >> 4);
  return a;
}
inline I8 set_bytes(int8_t a) {
  I8 r;
  for (int i = 0; i < 16; ++i) r.v[i] = a;
  return r;
}
inline void store_bytes(void* p, I8 a) { __builtin_memcpy(p, a.v, 16); }
inline void store(int32_t* p, I32 a) { __builtin_memcpy(p, a.v, 16); }
inline I32 negative(I32 a) { return I32{{-a.v[0], -a.v[1], -a.v[2], -a.v[3]}}; }
inline I32 round_to_i32(F a) {
  I32 r;
  VEC_LOOP r.v[i] = int32_t(__builtin_rintf(a.v[i]));
  return r;
}
// The lowest bytes of four lanes side by side.
inline I8 join_bytes(I32 a, I32 b, I32 c, I32 d) {
  I8 r;
  VEC_LOOP {
    r.v[4 * i] = int8_t(a.v[i]);
    r.v[4 * i + 1] = int8_t(b.v[i]);
    r.v[4 * i + 2] = int8_t(c.v[i]);
    r.v[4 * i + 3] = int8_t(d.v[i]);
  }
  return r;
}
// The low and the high four bits of LANES bytes as floats.
inline void load_nibbles(const char* p, F& low, F& high) {
  VEC_LOOP {
    low.v[i] = float(p[i] & 15);
    high.v[i] = float(uint8_t(p[i]) >> 4);
  }
}
inline I32 dot_s8(I32 acc, I8 w, I8 x) {
  for (int i = 0; i < 16; ++i) acc.v[i / 4] += int32_t(w.v[i]) * x.v[i];
  return acc;
}
inline I32 dot_u4(I32 acc, I8 w, I8 x) { return dot_s8(acc, w, x); }
inline F to_float(I32 a) {
  F r;
  VEC_LOOP r.v[i] = float(a.v[i]);
  return r;
}
template <int GROUP_BYTES>
inline F spread(const float* p) {
  return set1(*p);
}
template <int GROUP_BYTES>
inline I32 spread(const int32_t* p) {
  return I32{{*p, *p, *p, *p}};
}
template <int GROUP_BYTES>
inline I8 spread_bytes(const int32_t* p) {
  I8 r;
  VEC_LOOP __builtin_memcpy(r.v + 4 * i, p, 4);
  return r;
}
inline void interleave4(const I8 (&r)[4], I8 (&out)[4]) {
  for (int k = 0; k < 4; ++k)
    for (int i = 0; i < 16; ++i) out[k].v[i] = r[i % 4].v[4 * k + i / 4];
}

#undef VEC_LOOP
