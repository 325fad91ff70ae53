#include "screened.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "input.h"
#include "shares.h"

namespace partinfer {
namespace {

constexpr int64_t PIECE = 4 * COLUMN_BLOCK;  // outputs that a thread takes at once after the screening

// A low nibble is 0 … 15 and unknown to the coarse weight, so it counts as 7.5 there, and what is added later is the rest:
// weight = 16 (high - 8) + low = 16 (high - 8 + 7.5 / 16) + (low - 7.5).
constexpr float LOW_MIDDLE = 7.5f, HIGH_UNIT = 16.0f;

// Where only the largest output matters, what is less than so many standard deviations of an output's error below it is
// computed again. For a mistake two errors would have to differ by as much: 5.7 standard deviations of a difference.
constexpr float DEVIATIONS = 8.0f;
// The same below the k-th of several: there only the least likely of them could be taken for another.
constexpr float DEVIATIONS_OF_SEVERAL = 4.0f;

// The input of a 4-bit weight of unit * (nibble - offset), from that of one of nibble - 8.
Input with_offset(const Input& x, float unit, float offset, Scratch& scratch) {
  Input out = x;
  float* scales = scratch.take<float>(x.scale_stride);
  float* corrections = scratch.take<float>(x.scale_stride);
  for (int64_t g = 0; g < x.scale_stride; ++g) {
    scales[g] = x.scales[g] * unit;
    corrections[g] = x.corrections[g] * (unit * offset / 8.0f);
  }
  out.scales = scales;
  out.corrections = corrections;
  return out;
}

// The expected square of a coarse output's error.
float error_of(const ScreenedCall& call, const Input& x) {
  double error = 0.0;
  for (int64_t g = 0; g < call.hidden / GROUP; ++g) {
    float squares = 0.0f;
    for (int64_t j = g * GROUP; j < (g + 1) * GROUP; ++j) squares += x.f32[j] * x.f32[j];
    error += double(squares) * call.errors[g];
  }
  return float(error);
}

// How far below the largest coarse output the bands up to `band` end.
float end_of(int band) { return FIRST_BAND + BAND * float(band); }

// How far below the largest coarse output the exact ones begin where `wanted` of them have to be right.
float depth_of_largest(int64_t wanted, float error, const int64_t* counts) {
  int band = 0;
  for (int64_t found = counts[0]; found < wanted && band < BANDS - 1; found += counts[++band]) {}
  return wanted == 1 ? DEVIATIONS * std::sqrt(error) : end_of(band) + DEVIATIONS_OF_SEVERAL * std::sqrt(error);
}

// The same where it is about the softmax. An output with an error of variance v makes its probability wrong by a factor
// whose expected KL divergence is v / 2, so what stays rough may have a share of 2 tolerance / v.
float depth_of_softmax(const ScreenedCall& call, float error, const int64_t* counts) {
  const double temperature = call.temperature;
  double mass[BANDS], total = 0.0;
  for (int band = 0; band < BANDS; ++band) {
    const double middle = band > 0 ? end_of(band) - 0.5 * BAND : 0.5 * FIRST_BAND;
    mass[band] = double(counts[band]) * std::exp(-middle / temperature);
    total += mass[band];
  }
  int exact = BANDS - 1;  // bands before it
  for (double rough = mass[exact]; exact > 1; rough += mass[--exact])
    if ((rough + mass[exact - 1]) * error > 2.0 * call.tolerance * temperature * temperature * total) break;
  return end_of(exact - 1);
}

// What all threads of a region share; the vectors are the caller's.
struct Screening {
  const ScreenedCall& call;
  LinearTask high;   // of the high plane, to `values`
  LinearTask finer;  // of the low plane, or of the whole weight
  const FinePair* fine = nullptr;
  float error = 0.0f;
  float* values = nullptr;  // [rows]
  char* out = nullptr;
  std::vector<float> tops;      // [threads]
  std::vector<int64_t> counts;  // [threads, BANDS]
  std::vector<int64_t> exact;   // [threads]
};

void prefetch_bytes(const void* data, int64_t bytes) {
  const char* first = static_cast<const char*>(data);
  const char* line = first - (reinterpret_cast<uintptr_t>(first) & 63);
  for (; line < first + bytes; line += 64) __builtin_prefetch(line, 0, 2);
}

// Rows lie anywhere: all of them are asked for before the first is waited for.
void prefetch_rows(const Screening& screening, const int32_t* rows, int64_t count) {
  const ScreenedCall& call = screening.call;
  const Planes& planes = call.planes;
  if (planes.low == nullptr) return;  // long rows
  for (int64_t i = 0; i < count; ++i) {
    prefetch_bytes(planes.low + rows[i] * planes.row_bytes, call.hidden / 2);
    prefetch_bytes(planes.scales + rows[i] * planes.row_scales, call.hidden / GROUP * 2);
    for (int e = 0; screening.fine != nullptr && e < FINE_PAIRS; ++e)
      prefetch_bytes(planes.high + rows[i] * planes.row_bytes + screening.fine[e].group * GROUP / 2, GROUP);
  }
}

// The outputs of a range: those of at least `least` exactly, all as they go out. Returns how many were.
int64_t finish_range(const Kernels& kernels, const Screening& screening, Range range, float least) {
  int32_t rows[PIECE];
  float exact[PIECE];
  int64_t count = 0;
  for (int64_t i = range.begin; i < range.end; ++i) {
    rows[count] = int32_t(i);
    count += screening.values[i] >= least;
  }
  if (count > 0) {
    const bool planes = screening.call.planes.low != nullptr;
    prefetch_rows(screening, rows, count);
    LinearTask task = screening.finer;
    task.rows = {0, rows, 0, count};
    task.out = reinterpret_cast<char*>(exact);
    task.out_stride = PIECE;
    (planes ? kernels.linear_quant : kernels.linear_float)(task);
    if (screening.fine != nullptr) kernels.add_fine(screening.call.planes, rows, count, screening.fine, exact);
    for (int64_t i = 0; i < count; ++i) screening.values[rows[i]] = exact[i] + (planes ? screening.values[rows[i]] : 0.0f);
  }
  FinishTask task;
  task.y = screening.values;
  task.tokens = 1;
  task.hidden = screening.call.rows;
  task.begin = range.begin;
  task.end = range.end;
  task.out = screening.out;
  task.out_type = screening.call.x_type;
  kernels.finish_float(task);
  return count;
}

void screen(const Kernels& kernels, Screening& screening, Taken& coarse, Taken& pieces, int worker, int workers,
            int computing) {
  const ScreenedCall& call = screening.call;
  const bool computes = worker < computing;
  if (computes) {
    const int64_t row_bytes = call.planes.row_bytes;
    float top = -INFINITY;
    rows_of_thread(split(call.rows, row_bytes, call.rows * row_bytes, computing), coarse, worker, computing,
                   [&](Range range) {
                     if (range.begin >= range.end) return;
                     LinearTask task = screening.high;
                     task.rows.begin = range.begin;
                     task.rows.end = range.end;
                     kernels.linear_quant(task);
                     top = std::max(top, kernels.largest(screening.values + range.begin, range.end - range.begin));
                   });
    screening.tops[size_t(worker)] = top;
  }
  wait_for_all(workers);
  const float top = *std::max_element(screening.tops.begin(), screening.tops.begin() + computing);
  const Range mine = computes ? share(call.rows, ROW_BLOCK, worker, computing) : Range{0, 0};
  if (call.wanted != 1) {
    if (computes)
      kernels.count_bands(screening.values + mine.begin, mine.end - mine.begin, top,
                           &screening.counts[size_t(worker) * BANDS]);
    wait_for_all(workers);
  }
  if (!computes) return;
  int64_t counts[BANDS] = {};
  for (int other = 0; other < computing; ++other)
    for (int band = 0; band < BANDS; ++band) counts[band] += screening.counts[size_t(other) * BANDS + size_t(band)];
  const float least = top - (call.wanted > 0 ? depth_of_largest(call.wanted, screening.error, counts)
                                             : depth_of_softmax(call, screening.error, counts));
  pieces.share_out((call.rows + PIECE - 1) / PIECE, [&](int64_t number) {
    const Range range{number * PIECE, std::min(call.rows, (number + 1) * PIECE)};
    screening.exact[size_t(worker)] += finish_range(kernels, screening, range, least);
  });
}

}  // namespace

void run_screened(const Kernels& kernels, const ScreenedCall& call, int threads) {
  static thread_local Scratch scratch;
  const int useful = useful_threads(call.rows * call.planes.row_bytes, threads);
  for (int64_t token = 0; token < call.tokens; ++token) {
    scratch.reserve(2 * input_bytes(1, call.hidden) + 4 * Scratch::padded(size_t(call.hidden / GROUP + PAD) * sizeof(float)) +
                    Scratch::padded(size_t(call.rows) * sizeof(float)));
    const Input x = prepare(kernels, Type::Q4, call.x, call.x_type, token, 1, call.hidden, scratch);
    Screening screening{call};
    screening.error = error_of(call, x);
    screening.values = scratch.take<float>(call.rows);
    const auto task_of = [&](Type type, const Matrix& weight, const Input& input) {
      LinearTask task;
      task.type = type;
      task.weight = weight;
      task.rows = {call.rows, nullptr, 0, call.rows};
      task.x = input;
      task.out = reinterpret_cast<char*>(screening.values);
      task.out_stride = call.rows;
      return task;
    };
    const auto plane = [&](const char* data) {
      return Matrix{data, call.planes.scales, call.planes.row_bytes, call.planes.row_scales};
    };
    const float high_offset = 8.0f - LOW_MIDDLE / HIGH_UNIT;
    screening.high = task_of(Type::Q4, plane(call.planes.high), with_offset(x, HIGH_UNIT, high_offset, scratch));
    if (call.planes.low != nullptr) {
      screening.finer = task_of(Type::Q4, plane(call.planes.low), with_offset(x, 1.0f, LOW_MIDDLE, scratch));
      screening.fine = prepare(kernels, Type::Q8, call.x, call.x_type, token, 1, call.hidden, scratch).fine;
    } else {
      screening.finer = task_of(call.whole_type, call.whole,
                                prepare(kernels, call.whole_type, call.x, call.x_type, token, 1, call.hidden, scratch));
    }
    screening.out = call.out + token * call.rows * element_size(call.x_type);
    screening.tops.assign(size_t(useful), -INFINITY);
    screening.counts.assign(size_t(useful) * BANDS, 0);
    screening.exact.assign(size_t(useful), 0);
    Taken coarse, pieces;
    parallel(useful, [&](int worker, int workers) {
      screen(kernels, screening, coarse, pieces, worker, workers, std::min(useful, workers));
    });
    int64_t exact = 0;
    for (int64_t part : screening.exact) exact += part;
    call.exact[token] = exact;
  }
}

}  // namespace partinfer
