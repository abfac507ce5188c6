// Sixteen lanes of float32 in the compiler's own vector type: one zmm, two ymm, four xmm or four Neon registers.
//
// Everything here has internal linkage and stays inline on purpose. Kernels are compiled once per instruction set; an
// inline function with external linkage could be merged by the linker into its AVX-512 copy and then run on a machine
// that has none. For the same reason kernels use no inline functions of the standard library.
#pragma once

#include <cstdint>
#include <cstring>

#define LILLIPUT_INLINE static inline __attribute__((always_inline, unused))

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "tiles are read as little-endian words");

namespace lilliput {

constexpr int kLanes = 16;

namespace {

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

LILLIPUT_INLINE Floats load(const float* from) {
  Floats v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

LILLIPUT_INLINE void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }

LILLIPUT_INLINE Words load_words(const void* from) {
  Words v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

LILLIPUT_INLINE Floats spread(float value) { return value - Floats{}; }

LILLIPUT_INLINE Floats as_floats(Words bits) { return (Floats)bits; }
LILLIPUT_INLINE Words as_words(Floats value) { return (Words)value; }

// float16 to float32, exact for every input. Shifting the fields in place leaves the exponent 112 too low; the
// multiplication puts it right and renormalises subnormals on the way.
LILLIPUT_INLINE Floats widen_half(const uint16_t* from) {
  Halves raw;
  std::memcpy(&raw, from, sizeof raw);
  const Words h = __builtin_convertvector(raw, Words);
  const Words magnitude = (h & 0x7fffu) << 13;
  Words value = as_words(as_floats(magnitude) * 0x1p112f);
  value |= (Words)(magnitude >= 0x0f800000u) & 0x7f800000u;  // infinities and NaNs keep the top exponent
  return as_floats(value | ((h & 0x8000u) << 16));
}

LILLIPUT_INLINE Floats widen_bfloat(const uint16_t* from) {
  Halves raw;
  std::memcpy(&raw, from, sizeof raw);
  return as_floats(__builtin_convertvector(raw, Words) << 16);
}

LILLIPUT_INLINE float widen_half_1(uint16_t h) {
  const uint32_t magnitude = (h & 0x7fffu) << 13;
  float value;
  std::memcpy(&value, &magnitude, sizeof value);
  value *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits |= (magnitude >= 0x0f800000u ? 0x7f800000u : 0u) | ((h & 0x8000u) << 16);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

LILLIPUT_INLINE float widen_bfloat_1(uint16_t h) {
  const uint32_t bits = uint32_t{h} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The one order in which sixteen partial sums become one: halves onto halves, 8 + 4 + 2 + 1.
LILLIPUT_INLINE float total(Floats v) {
  float lane[kLanes];
  store(lane, v);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

LILLIPUT_INLINE float largest(Floats v) {
  float lane[kLanes];
  store(lane, v);
  float most = lane[0];
  for (int i = 1; i < kLanes; ++i) most = lane[i] > most ? lane[i] : most;
  return most;
}

LILLIPUT_INLINE Floats select(Ints where, Floats yes, Floats no) {
  return as_floats(((Words)where & as_words(yes)) | (~(Words)where & as_words(no)));
}

// exp by Cephes' expf: reduction by ln 2 in two parts, then a polynomial; about 2 ulp. Below -87 it is 0 and above 88
// it stays at exp(88), so that no lane meets a subnormal or an infinity; NaN stays NaN. Written out because the C
// libraries do not agree in the last bit, and that bit can decide a token.
LILLIPUT_INLINE Floats exponential(Floats x) {
  const Ints vanishes = x < -87.0f;
  Floats c = select(vanishes, spread(-87.0f), x);
  c = select(c > 88.0f, spread(88.0f), c);
  const Floats shifted = c * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23 puts the integer in the low bits
  const Floats n = shifted - 12582912.0f;
  const Floats r = (c - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const Floats y = (p * (r * r) + r) + 1.0f;
  const Words exponent = (as_words(shifted) - 0x4b400000u + 127u) << 23;
  return select(vanishes, Floats{}, y * as_floats(exponent));
}

// tanh by Cephes' tanhf: an odd polynomial near 0, where 1 - 2 / (exp(2x) + 1) would cancel.
LILLIPUT_INLINE Floats hyperbolic_tangent(Floats x) {
  const Words sign = as_words(x) & 0x80000000u;
  const Floats size = as_floats(as_words(x) & 0x7fffffffu);
  const Floats far = 1.0f - 2.0f / (exponential(size + size) + 1.0f);
  const Floats z = x * x;
  Floats p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const Floats near = p * z * x + x;
  return select(size < 0.625f, near, as_floats(as_words(far) | sign));
}

}  // namespace
}  // namespace lilliput
