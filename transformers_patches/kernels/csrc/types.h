// What the drivers (threads.cpp) and the per-instruction-set kernels say to each other. Plain structs, no C++ library:
// inline functions of the standard library compiled with AVX-512 flags could be picked by the linker for every caller.
#pragma once

#include <cstdint>

namespace partinfer {

enum class Type : int32_t { F32, BF16, F16, Q8, Q4 };
// CLAMPED_SILU is that of gpt-oss: x / (1 + e^(-1.702 x)) of min(x, CLAMP).
enum class Activation : int32_t { SILU, GELU, GELU_TANH, RELU, RELU2, CLAMPED_SILU };
constexpr float CLAMP = 7.0f;

struct bf16_t {
  uint16_t bits;
};
struct f16_t {
  uint16_t bits;
};

constexpr int64_t GROUP = 32;       // columns that share one scale
constexpr int64_t MAX_TOKENS = 8;   // tokens per kernel call; the drivers split longer inputs
constexpr int64_t PAD = 64;         // every buffer that kernels read may be read this many elements past its end

// A weight of `rows` neuron-major rows. `scales` is only there for the quantised types: float16 [rows, H / 32].
struct Matrix {
  const char* data = nullptr;
  const uint16_t* scales = nullptr;
  int64_t row_bytes = 0;
  int64_t row_scales = 0;
};

// An 8-bit weight in two planes of 4 bits: 16 * (nibble of high - 8) + nibble of low, both with the rows of a 4-bit weight.
// `high` by itself is a coarse weight of half the bytes.
struct Planes {
  const char *high = nullptr, *low = nullptr;
  const uint16_t* scales = nullptr;
  int64_t row_bytes = 0, row_scales = 0;
};

// A vector in one of the float types, read element by element (biases).
struct Vector {
  const char* data = nullptr;
  Type type = Type::F32;
};

// Two neighbouring groups of a token's input once more: what rounding to 8 bits left of them, rounded to 8 bits. A few
// large values, behind a norm always in the same columns, decide how coarse their groups are.
struct alignas(64) FinePair {
  int8_t q[2 * GROUP];
  int32_t start[2 * GROUP / 4];  // what sums of four columns start from: minus what unsigned weights add too much
  int64_t group;                 // the first of the two
  float scales[2];
};
constexpr int64_t FINE_PAIRS = 2;  // for each token: those with the largest values

// The input [tokens, H], prepared once per call for the weights' type.
struct Input {
  int64_t tokens = 0;
  int64_t hidden = 0;
  const float* f32 = nullptr;     // [tokens, hidden]; float weights
  const bf16_t* bf16 = nullptr;   // [tokens, hidden] if the caller's input is bfloat16, else null
  const int8_t* q = nullptr;      // [tokens, q_stride] int8 of groups of 32; for Q4 first all low halves, then all high
  const float* scales = nullptr;  // [tokens, scale_stride]
  const float* corrections = nullptr;  // [tokens, scale_stride]: minus what unsigned weights add too much to a group
  int64_t q_stride = 0, scale_stride = 0;
  const FinePair* fine = nullptr;  // [tokens, FINE_PAIRS]; Q8 of two groups or more
};

// Positions [begin, end) of the active set: position p is row p below `prefix`, else row index[p - prefix].
struct Rows {
  int64_t prefix = 0;
  const int32_t* index = nullptr;
  int64_t begin = 0, end = 0;
};

// y[t] += sum over the positions of act(gate·x + bias) * (up·x + bias) * down, all of one thread.
struct FfnTask {
  Type type = Type::F32;
  // up.data is null for the plain FFN (gate is fc1, down is fc2 transposed); gate.data is null too if h is known.
  Matrix gate, up, down;
  Vector gate_bias, up_bias;
  Activation activation = Activation::SILU;
  Rows rows;
  Input x;
  // [tokens, value_stride]: up·x of every position, already known, so that `up` is not read; without a gate either, h itself
  const float* up_values = nullptr;
  int64_t value_stride = 0;
  // [rows of the weights] or null: of one token, only rows of down with |h| * size above the threshold are read
  const float* down_size = nullptr;
  float down_threshold = 0.0f;
  int64_t* down_read = nullptr;      // with down_size: how many, added up by all threads
  float* y = nullptr;                // [tokens, y_stride], in the kernel's own column order
  int64_t y_stride = 0;
};

// out[t, p] = weight[row of p]·x[t] + bias[row of p]
struct LinearTask {
  Type type = Type::F32;
  Matrix weight;
  Vector bias;
  Rows rows;
  Input x;
  char* out = nullptr;  // [tokens, out_stride] of out_type
  Type out_type = Type::F32;
  int64_t out_stride = 0;
};

// out[t, j] = sum over all y, columns [begin, end) (multiples of COLUMN_BLOCK, or the end).
struct FinishTask {
  Type type = Type::F32;
  const float* y = nullptr;
  int64_t sums = 1, sum_stride = 0, y_stride = 0;
  int64_t tokens = 0, hidden = 0, begin = 0, end = 0;
  const float* column_scales = nullptr;  // [hidden] or null, of quantised weights: what the columns are multiplied with
  char* out = nullptr;  // [tokens, hidden]
  Type out_type = Type::F32;
};

// Rows [begin, end) of floats [rows, hidden] to a quantised type, or back.
struct ConvertTask {
  Type type = Type::Q8;
  char* floats = nullptr;
  Type float_type = Type::F32;
  char* data = nullptr;
  uint16_t* scales = nullptr;
  int64_t row_bytes = 0, row_scales = 0;  // from a row to the next, of data and scales
  int64_t hidden = 0, begin = 0, end = 0;
  const float* column_weights = nullptr;  // [hidden] or null: what the errors of a column count
};

// An RMSNorm, or with a bias a LayerNorm. Both are of the type of what they are applied to.
struct Norm {
  const char *weight = nullptr, *bias = nullptr;
  float eps = 0.0f;
};

// sum = x + delta (rounded to the type; delta may be null, and sum too then), out = the norm of sum; all [count].
struct NormTask {
  Type type;
  const char *x, *delta;
  char* sum;
  Norm norm;
  int64_t count;
  char* out;
};

// Some positions of softmax(scale * keys·q[t]) * values, for the query heads of one key-value head:
// highest[t] = the highest keys·q[t], total[t] = sum of exp(scale * (keys·q[t] - highest[t])), out[t] = sum of the values
// multiplied with these. The parts of all positions together give the softmax.
struct AttendTask {
  Type type = Type::F32;  // of keys and values [positions, head_dim]
  const char *keys = nullptr, *values = nullptr;
  int64_t begin = 0, end = 0, head_dim = 0;
  Input q;  // a query head is a token
  float scale = 1.0f;
  float* scores = nullptr;  // [tokens, score_stride], to work in
  int64_t score_stride = 0;
  float* y = nullptr;  // [tokens, y_stride], to work in: whole vectors are written, past head_dim too
  int64_t y_stride = 0;
  float* out = nullptr;  // [tokens, head_dim]
  float *highest = nullptr, *total = nullptr;  // [tokens]
};

constexpr int64_t COLUMN_BLOCK = 128;  // columns are reordered only inside blocks of this many

constexpr int64_t KEEP_ROOM = 16;

// Values are counted by how far they lie below the largest: band 0 is FIRST_BAND wide, the others BAND, and the last one
// has all the rest.
constexpr int BANDS = 25;
constexpr float FIRST_BAND = 2.0f, BAND = 0.75f;

// One instruction set's kernels. Single-threaded; threads.cpp shares the work out.
struct Kernels {
  const char* name;
  void (*ffn_float)(const FfnTask&);
  void (*linear_float)(const LinearTask&);
  void (*finish_float)(const FinishTask&);
  void (*widen)(Type from, const char* values, int64_t count, float* out);
  uint64_t (*read_all)(const char* data, int64_t bytes);  // the sum, for the bandwidth probe
  void (*norm)(const NormTask&);
  void (*rotate)(Type type, char* head, const float* cosine, const float* sine, int64_t head_dim);
  void (*attend)(const AttendTask&);
  // gate = activation(gate) * up; up may be null, and counts as 1 then
  void (*gate_values)(Activation, float* gate, const float* up, int64_t count);
  // scores[p] = |values[p]| * size[row of p], for the positions of `rows`
  void (*score_candidates)(const Rows& rows, const float* values, const float* size, float* scores);
  // The rows and values of the `keep` best of positions 0 … rows.end - 1 (keep below 0: of all above `threshold`), in
  // order, with room for KEEP_ROOM more than there are positions. Returns how many.
  int64_t (*keep_candidates)(const Rows& rows, const float* values, const float* scores, int64_t keep, float threshold,
                             int32_t* kept_rows, float* kept_values);
  float (*largest)(const float* values, int64_t count);
  void (*count_bands)(const float* values, int64_t count, float top, int64_t* counts);  // counts[band] += how many
  int64_t (*count_positive)(Type, const char* values, int64_t count);  // how many values are above 0
  // marks[i] += 1 for the k largest of the values above 0, of equal ones the first; space: [count]
  void (*mark_largest)(Type, const char* values, int64_t count, int64_t k, uint32_t* space, int32_t* marks);
  // sums[i] += rows[r][i]^2 for [count, columns] of rows that are `stride` values apart
  void (*add_squares)(Type, const char* rows, int64_t count, int64_t stride, int64_t columns, float* sums);
  const bool* bf16_input;  // whether bfloat16 weights are multiplied with a raw bfloat16 input
  void (*ffn_quant)(const FfnTask&);
  void (*linear_quant)(const LinearTask&);
  void (*finish_quant)(const FinishTask&);
  // x [tokens, hidden] -> int8, scales and corrections, in the strides of `layout`, and fine pairs if they are wanted.
  void (*prepare_quant)(Type weights, const float* x, int64_t tokens, int64_t hidden, const Input& layout, int8_t* q,
                        float* scales, float* corrections, FinePair* fine);
  void (*quantise_rows)(const ConvertTask&);
  void (*dequantise_rows)(const ConvertTask&);
  // out[i] += row rows[i] of a weight in planes times the fine pairs of a token
  void (*add_fine)(const Planes&, const int32_t* rows, int64_t count, const FinePair* pairs, float* out);
  // The first `count` rows of a weight in planes as a Q8 weight has them, `stride` bytes apart.
  void (*join_rows)(const Planes&, int64_t hidden, int64_t count, int8_t* out, int64_t stride);
};

static inline int64_t element_size(Type type) { return type == Type::F32 ? 4 : 2; }

}  // namespace partinfer
