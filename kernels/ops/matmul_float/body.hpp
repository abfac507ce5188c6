// The portable body of matmul_float; each variant compiles it for its instruction set and block of tokens.
#pragma once

#include "ops/matmul_float/matmul_float.hpp"
#include "ops/vec.hpp"

namespace lilliput {
namespace {

struct AsF32 {
  typedef float Stored;
  LILLIPUT_INLINE Floats many(const Stored* from) { return load(from); }
  LILLIPUT_INLINE float one(Stored value) { return value; }
};

struct AsF16 {
  typedef uint16_t Stored;
  LILLIPUT_INLINE Floats many(const Stored* from) { return widen_half(from); }
  LILLIPUT_INLINE float one(Stored value) { return widen_half_1(value); }
};

struct AsBf16 {
  typedef uint16_t Stored;
  LILLIPUT_INLINE Floats many(const Stored* from) { return widen_bfloat(from); }
  LILLIPUT_INLINE float one(Stored value) { return widen_bfloat_1(value); }
};

template <class As, int Block>
LILLIPUT_INLINE void dot_rows(const typename As::Stored* w, int64_t columns, const float* x, int64_t ldx, float* y,
                              int64_t ldy) {
  Floats sum[Block];
  for (int t = 0; t < Block; ++t) sum[t] = Floats{};
  int64_t k = 0;
  for (; k + kLanes <= columns; k += kLanes) {
    const Floats part = As::many(w + k);
    for (int t = 0; t < Block; ++t) sum[t] += load(x + t * ldx + k) * part;
  }
  for (int t = 0; t < Block; ++t) {
    if (k < columns) {  // the tail goes on in the lanes it belongs to
      float lane[kLanes];
      store(lane, sum[t]);
      for (int64_t l = 0; k + l < columns; ++l) lane[l] += x[t * ldx + k + l] * As::one(w[k + l]);
      sum[t] = load(lane);
    }
    y[t * ldy] = total(sum[t]);
  }
}

template <class As, int Block>
LILLIPUT_INLINE void matmul_float_as(const FloatView& w, const float* x, int64_t tokens, int64_t ldx, float* y,
                                     int64_t ldy, int64_t row_begin, int64_t row_end) {
  const auto* data = static_cast<const typename As::Stored*>(w.data);
  constexpr int64_t kRows = 16;  // rows that stay in the cache while the blocks of tokens pass
  for (int64_t base = row_begin; base < row_end; base += kRows) {
    const int64_t stop = row_end - base < kRows ? row_end : base + kRows;
    int64_t t = 0;
    for (; t + Block <= tokens; t += Block)
      for (int64_t n = base; n < stop; ++n)
        dot_rows<As, Block>(data + n * w.columns, w.columns, x + t * ldx, ldx, y + t * ldy + n, ldy);
    for (; t < tokens; ++t)
      for (int64_t n = base; n < stop; ++n)
        dot_rows<As, 1>(data + n * w.columns, w.columns, x + t * ldx, ldx, y + t * ldy + n, ldy);
  }
}

template <int Block>
LILLIPUT_INLINE void matmul_float_body(const FloatView& w, const float* x, int64_t tokens, int64_t ldx, float* y,
                                       int64_t ldy, int64_t row_begin, int64_t row_end) {
  switch (w.dtype) {
    case Dtype::f32: return matmul_float_as<AsF32, Block>(w, x, tokens, ldx, y, ldy, row_begin, row_end);
    case Dtype::f16: return matmul_float_as<AsF16, Block>(w, x, tokens, ldx, y, ldy, row_begin, row_end);
    case Dtype::bf16: return matmul_float_as<AsBf16, Block>(w, x, tokens, ldx, y, ldy, row_begin, row_end);
  }
}

}  // namespace
}  // namespace lilliput
