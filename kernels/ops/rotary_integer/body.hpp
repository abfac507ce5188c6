#pragma once

#include "ops/rotary_integer/rotary_integer.hpp"

namespace lilliput {
namespace {

LILLIPUT_INLINE void rotary_integer_body(const IntegerRotary& how, const int16_t* cos, const int16_t* sin, const void* x,
                                         int64_t heads, void* y) {
  const int64_t half = how.dim / 2;
  alignas(64) int32_t a[kCodes], b[kCodes];
  alignas(64) int64_t first[kCodes], second[kCodes];
  const auto turn = static_cast<uint64_t>(how.turned.shift), plain = static_cast<uint64_t>(how.plain.shift);
  for (int64_t head = 0; head < heads; ++head) {
    const int64_t base = head * how.head_dim;
    for (int64_t at = 0; at < half; at += kCodes) {
      const int64_t count = half - at < kCodes ? half - at : kCodes;
      read_codes(x, how.x, base + at, count, a);
      read_codes(x, how.x, base + at + half, count, b);
      const int16_t *c = cos + at, *s = sin + at;
      if (how.x.bits == 8) {  // the sums fit in 32 bits
        for (int64_t i = 0; i < count; ++i) first[i] = int64_t{a[i] * c[i] - b[i] * s[i]} * how.turned.multiplier;
        for (int64_t i = 0; i < count; ++i) second[i] = int64_t{b[i] * c[i] + a[i] * s[i]} * how.turned.multiplier;
      } else {
        for (int64_t i = 0; i < count; ++i)
          first[i] = (int64_t{a[i]} * c[i] - int64_t{b[i]} * s[i]) * how.turned.multiplier;
        for (int64_t i = 0; i < count; ++i)
          second[i] = (int64_t{b[i]} * c[i] + int64_t{a[i]} * s[i]) * how.turned.multiplier;
      }
      write_codes(first, turn, how.y, base + at, count, y);
      write_codes(second, turn, how.y, base + at + half, count, y);
    }
    for (int64_t at = how.dim; at < how.head_dim; at += kCodes) {
      const int64_t count = how.head_dim - at < kCodes ? how.head_dim - at : kCodes;
      read_codes(x, how.x, base + at, count, a);
      for (int64_t i = 0; i < count; ++i) first[i] = (int64_t{a[i]} * (1 << 14)) * how.plain.multiplier;
      write_codes(first, plain, how.y, base + at, count, y);
    }
  }
}

}  // namespace
}  // namespace lilliput
