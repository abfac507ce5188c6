#pragma once

#include "ops/sum_integer/sum_integer.hpp"

namespace lilliput {
namespace {

LILLIPUT_INLINE void sum_integer_body(const IntegerSum& how, const void* const* x, void* y, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; at += kCodes) {
    const int64_t count = end - at < kCodes ? end - at : kCodes;
    alignas(64) int32_t term[kCodes];
    alignas(64) int64_t total[kCodes] = {};
    for (int n = 0; n < how.terms; ++n) {
      read_codes(x[n], how.x[n], at, count, term);
      for (int64_t i = 0; i < count; ++i) total[i] += int64_t{term[i]} * how.multiplier[n];
    }
    write_codes(total, static_cast<uint64_t>(how.shift), how.y, at, count, y);
  }
}

}  // namespace
}  // namespace lilliput
