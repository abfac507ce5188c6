// Rotary embedding of the first 2 * half channels of one head, halves rotated against each other:
//
//     x[j], x[j + half]  ->  x[j] cos[j] - x[j + half] sin[j],  x[j + half] cos[j] + x[j] sin[j]
#pragma once

#include <cstdint>

namespace lilliput {

// cos, sin: (half,); x: (2 * half,) float32, rotated in place.
typedef void RotaryOp(const float* cos, const float* sin, int64_t half, float* x);
RotaryOp rotary_reference;

// Fills cos and sin of one position, times `scale`. The angle is rounded to float32, as the models were trained with;
// its cosine is taken in double and rounded once, so that C libraries agree.
void rotary_angles(const float* inv_freq, int64_t half, int64_t position, float scale, float* cos, float* sin);

}  // namespace lilliput
