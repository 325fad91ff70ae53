// Compares every variant of the kernels that the (emulated) processor runs with sums in double, without torch.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "dispatch.h"
#include "threads.h"

using namespace partinfer;

namespace {

std::mt19937 generator(1);
int failures = 0;

double to_double(float value, Type type) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (type == Type::BF16) bits = (bits + 0x8000u) & 0xffff0000u;
  if (type == Type::F16) bits = (bits + 0x1000u) & 0xffffe000u;  // values here are normal numbers in float16
  std::memcpy(&value, &bits, 4);
  return value;
}

// A matrix in one of the types, and the doubles that it stands for.
struct Weight {
  std::vector<char> data;
  std::vector<uint16_t> scales;
  std::vector<double> values;
  Matrix matrix;
};

uint16_t half_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return uint16_t((bits >> 16 & 0x8000u) | (((bits & 0x7fffffffu) - (112u << 23)) >> 13));
}

void append(Weight& weight, float value, Type type) {
  char bytes[4];
  const float rounded = float(to_double(value, type));
  if (type == Type::F16) {
    const uint16_t bits = half_bits(rounded);
    std::memcpy(bytes, &bits, 2);
  } else {
    std::memcpy(bytes, &rounded, 4);
    if (type == Type::BF16) std::memmove(bytes, bytes + 2, 2);
  }
  weight.data.insert(weight.data.end(), bytes, bytes + element_size(type));
  weight.values.push_back(rounded);
}

Weight floats(int64_t rows, int64_t columns, Type type) {
  std::uniform_real_distribution<float> size(0.01f, 1.0f);
  Weight weight;
  for (int64_t i = 0; i < rows * columns; ++i) append(weight, (generator() & 1 ? 1 : -1) * size(generator), type);
  weight.matrix = {weight.data.data(), nullptr, columns * element_size(type), 0};
  return weight;
}

Weight quants(int64_t rows, int64_t columns, Type type) {
  Weight weight;
  weight.values.resize(size_t(rows * columns));
  const bool wide = type == Type::Q8;
  weight.data.resize(size_t(rows * columns / (wide ? 1 : 2)));
  for (int64_t group = 0; group < rows * columns / GROUP; ++group) {
    const int exponent = int(generator() % 3);
    weight.scales.push_back(uint16_t((9 + exponent) << 10));
    for (int64_t i = 0; i < GROUP; ++i) {
      const int q = wide ? int(generator() % 255) - 127 : int(generator() % 16) - 8;
      weight.values[size_t(group * GROUP + i)] = std::ldexp(q, 9 + exponent - 15);
      if (wide)
        weight.data[size_t(group * GROUP + i)] = char(q);
      else
        weight.data[size_t(group * 16 + i % 16)] |= char((q + 8) << (i / 16 * 4));
    }
  }
  weight.matrix = {weight.data.data(), weight.scales.data(), wide ? columns : columns / 2, columns / GROUP};
  return weight;
}

void report(const std::string& what, const std::vector<double>& expected, const std::vector<float>& got, double limit) {
  double wrong = 0, norm = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    wrong += (got[i] - expected[i]) * (got[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  const double error = std::sqrt(wrong / norm);
  const bool good = error < limit;
  failures += !good;
  std::printf("%-4s %-42s relative error %.1e (limit %.0e)\n", good ? "ok" : "BAD", what.c_str(), error, limit);
}

void check(const Kernels& kernels, Type type, const char* type_name, int64_t tokens, int64_t hidden) {
  const int64_t rows = 83, prefix = 21;
  const bool quantised = type == Type::Q8 || type == Type::Q4;
  const auto make = quantised ? quants : floats;
  const Weight gate = make(rows, hidden, type), up = make(rows, hidden, type), down = make(rows, hidden, type);
  const Weight x = floats(tokens, hidden, Type::F32);
  const std::vector<int32_t> index = {82, 30, 47, 22, 65};
  std::vector<double> expected(size_t(tokens * hidden)), products(size_t(tokens * rows));
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t r = 0; r < rows; ++r) {
      double g = 0, u = 0;
      for (int64_t j = 0; j < hidden; ++j) {
        g += gate.values[size_t(r * hidden + j)] * x.values[size_t(t * hidden + j)];
        u += up.values[size_t(r * hidden + j)] * x.values[size_t(t * hidden + j)];
      }
      products[size_t(t * rows + r)] = g;
      bool active = r < prefix;
      for (int32_t i : index) active = active || i == r;
      if (!active) continue;
      const double h = g / (1 + std::exp(-g)) * u;
      for (int64_t j = 0; j < hidden; ++j) expected[size_t(t * hidden + j)] += h * down.values[size_t(r * hidden + j)];
    }
  const std::string what = std::string(kernels.name) + " " + type_name + " " + std::to_string(tokens) + " x " +
                           std::to_string(hidden);
  const double limit = quantised ? 3e-2 : 1e-5;
  std::vector<float> out(size_t(tokens * hidden));
  FfnCall call;
  call.type = type;
  call.gate = gate.matrix;
  call.up = up.matrix;
  call.down = down.matrix;
  call.rows = {prefix, index.data(), int64_t(index.size())};
  call.x = x.data.data();
  call.tokens = tokens;
  call.hidden = hidden;
  call.out = reinterpret_cast<char*>(out.data());
  run_ffn(kernels, call, 2);
  report("sparse_ffn " + what, expected, out, limit);
  std::vector<float> linear_out(size_t(tokens * rows));
  LinearCall linear;
  linear.type = type;
  linear.weight = gate.matrix;
  linear.rows = rows;
  linear.x = x.data.data();
  linear.tokens = tokens;
  linear.hidden = hidden;
  linear.out = reinterpret_cast<char*>(linear_out.data());
  run_linear(kernels, linear, 2);
  report("linear " + what, products, linear_out, limit);
}

}  // namespace

int main() {
  const Kernels* variants[MAX_VARIANTS];
  const int count = usable_variants(variants);
  for (int v = 0; v < count; ++v)
    for (int64_t tokens : {1, 3, 8}) {
      for (int64_t hidden : {7, 96, 1057}) {
        check(*variants[v], Type::F32, "float32", tokens, hidden);
        check(*variants[v], Type::BF16, "bfloat16", tokens, hidden);
        check(*variants[v], Type::F16, "float16", tokens, hidden);
      }
      for (int64_t hidden : {32, 96, 1056}) {
        check(*variants[v], Type::Q8, "int8", tokens, hidden);
        check(*variants[v], Type::Q4, "int4", tokens, hidden);
      }
    }
  std::printf("%d variants, %d failures\n", count, failures);
  return failures == 0 ? 0 : 1;
}
