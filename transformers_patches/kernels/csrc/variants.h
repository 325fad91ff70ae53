// The entry points that every variant compiles, declared in its own namespace.
#pragma once

#include "types.h"

#define PARTINFER_DECLARE_FLOAT(isa)       \
  namespace partinfer {                    \
  namespace isa {                          \
  void ffn_float(const FfnTask&);          \
  void linear_float(const LinearTask&);    \
  void finish_float(const FinishTask&);    \
  void widen(Type, const char*, int64_t, float*); \
  uint64_t read_all(const char*, int64_t);        \
  void norm(const NormTask&);              \
  void rotate(Type, char*, const float*, const float*, int64_t);  \
  void attend(const AttendTask&);          \
  void gate_values(Activation, float*, const float*, int64_t);    \
  void score_candidates(const Rows&, const float*, const float*, float*);  \
  int64_t keep_candidates(const Rows&, const float*, const float*, int64_t, float, int32_t*, float*);  \
  float largest(const float*, int64_t);    \
  void count_bands(const float*, int64_t, float, int64_t*);  \
  int64_t count_positive(Type, const char*, int64_t);  \
  void mark_largest(Type, const char*, int64_t, int64_t, uint32_t*, int32_t*);  \
  void add_squares(Type, const char*, int64_t, int64_t, int64_t, float*);  \
  extern const bool bf16_input;            \
  }                                        \
  }

#define PARTINFER_DECLARE_QUANT(isa)                                        \
  namespace partinfer {                                                     \
  namespace isa {                                                           \
  void ffn_quant(const FfnTask&);                                           \
  void linear_quant(const LinearTask&);                                     \
  void finish_quant(const FinishTask&);                                     \
  void prepare_quant(Type, const float*, int64_t, int64_t, const Input&, int8_t*, float*, float*, FinePair*); \
  void quantise_rows(const ConvertTask&);                                   \
  void dequantise_rows(const ConvertTask&);                                 \
  void add_fine(const Planes&, const int32_t*, int64_t, const FinePair*, float*);  \
  void join_rows(const Planes&, int64_t, int64_t, int8_t*, int64_t);  \
  }                                                                         \
  }

#ifdef PARTINFER_ISA
PARTINFER_DECLARE_FLOAT(PARTINFER_ISA)
PARTINFER_DECLARE_QUANT(PARTINFER_ISA)
#endif
