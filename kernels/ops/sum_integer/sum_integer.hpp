// The node `sum` of an integer graph (docs/integer.md):
//
//     y = clamp(((sum over inputs of (x - zero) multiplier + 2^(shift - 1)) >> shift) + zero_y)
#pragma once

#include "ops/integer.hpp"

namespace lilliput {

constexpr int kMostTerms = 8;

struct IntegerSum {
  int terms;
  CodeGrid x[kMostTerms], y;
  int32_t multiplier[kMostTerms];
  int shift;
};

// Codes begin .. end - 1 of each x and of y, which are int8 or int16 as their grids say.
typedef void SumInteger(const IntegerSum& how, const void* const* x, void* y, int64_t begin, int64_t end);
SumInteger sum_integer_reference, sum_integer_avx2, sum_integer_avx512;

}  // namespace lilliput
