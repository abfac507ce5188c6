// The vector body of quantize_i8; each variant compiles it for its instruction set.
#pragma once

#include "ops/quantize_i8/quantize_i8.hpp"
#include "ops/vec.hpp"

namespace lilliput {
namespace {

typedef int8_t Bytes16 __attribute__((vector_size(16)));
typedef int32_t Ints8 __attribute__((vector_size(32)));
typedef int32_t Ints4 __attribute__((vector_size(16)));

// Sixteen whole numbers to one by `fold(a, b)` of halves; their order is no matter.
template <class Fold>
LILLIPUT_INLINE int32_t folded(Ints v, Fold fold) {
  Ints8 half[2];
  std::memcpy(half, &v, sizeof half);
  half[0] = fold(half[0], half[1]);
  Ints4 quarter[2];
  std::memcpy(quarter, half, sizeof quarter);
  int32_t lane[4];
  quarter[0] = fold(quarter[0], quarter[1]);
  std::memcpy(lane, quarter, sizeof lane);
  return fold(fold(lane[0], lane[1]), fold(lane[2], lane[3]));
}

// Sixteen inputs from `from`, or the `left` that there are and zeros.
LILLIPUT_INLINE Floats load_some(const float* from, int64_t left) {
  if (left >= kLanes) return load(from);
  float lane[kLanes] = {};
  for (int64_t i = 0; i < left; ++i) lane[i] = from[i];
  return load(lane);
}

LILLIPUT_INLINE void quantize_i8_body(const float* x, int64_t columns, int64_t group, int8_t* codes, float* scale,
                                      int32_t* sum) {
  for (int64_t begin = 0, g = 0; begin < columns; begin += group, ++g) {
    const int64_t end = columns - begin < group ? columns : begin + group;
    Ints most{};
    for (int64_t k = begin; k < end; k += kLanes) {
      const Ints bits = (Ints)(as_words(load_some(x + k, end - k)) & 0x7fffffffu);
      most = bits > most ? bits : most;
    }
    const int32_t top = folded(most, [](auto a, auto b) __attribute__((always_inline)) { return a > b ? a : b; });
    float largest;
    std::memcpy(&largest, &top, sizeof top);
    float s = largest / 127.0f;
    if (s < 0x1p-126f) s = 0;
    const bool finite = top < 0x7f800000;
    scale[g] = finite ? s : __builtin_nanf("");
    if (!finite || s == 0) {
      sum[g] = 0;
      std::memset(codes + begin, 0, static_cast<size_t>(end - begin));
      continue;
    }
    Ints total_codes{};
    for (int64_t k = begin; k < end; k += kLanes) {
      const Floats rounded = load_some(x + k, end - k) / spread(s) + 12582912.0f;
      const Ints q = (Ints)(as_words(rounded) - 0x4b400000u);
      total_codes += q;
      const Bytes16 bytes = __builtin_convertvector(q, Bytes16);
      if (end - k >= kLanes) {
        std::memcpy(codes + k, &bytes, sizeof bytes);
      } else {
        int8_t part[kLanes];
        std::memcpy(part, &bytes, sizeof part);
        for (int64_t i = 0; i < end - k; ++i) codes[k + i] = part[i];
      }
    }
    sum[g] = folded(total_codes, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
  }
  for (int64_t k = columns; k < quantized_stride(columns); ++k) codes[k] = 0;
}

}  // namespace
}  // namespace lilliput
