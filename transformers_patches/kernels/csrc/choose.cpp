// Choosing neurons, for a token or a prompt: what the candidates are worth, and which of them are kept. And what choosing
// among the rows of a screened weight asks of their values.
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

// Non-negative floats sort like their bits. Blocks, because what counts 16-bit keys has 16 bits itself: then the
// compiler compares and adds as many keys at once as a register holds.
template <class Key, class Keys>
inline int64_t count_at_least(const Keys& key_at, int64_t count, Key least) {
  constexpr int64_t BLOCK = 32768;
  int64_t total = 0;
  for (int64_t start = 0; start < count; start += BLOCK) {
    const int64_t end = smaller(count, start + BLOCK);
    Key found = 0;
    for (int64_t i = start; i < end; ++i) found = Key(found + Key(key_at(i) >= least));
    total += found;
  }
  return total;
}

// The k-th largest of keys below 2^BITS; 0 if there are no k above 0. It is found bit by bit: counting what is larger
// than a guess takes a fraction of a microsecond for thousands of keys, without a branch that depends on them.
template <int BITS, class Key, class Keys>
inline Key kth_largest(const Keys& key_at, int64_t count, int64_t k) {
  Key kth = 0;
  for (int bit = BITS - 1; bit >= 0; --bit) {
    const Key guess = Key(kth | Key(1) << bit);
    if (count_at_least(key_at, count, guess) >= k) kth = guess;
  }
  return kth;
}

struct Cut {
  float above;   // everything above it is kept,
  int64_t ties;  // and the first so many that equal it
};

// The k largest of non-negative scores.
inline Cut cut_for(const float* scores, int64_t count, int64_t k) {
  if (k <= 0) return {bits_to_float(0x7f800000u), 0};
  if (k >= count) return {-1.0f, 0};
  const auto key_at = [scores](int64_t i) { return float_to_bits(scores[i]); };
  const uint32_t kth = kth_largest<31, uint32_t>(key_at, count, k);
  return {bits_to_float(kth), k - count_at_least(key_at, count, kth + 1)};
}

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
    kept_rows[kept] = int32_t(row_number(rows, p));
    kept_values[kept] = values[p];
    kept += int64_t(s > cut.above && s != 0.0f) | int64_t(tie);
  }
  return kept;
}

float largest(const float* values, int64_t count) {
  constexpr int AT_ONCE = 64;  // as many independent maxima, so that the compiler keeps vectors of them
  float most[AT_ONCE];
  for (int j = 0; j < AT_ONCE; ++j) most[j] = bits_to_float(0xff800000u);
  int64_t i = 0;
  for (; i + AT_ONCE <= count; i += AT_ONCE)
    for (int j = 0; j < AT_ONCE; ++j) most[j] = values[i + j] > most[j] ? values[i + j] : most[j];
  for (; i < count; ++i) most[0] = values[i] > most[0] ? values[i] : most[0];
  for (int j = 1; j < AT_ONCE; ++j) most[0] = most[j] > most[0] ? most[j] : most[0];
  return most[0];
}

void count_bands(const float* values, int64_t count, float top, int64_t* counts) {
  constexpr int64_t PIECE = 1024;
  constexpr int TABLES = 4;  // neighbours often share a band, and a count has to be written before it is read again
  int32_t bands[PIECE], tables[TABLES][BANDS] = {};
  for (int64_t start = 0; start < count; start += PIECE) {
    const int64_t here = smaller(PIECE, count - start);
    for (int64_t i = 0; i < here; ++i) {
      float band = (top - FIRST_BAND - values[start + i]) * (1.0f / BAND) + 1.0f;
      band = band > 0.0f ? band : 0.0f;
      bands[i] = int32_t(band < float(BANDS - 1) ? band : float(BANDS - 1));
    }
    for (int64_t i = 0; i < here; ++i) ++tables[i % TABLES][bands[i]];
  }
  for (int t = 0; t < TABLES; ++t)
    for (int band = 0; band < BANDS; ++band) counts[band] += tables[t][band];
}

namespace {

// Bits of floats above 0, 0 for all others.
inline uint32_t key_of(float value) { return value > 0.0f ? float_to_bits(value) : 0; }
inline uint16_t key_of(bf16_t value) { return value.bits > 0x7f80u ? uint16_t(0) : value.bits; }
inline uint16_t key_of(f16_t value) { return value.bits > 0x7c00u ? uint16_t(0) : value.bits; }

template <class T, class Key>
inline void mark(const T* values, int64_t count, int64_t k, Key* keys, int32_t* marks) {
  for (int64_t i = 0; i < count; ++i) keys[i] = key_of(values[i]);
  const auto key_at = [keys](int64_t i) { return keys[i]; };
  const Key kth = kth_largest<8 * sizeof(Key) - 1, Key>(key_at, count, k);
  const Key least = kth == 0 ? 1 : kth;
  int64_t excess = count_at_least(key_at, count, least) - k;  // so many of the last that equal the k-th are too many
  for (int64_t i = 0; i < count; ++i) marks[i] += keys[i] >= least;
  constexpr int64_t BLOCK = 64;  // most have none of them, which vectors see
  for (int64_t end = count; excess > 0;) {
    const int64_t start = end > BLOCK ? end - BLOCK : 0;
    Key equal = 0;
    for (int64_t i = start; i < end; ++i) equal = Key(equal + Key(keys[i] == kth));
    for (int64_t i = end - 1; equal > 0 && excess > 0 && i >= start; --i) {
      const bool tie = keys[i] == kth;
      marks[i] -= tie;
      excess -= tie;
    }
    end = start;
  }
}

template <class T>
inline int64_t positives(const T* values, int64_t count) {
  return count_at_least([values](int64_t i) { return key_of(values[i]); }, count, decltype(key_of(*values))(1));
}

}  // namespace

int64_t count_positive(Type type, const char* values, int64_t count) {
  switch (type) {
    case Type::BF16:
      return positives(reinterpret_cast<const bf16_t*>(values), count);
    case Type::F16:
      return positives(reinterpret_cast<const f16_t*>(values), count);
    default:
      return positives(reinterpret_cast<const float*>(values), count);
  }
}

void mark_largest(Type type, const char* values, int64_t count, int64_t k, uint32_t* space, int32_t* marks) {
  uint16_t* short_keys = reinterpret_cast<uint16_t*>(space);
  switch (type) {
    case Type::BF16:
      return mark(reinterpret_cast<const bf16_t*>(values), count, k, short_keys, marks);
    case Type::F16:
      return mark(reinterpret_cast<const f16_t*>(values), count, k, short_keys, marks);
    default:
      return mark(reinterpret_cast<const float*>(values), count, k, space, marks);
  }
}

namespace {

// sums[i] += values[i]^2 of R rows
template <int R, class T>
inline void add_squares_of(const T* rows, int64_t stride, int64_t count, float* sums) {
  for (int64_t i = 0; i < count; i += LANES) {
    F sum = load_part(sums + i, count - i);
    PARTINFER_UNROLL
    for (int r = 0; r < R; ++r) {
      const F value = load_part(rows + r * stride + i, count - i);
      sum = fma(value, value, sum);
    }
    store_part(sums + i, sum, count - i);
  }
}

// Four rows at a time, so that sums are read and written less often than values.
template <class T>
inline void add_all_squares(const T* rows, int64_t count, int64_t stride, int64_t columns, float* sums) {
  int64_t r = 0;
  for (; r + 4 <= count; r += 4) add_squares_of<4>(rows + r * stride, stride, columns, sums);
  for (; r < count; ++r) add_squares_of<1>(rows + r * stride, stride, columns, sums);
}

}  // namespace

void add_squares(Type type, const char* rows, int64_t count, int64_t stride, int64_t columns, float* sums) {
  switch (type) {
    case Type::BF16:
      return add_all_squares(reinterpret_cast<const bf16_t*>(rows), count, stride, columns, sums);
    case Type::F16:
      return add_all_squares(reinterpret_cast<const f16_t*>(rows), count, stride, columns, sums);
    default:
      return add_all_squares(reinterpret_cast<const float*>(rows), count, stride, columns, sums);
  }
}

}  // namespace PARTINFER_ISA
}  // namespace partinfer
