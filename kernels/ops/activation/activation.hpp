// Elementwise functions in float32.
//
//     silu       x / (1 + exp(-x))
//     gelu       x / 2 * (1 + erf(x / sqrt 2)), erf in double, rounded once
//     gelu_tanh  x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))
//     relu       max(x, 0)
#pragma once

#include <cstdint>

namespace lilliput {

enum class Activation : int { silu, gelu, gelu_tanh, relu };

// y[i] = act(x[i]) * up[i], or act(x[i]) when `up` is null. y may be x.
typedef void ActivationOp(Activation kind, const float* x, const float* up, int64_t n, float* y);
ActivationOp activation_reference, activation_avx2, activation_avx512;

// The exact gelu, which is the C library's: one by one, for every variant. y may not be x.
void gelu(const float* x, int64_t n, float* y);

// x = cap * tanh(x / cap), in place.
void softcap(float cap, float* x, int64_t n);

// x = exp(x) with the exponential of vec.hpp, in place.
void exponentials(float* x, int64_t n);

}  // namespace lilliput
