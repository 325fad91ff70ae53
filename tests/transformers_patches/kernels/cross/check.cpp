// Compares every variant of the kernels that the (emulated) processor runs, without torch: FFNs and linear layers with
// sums in double, everything else with the scalar variant.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "core_counts.h"
#include "typical_size.h"
#include "dispatch.h"
#include "layer.h"
#include "layouts.h"
#include "probe.h"
#include "screened.h"
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
  const int64_t rows = 173, prefix = 141;
  const bool quantised = type == Type::Q8 || type == Type::Q4;
  const auto make = quantised ? quants : floats;
  const Weight gate = make(rows, hidden, type), up = make(rows, hidden, type), down = make(rows, hidden, type);
  const Weight x = floats(tokens, hidden, Type::F32);
  const std::vector<int32_t> index = {172, 150, 147, 142, 165};
  std::vector<float> columns(size_t(hidden), 1.0f);  // column scales
  for (int64_t j = 0; quantised && j < hidden; ++j) columns[size_t(j)] = float(1 + j % 7);
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
      for (int64_t j = 0; j < hidden; ++j)
        expected[size_t(t * hidden + j)] += h * down.values[size_t(r * hidden + j)] * columns[size_t(j)];
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
  if (quantised) call.column_scales = columns.data();
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

const char* NAMES[] = {"float32", "bfloat16", "float16", "int8", "int4"};
const double LIMITS[] = {1e-5, 1e-2, 2e-3, 1e-3, 1e-3};  // of the scalar variant's results

bool quantised(Type type) { return type == Type::Q8 || type == Type::Q4; }
Type vectors_with(Type weights) { return quantised(weights) ? Type::F32 : weights; }

Weight weight_of(int64_t rows, int64_t columns, Type type) {
  return quantised(type) ? quants(rows, columns, type) : floats(rows, columns, type);
}

void check_weighted_rows(const Kernels& kernels, Type type, int64_t tokens, int64_t hidden) {
  const int64_t rows = 1003;  // enough for two threads of wide rows
  const Weight weight = weight_of(rows, hidden, type), h = floats(tokens, rows, Type::F32);
  std::vector<double> expected(size_t(tokens * hidden));
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < hidden; ++j)
        expected[size_t(t * hidden + j)] += h.values[size_t(t * rows + r)] * weight.values[size_t(r * hidden + j)];
  std::vector<float> out(size_t(tokens * hidden));
  FfnCall call;
  call.type = type;
  call.down = weight.matrix;
  call.rows.prefix = rows;
  call.x = h.data.data();
  call.tokens = tokens;
  call.hidden = hidden;
  call.out = reinterpret_cast<char*>(out.data());
  run_weighted_rows(kernels, call, 2);
  report(std::string("weighted_rows ") + kernels.name + " " + NAMES[int(type)] + " " + std::to_string(tokens) + " x " +
             std::to_string(hidden),
         expected, out, quantised(type) ? 2e-2 : 1e-5);
}

LayerWeight layer_weight(const Weight& weight, int64_t rows, int64_t columns, Type type) {
  LayerWeight layer;
  layer.type = type;
  layer.matrix = weight.matrix;
  layer.rows = rows;
  layer.columns = columns;
  return layer;
}

std::vector<float> as_floats(const std::vector<char>& values, Type type) {
  std::vector<float> wide(values.size() / size_t(element_size(type)));
  find_variant("scalar")->widen(type, values.data(), int64_t(wide.size()), wide.data());
  return wide;
}

using Results = std::vector<std::vector<float>>;

// What compute(kernels) gives, beside what it gives with the scalar variant.
template <class Function>
void compare(const std::string& what, const Kernels& kernels, Type type, const Function& compute) {
  const Results expected = compute(*find_variant("scalar")), got = compute(kernels);
  for (size_t i = 0; i < expected.size(); ++i)
    report(what + " " + kernels.name + " " + NAMES[int(type)] + " " + std::to_string(i),
           std::vector<double>(expected[i].begin(), expected[i].end()), got[i], LIMITS[int(type)]);
}

void check_attention(const Kernels& kernels, Type type, int64_t head_dim, int64_t window, bool normed, bool layer_norms) {
  const int64_t hidden = 96, heads = 4, kv_heads = 2, capacity = 40, length = 33;
  const int64_t q_rows = heads * head_dim, kv_rows = kv_heads * head_dim;
  const Type vectors = vectors_with(type);
  const Weight q = weight_of(q_rows, hidden, type), k = weight_of(kv_rows, hidden, type);
  const Weight v = weight_of(kv_rows, hidden, type), o = weight_of(hidden, q_rows, type);
  const Weight keys = floats(kv_heads * capacity, head_dim, vectors), values = floats(kv_heads * capacity, head_dim, vectors);
  const Weight x = floats(1, hidden, vectors), delta = floats(1, hidden, vectors), norms = floats(4, hidden, vectors);
  const Weight turn = floats(2, head_dim, vectors);
  const int64_t norm_bytes = hidden * element_size(vectors);
  compare(window > 0 ? "attention in a window" : "attention", kernels, type, [&](const Kernels& variant) {
    std::vector<char> cached_keys = keys.data, cached_values = values.data;
    std::vector<char> sum(static_cast<size_t>(norm_bytes)), next(static_cast<size_t>(norm_bytes));
    AttentionCall call;
    call.q = layer_weight(q, q_rows, hidden, type);
    call.k = layer_weight(k, kv_rows, hidden, type);
    call.v = layer_weight(v, kv_rows, hidden, type);
    call.o = layer_weight(o, hidden, q_rows, type);
    const auto norm = [&](int i) {
      const char* weight = norms.data.data() + i * norm_bytes;
      return Norm{weight, layer_norms ? weight : nullptr, 1e-6f};
    };
    call.norm = norm(0);
    call.next_norm = norm(1);
    if (normed) {
      call.q_norm = norm(2);
      call.k_norm = norm(3);
    }
    call.type = vectors;
    call.x = x.data.data();
    call.delta = delta.data.data();
    if (!layer_norms) {
      call.cosine = turn.data.data();
      call.sine = turn.data.data() + head_dim * element_size(vectors);
    }
    call.keys = cached_keys.data();
    call.values = cached_values.data();
    call.capacity = capacity;
    call.length = length;
    call.window = window;
    call.hidden = hidden;
    call.heads = heads;
    call.kv_heads = kv_heads;
    call.head_dim = head_dim;
    call.scale = 0.02f;  // scores of these weights are large, and differences of roundings with them
    call.sum = sum.data();
    call.next = next.data();
    run_attention(variant, call, 2);
    return Results{as_floats(sum, vectors), as_floats(next, vectors), as_floats(cached_keys, vectors),
                   as_floats(cached_values, vectors)};
  });
}

void check_dense_ffn(const Kernels& kernels, Type type, bool gated) {
  const int64_t hidden = 96, neurons = 160;
  const Type vectors = vectors_with(type);
  const Weight gate = weight_of(neurons, hidden, type), up = weight_of(neurons, hidden, type);
  const Weight down = weight_of(hidden, neurons, type), x = floats(1, hidden, vectors);
  compare(gated ? "dense_ffn" : "plain dense_ffn", kernels, type, [&](const Kernels& variant) {
    std::vector<char> out(static_cast<size_t>(hidden * element_size(vectors)));
    DenseFfnCall call;
    call.gate = layer_weight(gate, neurons, hidden, type);
    if (gated) call.up = layer_weight(up, neurons, hidden, type);
    call.down = layer_weight(down, hidden, neurons, type);
    call.type = vectors;
    call.x = x.data.data();
    call.out = out.data();
    run_dense_ffn(variant, call, 2);
    return Results{as_floats(out, vectors)};
  });
}

void check_by_up(const Kernels& kernels, Type type, bool gated) {
  const int64_t hidden = 96, rows = 200;
  const Weight gate = weight_of(rows, hidden, type), up = weight_of(rows, hidden, type);
  const Weight down = weight_of(rows, hidden, type), x = floats(1, hidden, Type::F32);
  const std::vector<int32_t> index = {190, 151, 170};
  const std::vector<float> size(size_t(rows), 1.0f);
  compare(gated ? "by_up" : "by_size", kernels, type, [&](const Kernels& variant) {
    std::vector<float> out(static_cast<size_t>(hidden));
    ByUpCall call;
    call.ffn.type = type;
    call.ffn.gate = gate.matrix;
    if (gated) call.ffn.up = up.matrix;
    call.ffn.activation = gated ? Activation::SILU : Activation::RELU;
    call.ffn.down = down.matrix;
    call.ffn.rows = {150, index.data(), int64_t(index.size())};
    call.ffn.x = x.data.data();
    call.ffn.tokens = 1;
    call.ffn.hidden = hidden;
    call.ffn.out = reinterpret_cast<char*>(out.data());
    call.size = size.data();
    call.keep = 60;
    return Results{{float(run_by_up(variant, call, 2))}, out};
  });
}

void check_convert(const Kernels& kernels, Type type, Type float_type) {
  const int64_t rows = 5, hidden = 96;
  Weight original = floats(rows, hidden, float_type);
  compare(std::string("quantise ") + NAMES[int(float_type)], kernels, type, [&](const Kernels& variant) {
    std::vector<char> data(static_cast<size_t>(rows * hidden)), back(original.data.size());
    std::vector<uint16_t> scales(size_t(rows * hidden / GROUP));
    ConvertTask task;
    task.type = type;
    task.floats = original.data.data();
    task.float_type = float_type;
    task.data = data.data();
    task.scales = scales.data();
    task.hidden = hidden;
    run_convert(variant.quantise_rows, task, rows, 2);
    task.floats = back.data();
    run_convert(variant.dequantise_rows, task, rows, 2);
    return Results{as_floats(back, float_type)};
  });
}

void check_screened(const Kernels& kernels, int64_t hidden) {
  const int64_t rows = 1100;
  const Weight weight = quants(rows, hidden, Type::Q8);
  Weight x = floats(1, hidden, Type::F32);
  auto* inputs = reinterpret_cast<float*>(x.data.data());
  for (int64_t j = 0; j < hidden; ++j) x.values[size_t(j)] = inputs[j] *= 0.5f / std::sqrt(float(hidden));
  const std::string what = std::string(kernels.name) + " " + std::to_string(hidden);
  std::vector<char> planes(static_cast<size_t>(rows * hidden));
  const auto* bytes = reinterpret_cast<const int8_t*>(weight.data.data());
  char *high = planes.data(), *low = high + rows * hidden / 2;
  split_rows(bytes, hidden, rows, hidden, high, low, hidden / 2);
  ScreenedCall call;
  call.planes = {high, low, weight.scales.data(), hidden / 2, hidden / GROUP};
  std::vector<int8_t> joined(static_cast<size_t>(rows * hidden));
  run_join(kernels, call.planes, rows, hidden, joined.data(), hidden, 2);
  report("joined planes " + what, std::vector<double>(bytes, bytes + rows * hidden),
         std::vector<float>(joined.begin(), joined.end()), 1e-9);

  std::vector<double> expected(static_cast<size_t>(rows)), errors(static_cast<size_t>(hidden / GROUP));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < hidden; ++j)
      expected[size_t(r)] += weight.values[size_t(r * hidden + j)] * x.values[size_t(j)];
    for (int64_t g = 0; g < hidden / GROUP; ++g)
      errors[size_t(g)] += std::pow(std::ldexp(1.0, (weight.scales[size_t(r * hidden / GROUP + g)] >> 10) - 15), 2);
  }
  const std::vector<float> mean = [&] {
    std::vector<float> squares;
    for (double error : errors) squares.push_back(float(error * 255 / 12 / double(rows)));
    return squares;
  }();
  std::vector<float> out(static_cast<size_t>(rows));
  int64_t exact = 0;
  call.errors = mean.data();
  call.rows = rows;
  call.x = x.data.data();
  call.tokens = 1;
  call.hidden = hidden;
  call.out = reinterpret_cast<char*>(out.data());
  call.exact = &exact;
  call.wanted = 1;
  run_screened(kernels, call, 2);
  report("screened " + what, expected, out, 0.1);
  const auto largest = std::max_element(expected.begin(), expected.end()) - expected.begin();
  const bool found = std::max_element(out.begin(), out.end()) - out.begin() == largest && exact >= 1 && exact < rows / 2;
  failures += !found;
  std::printf("%-4s the largest of %s, %d exact\n", found ? "ok" : "BAD", what.c_str(), int(exact));
  call.wanted = rows;
  run_screened(kernels, call, 2);
  report("screened, all wanted " + what, expected, out, 1e-2);
}

void check_read(const Kernels& kernels) {
  std::vector<char> bytes(4096, 1);
  const bool good = kernels.read_all(bytes.data(), 4096) == 512 * 0x0101010101010101u;
  failures += !good;
  std::printf("%-4s read %s\n", good ? "ok" : "BAD", kernels.name);
}

void check_core_counts(const Kernels& kernels, Type type) {
  const int64_t tokens = 9, neurons = 301;
  const double token_sparsity = 0.27;
  const Weight h = floats(tokens, neurons, type);
  std::vector<int64_t> counts(static_cast<size_t>(neurons));
  count_core_neurons(kernels, type, h.data.data(), tokens, neurons, token_sparsity, counts.data(), 2);
  const auto positives = std::count_if(h.values.begin(), h.values.end(), [](double value) { return value > 0; });
  const int64_t k = int64_t(token_sparsity * double(positives) / double(tokens));
  std::vector<double> expected(static_cast<size_t>(neurons));
  for (int64_t t = 0; t < tokens; ++t) {
    std::vector<int64_t> order(static_cast<size_t>(neurons));
    for (int64_t i = 0; i < neurons; ++i) order[size_t(i)] = i;
    const double* row = h.values.data() + t * neurons;
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return row[a] > row[b]; });
    for (int64_t i = 0; i < k; ++i) expected[size_t(order[size_t(i)])] += row[order[size_t(i)]] > 0;
  }
  report(std::string("core_counts ") + kernels.name + " " + NAMES[int(type)], expected,
         std::vector<float>(counts.begin(), counts.end()), 1e-9);
}

void check_typical_size(const Kernels& kernels, Type type) {
  const int64_t tokens = 130, neurons = 301;  // enough for two threads
  const Weight values = floats(tokens, neurons, type), norms = floats(1, neurons, Type::F32);
  std::vector<float> sums(static_cast<size_t>(neurons)), scale(static_cast<size_t>(neurons));
  sum_squares(kernels, type, values.data.data(), tokens, neurons, sums.data(), 2);
  const float* norm = reinterpret_cast<const float*>(norms.data.data());
  typical_scale(sums.data(), tokens, norm, 20, norm, neurons, scale.data());
  std::vector<double> squares(static_cast<size_t>(neurons)), expected(static_cast<size_t>(neurons));
  for (int64_t i = 0; i < tokens * neurons; ++i) squares[size_t(i % neurons)] += std::pow(values.values[size_t(i)], 2);
  for (size_t i = 0; i < size_t(neurons); ++i)
    expected[i] = std::sqrt((squares[i] + 20 * std::pow(norms.values[i], 2)) / (tokens + 20)) * norms.values[i];
  const std::string what = std::string(kernels.name) + " " + NAMES[int(type)];
  report("sum_of_squares " + what, squares, sums, 1e-6);
  report("typical_scale " + what, expected, scale, 1e-6);
}

void check_layer(const Kernels& kernels) {
  for (Type type : {Type::F32, Type::BF16, Type::F16, Type::Q8, Type::Q4}) {
    for (int64_t tokens : {1, 3, 11})
      for (int64_t hidden : {quantised(type) ? 32 : 7, 160})
        check_weighted_rows(kernels, type, tokens, hidden);
    check_attention(kernels, type, quantised(type) ? 24 : 22, 0, false, false);
    check_attention(kernels, type, quantised(type) ? 24 : 22, 20, true, false);
    check_attention(kernels, type, quantised(type) ? 24 : 22, 0, false, true);
    for (bool gated : {true, false}) check_dense_ffn(kernels, type, gated);
    check_by_up(kernels, type, true);
    check_by_up(kernels, type, false);
  }
  for (Type type : {Type::F32, Type::BF16, Type::F16}) check_core_counts(kernels, type);
  for (Type type : {Type::F32, Type::BF16, Type::F16}) check_typical_size(kernels, type);
  for (Type type : {Type::Q8, Type::Q4})
    for (Type float_type : {Type::F32, Type::BF16, Type::F16}) check_convert(kernels, type, float_type);
  for (int64_t hidden : {32, 96, 1056}) check_screened(kernels, hidden);
  check_read(kernels);
}

}  // namespace

int main() {
  const Kernels* variants[MAX_VARIANTS];
  const int count = usable_variants(variants);
  for (int v = 0; v < count; ++v) {
    check_layer(*variants[v]);
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
  }
  std::printf("%d variants, %d failures\n", count, failures);
  return failures == 0 ? 0 : 1;
}
