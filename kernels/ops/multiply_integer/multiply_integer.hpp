// The node `multiply` of an integer graph (docs/integer.md): y = clamp(rq((a - zero_a) * (b - zero_b), factor) + zero_y).
#pragma once

#include "ops/integer.hpp"

namespace lilliput {

struct IntegerProduct {
  CodeGrid a, b, y;
  Factor factor;
};

// Codes begin .. end - 1 of a, b and y, which are int8 or int16 as their grids say.
typedef void MultiplyInteger(const IntegerProduct& how, const void* a, const void* b, void* y, int64_t begin, int64_t end);
MultiplyInteger multiply_integer_reference, multiply_integer_avx2, multiply_integer_avx512;

}  // namespace lilliput
