// The node `rotate` of an integer graph (docs/integer.md), for the heads of one position. With a and b the distances of
// channel i and i + dim / 2 from their zero:
//
//     y[i]           = clamp(rq(a cos[i] - b sin[i], turned) + zero)
//     y[i + dim / 2] = clamp(rq(b cos[i] + a sin[i], turned) + zero)
//     y[i]           = clamp(rq(a << 14, plain) + zero)                      for the channels behind dim
#pragma once

#include "ops/integer.hpp"

namespace lilliput {

struct IntegerRotary {
  CodeGrid x, y;
  int64_t head_dim, dim;
  Factor turned, plain;
};

// x, y: (heads, head_dim) of int8 or int16 as their grids say; cos, sin: (dim / 2,).
typedef void RotaryInteger(const IntegerRotary& how, const int16_t* cos, const int16_t* sin, const void* x, int64_t heads,
                           void* y);
RotaryInteger rotary_integer_reference, rotary_integer_avx2, rotary_integer_avx512;

}  // namespace lilliput
