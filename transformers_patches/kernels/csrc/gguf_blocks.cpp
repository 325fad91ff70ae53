// Blocks of GGUF files to floats, on several threads: for loading. The layouts are ggml's (ggml-common.h and ggml-quants.c of
// llama.cpp describe them); products are taken in the order in which the gguf package takes them.
#include <ATen/Parallel.h>
#include <c10/util/Half.h>
#include <torch/library.h>

#include <cstring>
#include <string>

#include "arguments.h"
#include "shares.h"

#pragma GCC optimize("O3")  // of what drivers do, these loops alone are long

namespace partinfer {
namespace {

inline float half_at(const uint8_t* place) {
  uint16_t bits;
  std::memcpy(&bits, place, sizeof(bits));
  return c10::detail::fp16_ieee_to_fp32_value(bits);
}

// Four bits of each of 32 values: 16 low nibbles, then the 16 high ones. high_bits: a fifth bit of each, or null.
template <class Value>
inline void nibbles(const uint8_t* packed, const uint8_t* high_bits, float* out, const Value& value) {
  uint32_t fifth = 0;
  if (high_bits != nullptr) std::memcpy(&fifth, high_bits, sizeof(fifth));
  for (int j = 0; j < 16; ++j) {
    out[j] = value(int(packed[j] & 15) | int(fifth >> j & 1) << 4);
    out[j + 16] = value(int(packed[j] >> 4) | int(fifth >> (j + 16) & 1) << 4);
  }
}

void q4_0(const uint8_t* block, float* out) {
  const float scale = half_at(block);
  nibbles(block + 2, nullptr, out, [=](int q) { return scale * float(q - 8); });
}
void q4_1(const uint8_t* block, float* out) {
  const float scale = half_at(block), least = half_at(block + 2);
  nibbles(block + 4, nullptr, out, [=](int q) { return scale * float(q) + least; });
}
void q5_0(const uint8_t* block, float* out) {
  const float scale = half_at(block);
  nibbles(block + 6, block + 2, out, [=](int q) { return scale * float(q - 16); });
}
void q5_1(const uint8_t* block, float* out) {
  const float scale = half_at(block), least = half_at(block + 2);
  nibbles(block + 8, block + 4, out, [=](int q) { return scale * float(q) + least; });
}
void q8_0(const uint8_t* block, float* out) {
  const float scale = half_at(block);
  for (int j = 0; j < 32; ++j) out[j] = scale * float(int8_t(block[2 + j]));
}

// 256 values in eight parts of 32, each with 6 bits of scale and of minimum. high_bits: 32 bytes, bit s is part s's; or null.
inline void parts_of_32(const uint8_t* block, const uint8_t* high_bits, const uint8_t* packed, float* out) {
  const float scale = half_at(block), least = half_at(block + 2);
  const uint8_t* six = block + 4;
  for (int part = 0; part < 8; ++part) {
    const int low = part < 4 ? six[part] & 63 : (six[part + 4] & 15) | (six[part - 4] >> 6) << 4;
    const int minimum = part < 4 ? six[part + 4] & 63 : six[part + 4] >> 4 | (six[part] >> 6) << 4;
    const float own = scale * float(low), below = least * float(minimum);
    const uint8_t* bytes = packed + part / 2 * 32;
    for (int j = 0; j < 32; ++j) {
      int q = part % 2 == 0 ? bytes[j] & 15 : bytes[j] >> 4;
      if (high_bits != nullptr) q |= (high_bits[j] >> part & 1) << 4;
      out[part * 32 + j] = own * float(q) - below;
    }
  }
}
void q4_k(const uint8_t* block, float* out) { parts_of_32(block, nullptr, block + 16, out); }
void q5_k(const uint8_t* block, float* out) { parts_of_32(block, block + 16, block + 48, out); }

void q6_k(const uint8_t* block, float* out) {
  const uint8_t *low = block, *high = block + 128;
  const int8_t* scales = reinterpret_cast<const int8_t*>(block + 192);
  const float scale = half_at(block + 208);
  for (int half = 0; half < 2; ++half)
    for (int quarter = 0; quarter < 4; ++quarter)
      for (int j = 0; j < 32; ++j) {
        const uint8_t byte = low[half * 64 + quarter % 2 * 32 + j];
        const int four = quarter < 2 ? byte & 15 : byte >> 4, two = high[half * 32 + j] >> (2 * quarter) & 3;
        const float own = scale * float(scales[half * 8 + quarter * 2 + j / 16]);
        out[half * 128 + quarter * 32 + j] = own * float((four | two << 4) - 32);
      }
}

struct Kind {
  const char* name;
  int64_t values, bytes;  // of a block
  void (*unpack)(const uint8_t*, float*);
};
constexpr Kind KINDS[] = {{"Q4_0", 32, 18, q4_0},    {"Q4_1", 32, 20, q4_1},    {"Q5_0", 32, 22, q5_0},
                          {"Q5_1", 32, 24, q5_1},    {"Q8_0", 32, 34, q8_0},    {"Q4_K", 256, 144, q4_k},
                          {"Q5_K", 256, 176, q5_k},  {"Q6_K", 256, 210, q6_k}};

// packed: uint8 [rows, bytes]; out: float32 [rows, columns]. False for a kind that is not known here.
bool unpack_blocks(const Tensor& packed, const std::string& name, const Tensor& out) {
  const Kind* kind = nullptr;
  for (const Kind& one : KINDS)
    if (name == one.name) kind = &one;
  if (kind == nullptr) return false;
  TORCH_CHECK_VALUE(packed.dim() == 2 && out.dim() == 2 && packed.scalar_type() == at::kByte &&
                        out.scalar_type() == at::kFloat && packed.is_contiguous() && out.is_contiguous(),
                    "expected contiguous uint8 [rows, bytes] and float32 [rows, columns]");
  const int64_t rows = packed.size(0), blocks = packed.size(1) / kind->bytes;
  TORCH_CHECK_VALUE(packed.size(1) == blocks * kind->bytes && out.size(0) == rows && out.size(1) == blocks * kind->values,
                    name, " of ", packed.sizes(), " bytes does not make up ", out.sizes(), " values");
  const uint8_t* from = reinterpret_cast<const uint8_t*>(pointer(packed));
  float* to = reinterpret_cast<float*>(mutable_pointer(out));
  const int64_t all = rows * blocks;
  const int useful = useful_threads(all * kind->bytes, at::get_num_threads());
  parallel(useful, [&](int worker, int workers) {
    const int computing = std::min(useful, workers);
    if (worker >= computing) return;
    const Range range = share(all, 1, worker, computing);
    for (int64_t i = range.begin; i < range.end; ++i) kind->unpack(from + i * kind->bytes, to + i * kind->values);
  });
  return true;
}

TORCH_LIBRARY_FRAGMENT(partinfer, m) {
  m.def("unpack_blocks(Tensor packed, str kind, Tensor(a!) out) -> bool", unpack_blocks);
}

}  // namespace
}  // namespace partinfer
