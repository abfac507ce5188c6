// matmul_nested_i8 in 512-bit registers: what AVX-512 BW has; `steps` and `widen` are the variant's own.
#pragma once

#include <immintrin.h>

#include "ops/matmul_nested_i8/body.hpp"

namespace lilliput {
namespace {

struct Zmm {
  typedef __m512i Bytes;
  typedef Ints Sums;
  typedef lilliput::Floats Floats;
  static constexpr int kRows = 16, kBlock = 8;
  static constexpr bool kSigned = false;

  LILLIPUT_INLINE Bytes load(const uint8_t* from) { return _mm512_loadu_si512(from); }
  LILLIPUT_INLINE void keep(uint8_t* to, Bytes v) { _mm512_storeu_si512(to, v); }
  LILLIPUT_INLINE Bytes splat(int byte) { return _mm512_set1_epi8(static_cast<char>(byte)); }
  LILLIPUT_INLINE Bytes both(Bytes a, Bytes b) { return _mm512_and_si512(a, b); }
  LILLIPUT_INLINE Bytes either(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
  LILLIPUT_INLINE Bytes choose(Bytes m, Bytes yes, Bytes no) { return _mm512_ternarylogic_epi64(m, yes, no, 0xca); }
  // Shifts of words: bits that cross into the next byte are masked away by whoever shifts.
  template <int N>
  LILLIPUT_INLINE Bytes right(Bytes v) { return _mm512_srli_epi16(v, N); }
  template <int N>
  LILLIPUT_INLINE Bytes left(Bytes v) { return _mm512_slli_epi16(v, N); }
  LILLIPUT_INLINE Bytes inputs(const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, sizeof four);
    return _mm512_set1_epi32(four);
  }

  LILLIPUT_INLINE Sums none() { return Sums{}; }
  LILLIPUT_INLINE Floats zero() { return Floats{}; }
  LILLIPUT_INLINE Sums spread_sum(int32_t v) { return (Sums)_mm512_set1_epi32(v); }
  LILLIPUT_INLINE Floats spread(float v) { return (Floats)_mm512_set1_ps(v); }
  LILLIPUT_INLINE Floats to_floats(Sums v) { return __builtin_convertvector(v, Floats); }
  LILLIPUT_INLINE Floats halves(const uint16_t* from) {
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  LILLIPUT_INLINE Floats load_floats(const float* from) {
    Floats v;
    std::memcpy(&v, from, sizeof v);
    return v;
  }
  LILLIPUT_INLINE void store(float* to, Floats v) { lilliput::store(to, v); }
};

}  // namespace
}  // namespace lilliput
