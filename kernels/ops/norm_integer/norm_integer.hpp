// The node `norm` of an integer graph (docs/integer.md), over one run of n channels: with d = x - zero_x and, for a layer
// norm, c = floor((64 sum d + n / 2) / n) and d := 64 d - c,
//
//     S = max(sum d^2 + eps, 1)       e = 62 - bit length of S, rounded down to even
//     R = isqrt(S << e)               I = 2^61 / R,  t = 31 - e / 2
//     u = (d I + 2^(t - 1)) >> t      y = clamp(((u gain + offset + 2^(shift - 1)) >> shift) + zero_y)
#pragma once

#include "ops/integer.hpp"

namespace lilliput {

struct IntegerNorm {
  CodeGrid x, y;
  bool layer;
  int64_t eps;
  int shift;
};

// x, y: (n,) of int8 or int16 as their grids say; gain, offset: (n,), offset may be null; scratch: (n,) of the thread.
typedef void NormInteger(const IntegerNorm& how, const int32_t* gain, const int64_t* offset, const void* x, int64_t n,
                         void* y, int32_t* scratch);
NormInteger norm_integer_reference, norm_integer_avx2, norm_integer_avx512;

}  // namespace lilliput
