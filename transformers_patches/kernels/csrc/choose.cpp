// Choosing neurons for a token: what the candidates are worth, and which of them are kept.
#include "isa.h"
#include "variants.h"

namespace partinfer {
namespace PARTINFER_ISA {

// scores[p] = |values[p]| * size[row of p]
void score_candidates(const Rows& rows, const float* values, const float* size, float* scores) {
  const auto sized = [&](int64_t p, float worth) {
    scores[p] = bits_to_float(float_to_bits(values[p]) & 0x7fffffffu) * worth;
  };
  const int64_t prefix_end = smaller(rows.prefix, rows.end);
  for (int64_t p = rows.begin; p < prefix_end; ++p) sized(p, size[p]);
  for (int64_t p = rows.begin > prefix_end ? rows.begin : prefix_end; p < rows.end; ++p)
    sized(p, size[rows.index[p - rows.prefix]]);
}

namespace {

// Non-negative floats sort like their bits.
inline int64_t count_at_least(const float* scores, int64_t count, uint32_t least) {
  int32_t found = 0;
  for (int64_t i = 0; i < count; ++i) found += float_to_bits(scores[i]) >= least;
  return found;
}

struct Cut {
  float above;   // everything above it is kept,
  int64_t ties;  // and the first so many that equal it
};

// The k largest. The k-th is found bit by bit: counting what is larger than a guess takes a fraction of a microsecond
// for thousands of scores, without a branch that depends on them.
inline Cut cut_for(const float* scores, int64_t count, int64_t k) {
  if (k <= 0) return {bits_to_float(0x7f800000u), 0};
  if (k >= count) return {-1.0f, 0};
  uint32_t kth = 0;
  for (int bit = 30; bit >= 0; --bit) {
    const uint32_t guess = kth | 1u << bit;
    if (count_at_least(scores, count, guess) >= k) kth = guess;
  }
  return {bits_to_float(kth), k - count_at_least(scores, count, kth + 1)};
}

inline int64_t row_of(const Rows& rows, int64_t p) { return p < rows.prefix ? p : rows.index[p - rows.prefix]; }

}  // namespace

// A neuron whose score is 0 adds nothing and is never kept. Without branches on what is kept, which no processor could
// foresee: what is not kept is overwritten.
int64_t keep_candidates(const Rows& rows, const float* values, const float* scores, int64_t keep, float threshold,
                        int32_t* kept_rows, float* kept_values) {
  const Cut cut = keep < 0 ? Cut{threshold, 0} : cut_for(scores, rows.end, keep);
  int64_t ties = cut.above > 0.0f ? cut.ties : 0, kept = 0, p = 0;
#ifdef PARTINFER_COMPRESS
  const F above = set1(cut.above > 0.0f ? cut.above : 0.0f);
  for (const int64_t end = smaller(rows.prefix, rows.end); p + LANES <= end; p += LANES) {
    const F score = load(scores + p);
    Lanes chosen = larger(score, above);
    Lanes equal = ties > 0 ? same(score, above) : Lanes{0};
    for (; equal != 0 && ties > 0; equal &= Lanes(equal - 1), --ties) chosen |= Lanes(equal & -equal);
    kept += compress(chosen, int32_t(p), load(values + p), kept_rows + kept, kept_values + kept);
  }
#endif
  for (; p < rows.end; ++p) {
    const float s = scores[p];
    const bool tie = s == cut.above && ties > 0;
    ties -= tie;
    kept_rows[kept] = int32_t(row_of(rows, p));
    kept_values[kept] = values[p];
    kept += int64_t(s > cut.above && s != 0.0f) | int64_t(tie);
  }
  return kept;
}

}  // namespace PARTINFER_ISA
}  // namespace partinfer
