// VPDPBUSD by other instructions, put in front of the variants that use it: what they compute can then be held to the
// reference on machines without it. The instruction's definition: four products of an unsigned and a signed byte, added
// to each sum of 32 bits.
#pragma once

#include <immintrin.h>

#if defined(__AVX512BW__)
static inline __attribute__((always_inline, unused)) __m512i emulated_dpbusd(__m512i sums, __m512i a, __m512i b) {
  const __m512i even = _mm512_mullo_epi16(_mm512_and_si512(a, _mm512_set1_epi16(255)),
                                          _mm512_srai_epi16(_mm512_slli_epi16(b, 8), 8));
  const __m512i odd = _mm512_mullo_epi16(_mm512_srli_epi16(a, 8), _mm512_srai_epi16(b, 8));
  const __m512i one = _mm512_set1_epi16(1);
  return _mm512_add_epi32(sums, _mm512_add_epi32(_mm512_madd_epi16(even, one), _mm512_madd_epi16(odd, one)));
}
#define _mm512_dpbusd_epi32 emulated_dpbusd
#endif

static inline __attribute__((always_inline, unused)) __m256i emulated_dpbusd_256(__m256i sums, __m256i a, __m256i b) {
  const __m256i even = _mm256_mullo_epi16(_mm256_and_si256(a, _mm256_set1_epi16(255)),
                                          _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
  const __m256i odd = _mm256_mullo_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
  const __m256i one = _mm256_set1_epi16(1);
  return _mm256_add_epi32(sums, _mm256_add_epi32(_mm256_madd_epi16(even, one), _mm256_madd_epi16(odd, one)));
}
#define _mm256_dpbusd_avx_epi32 emulated_dpbusd_256
