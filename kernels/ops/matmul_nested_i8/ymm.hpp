// matmul_nested_i8 in 256-bit registers: what AVX2 and F16C have; `steps` and `widen` are the variant's own.
#pragma once

#include <immintrin.h>

#include "ops/matmul_nested_i8/levels.hpp"

namespace lilliput {
namespace {

struct Ymm {
  typedef __m256i Bytes;
  typedef int32_t Sums __attribute__((vector_size(32)));
  typedef float Floats __attribute__((vector_size(32)));
  static constexpr int kRows = 8, kBlock = 4, kAbreast = 1;
  static constexpr bool kSigned = false;

  LILLIPUT_INLINE Bytes load(const uint8_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }
  LILLIPUT_INLINE void keep(uint8_t* to, Bytes v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), v); }
  LILLIPUT_INLINE Bytes splat(int byte) { return _mm256_set1_epi8(static_cast<char>(byte)); }
  LILLIPUT_INLINE Bytes both(Bytes a, Bytes b) { return _mm256_and_si256(a, b); }
  LILLIPUT_INLINE Bytes either(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
  LILLIPUT_INLINE Bytes choose(Bytes m, Bytes yes, Bytes no) {
    return _mm256_or_si256(_mm256_and_si256(m, yes), _mm256_andnot_si256(m, no));
  }
  // Shifts of words: bits that cross into the next byte are masked away by whoever shifts.
  template <int N>
  LILLIPUT_INLINE Bytes right(Bytes v) { return _mm256_srli_epi16(v, N); }
  template <int N>
  LILLIPUT_INLINE Bytes left(Bytes v) { return _mm256_slli_epi16(v, N); }
  LILLIPUT_INLINE Bytes inputs(const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, sizeof four);
    return _mm256_set1_epi32(four);
  }

  // A dword is a row.
  template <int Each>
  LILLIPUT_INLINE Bytes look_up(Bytes codes, Bytes rows, const Bytes* table) {
    if constexpr (Each == 1) {
      const Bytes a = _mm256_shuffle_epi8(table[0], codes), b = _mm256_shuffle_epi8(table[1], codes);
      const Bytes c = _mm256_shuffle_epi8(table[2], codes), d = _mm256_shuffle_epi8(table[3], codes);
      return _mm256_blend_epi32(_mm256_blend_epi32(a, b, 0x22), _mm256_blend_epi32(c, d, 0x88), 0xcc);
    }
    const Bytes at = _mm256_or_si256(codes, rows), a = _mm256_shuffle_epi8(table[0], at);
    if constexpr (Each == 4) return a;
    return _mm256_blend_epi32(a, _mm256_shuffle_epi8(table[4 / Each - 1], at), 0xcc);
  }

  // Two products fill an int16 all but: 2 * 127 * 127 = 32258. So each pair is widened by itself.
  LILLIPUT_INLINE Sums dot_entries(Sums sums, const Bytes entries[8], const int8_t* x) {
    Sums more{};
    for (int j = 0; j < 8; j += 2) {
      const Bytes a = _mm256_maddubs_epi16(entries[j], inputs(x + 4 * j));
      const Bytes b = _mm256_maddubs_epi16(entries[j + 1], inputs(x + 4 * j + 4));
      sums += (Sums)_mm256_madd_epi16(a, _mm256_set1_epi16(1));
      more += (Sums)_mm256_madd_epi16(b, _mm256_set1_epi16(1));
    }
    return sums + more;
  }

  LILLIPUT_INLINE Sums none() { return Sums{}; }
  LILLIPUT_INLINE Floats zero() { return Floats{}; }
  LILLIPUT_INLINE Sums spread_sum(int32_t v) { return (Sums)_mm256_set1_epi32(v); }
  LILLIPUT_INLINE Floats spread(float v) { return (Floats)_mm256_set1_ps(v); }
  LILLIPUT_INLINE Floats to_floats(Sums v) { return __builtin_convertvector(v, Floats); }
  LILLIPUT_INLINE Floats halves(const uint16_t* from) {
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  LILLIPUT_INLINE Floats smalls(const uint8_t* from) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return (Floats)_mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(bytes), 4));
  }
  LILLIPUT_INLINE Floats wholes(const int8_t* from) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
  }
  LILLIPUT_INLINE Floats load_floats(const float* from) {
    Floats v;
    std::memcpy(&v, from, sizeof v);
    return v;
  }
  LILLIPUT_INLINE void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }
};

}  // namespace
}  // namespace lilliput
