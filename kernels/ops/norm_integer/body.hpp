#pragma once

#include "ops/norm_integer/norm_integer.hpp"

namespace lilliput {
namespace {

// The whole part of the square root of v < 2^62. That of the nearest double is at most one off.
LILLIPUT_INLINE int64_t whole_root(int64_t v) {
  auto r = static_cast<int64_t>(__builtin_sqrt(static_cast<double>(v)));
  while (r * r > v) --r;
  while ((r + 1) * (r + 1) <= v) ++r;
  return r;
}

LILLIPUT_INLINE void norm_integer_body(const IntegerNorm& how, const int32_t* gain, const int64_t* offset, const void* x,
                                       int64_t n, void* y, int32_t* d) {
  read_codes(x, how.x, 0, n, d);
  if (how.layer) {
    int64_t sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += d[i];
    const int64_t top = 64 * sum + n / 2, c = top / n - (top % n < 0);
    for (int64_t i = 0; i < n; ++i) d[i] = 64 * d[i] - static_cast<int32_t>(c);
  }
  int64_t square = 0;
  for (int64_t i = 0; i < n; ++i) square += int64_t{d[i]} * d[i];
  square += how.eps;
  if (square < 1) square = 1;
  const int e = (__builtin_clzll(static_cast<uint64_t>(square)) - 2) & ~1;
  const int64_t inverse = (int64_t{1} << 61) / whole_root(square << e);
  const auto t = static_cast<uint64_t>(31 - e / 2);
  const int64_t half = int64_t{1} << (t - 1);
  alignas(64) int64_t product[kCodes];
  for (int64_t at = 0; at < n; at += kCodes) {
    const int64_t count = n - at < kCodes ? n - at : kCodes;
    alignas(64) int32_t u[kCodes];  // at most 2^30 in size
    for (int64_t i = 0; i < count; ++i) u[i] = static_cast<int32_t>(shift_down(d[at + i] * inverse + half, t));
    for (int64_t i = 0; i < count; ++i) product[i] = int64_t{u[i]} * gain[at + i];
    if (offset)
      for (int64_t i = 0; i < count; ++i) product[i] += offset[at + i];
    write_codes(product, static_cast<uint64_t>(how.shift), how.y, at, count, y);
  }
}

}  // namespace
}  // namespace lilliput
