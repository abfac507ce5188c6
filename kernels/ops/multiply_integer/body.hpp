#pragma once

#include "ops/multiply_integer/multiply_integer.hpp"

namespace lilliput {
namespace {

LILLIPUT_INLINE void multiply_integer_body(const IntegerProduct& how, const void* a, const void* b, void* y, int64_t begin,
                                           int64_t end) {
  for (int64_t at = begin; at < end; at += kCodes) {
    const int64_t count = end - at < kCodes ? end - at : kCodes;
    alignas(64) int32_t left[kCodes], right[kCodes];
    alignas(64) int64_t product[kCodes];
    read_codes(a, how.a, at, count, left);
    read_codes(b, how.b, at, count, right);
    if (how.a.bits + how.b.bits < 32) {  // the product fits in 32 bits
      for (int64_t i = 0; i < count; ++i) product[i] = int64_t{left[i] * right[i]} * how.factor.multiplier;
    } else {
      for (int64_t i = 0; i < count; ++i) product[i] = int64_t{left[i]} * right[i] * how.factor.multiplier;
    }
    write_codes(product, static_cast<uint64_t>(how.factor.shift), how.y, at, count, y);
  }
}

}  // namespace
}  // namespace lilliput
