// y = (x - mean, if layer) / sqrt(variance + eps) * (weight + offset) + bias over one vector, float32.
//
// Sums: lane l adds elements l, l + 16, .., then the tree of vec.hpp. rms: the variance is the mean square.
#pragma once

#include <cstdint>

namespace lilliput {

struct NormView {
  const float* weight;  // (n,)
  const float* bias;    // (n,) or null
  float eps, offset;
  bool layer;
};

// x, y: (n,) float32; y may be x.
typedef void NormOp(const NormView& norm, const float* x, int64_t n, float* y);
NormOp norm_reference, norm_avx2, norm_avx512;

}  // namespace lilliput
