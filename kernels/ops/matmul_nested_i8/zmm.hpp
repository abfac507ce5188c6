// matmul_nested_i8 in 512-bit registers: what AVX-512 BW has; `steps` and `widen` are the variant's own.
#pragma once

#include <immintrin.h>

#include "ops/matmul_nested_i8/levels.hpp"

namespace lilliput {
namespace {

struct Zmm {
  typedef __m512i Bytes;
  typedef int32_t Sums __attribute__((vector_size(64)));
  typedef float Floats __attribute__((vector_size(64)));
  static constexpr int kRows = 16, kBlock = 8, kAbreast = 2;
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

  // Four bits of a mask are a row.
  template <int Each>
  LILLIPUT_INLINE Bytes look_up(Bytes codes, Bytes rows, const Bytes* table) {
    if constexpr (Each == 1) {
      Bytes v = _mm512_shuffle_epi8(table[0], codes);
      v = _mm512_mask_shuffle_epi8(v, 0x00f000f000f000f0u, table[1], codes);
      v = _mm512_mask_shuffle_epi8(v, 0x0f000f000f000f00u, table[2], codes);
      return _mm512_mask_shuffle_epi8(v, 0xf000f000f000f000u, table[3], codes);
    }
    const Bytes at = _mm512_or_si512(codes, rows), v = _mm512_shuffle_epi8(table[0], at);
    if constexpr (Each == 4) return v;
    return _mm512_mask_shuffle_epi8(v, 0xff00ff00ff00ff00u, table[4 / Each - 1], at);
  }

  // Two products fill an int16 all but: 2 * 127 * 127 = 32258. So each pair is widened by itself.
  LILLIPUT_INLINE Sums dot_entries(Sums sums, const Bytes entries[8], const int8_t* x) {
    Sums more{};
    for (int j = 0; j < 8; j += 2) {
      const Bytes a = _mm512_maddubs_epi16(entries[j], inputs(x + 4 * j));
      const Bytes b = _mm512_maddubs_epi16(entries[j + 1], inputs(x + 4 * j + 4));
      sums += (Sums)_mm512_madd_epi16(a, _mm512_set1_epi16(1));
      more += (Sums)_mm512_madd_epi16(b, _mm512_set1_epi16(1));
    }
    return sums + more;
  }

  // Eight rows of `count` times 4 bytes as (count, 8).
  static inline void interleave(const void* const rows[kBlock], int64_t count, void* to) {
    const __m512i pairs = _mm512_setr_epi32(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27);
    const __m512i others = _mm512_add_epi32(pairs, _mm512_set1_epi32(4));
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    const auto two = [rows](int a, int64_t n) {
      const auto at = [&](int r) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const char*>(rows[r]) + 4 * n));
      };
      return _mm512_inserti64x4(_mm512_castsi256_si512(at(a)), at(a + 1), 1);
    };
    char* line = static_cast<char*>(to);
    int64_t n = 0;
    for (; n + 8 <= count; n += 8, line += 256) {
      const __m512i a = two(0, n), b = two(2, n), c = two(4, n), d = two(6, n);
      const __m512i ab = _mm512_permutex2var_epi32(a, pairs, b), cd = _mm512_permutex2var_epi32(c, pairs, d);
      const __m512i ef = _mm512_permutex2var_epi32(a, others, b), gh = _mm512_permutex2var_epi32(c, others, d);
      _mm512_storeu_si512(line, _mm512_permutex2var_epi64(ab, first, cd));
      _mm512_storeu_si512(line + 64, _mm512_permutex2var_epi64(ab, second, cd));
      _mm512_storeu_si512(line + 128, _mm512_permutex2var_epi64(ef, first, gh));
      _mm512_storeu_si512(line + 192, _mm512_permutex2var_epi64(ef, second, gh));
    }
    for (; n < count; ++n, line += 32)
      for (int r = 0; r < kBlock; ++r) std::memcpy(line + 4 * r, static_cast<const char*>(rows[r]) + 4 * n, 4);
  }

  LILLIPUT_INLINE Sums none() { return Sums{}; }
  LILLIPUT_INLINE Floats zero() { return Floats{}; }
  LILLIPUT_INLINE Sums spread_sum(int32_t v) { return (Sums)_mm512_set1_epi32(v); }
  LILLIPUT_INLINE Floats spread(float v) { return (Floats)_mm512_set1_ps(v); }
  LILLIPUT_INLINE Floats to_floats(Sums v) { return __builtin_convertvector(v, Floats); }
  LILLIPUT_INLINE Floats halves(const uint16_t* from) {
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  LILLIPUT_INLINE Floats smalls(const uint8_t* from) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return (Floats)_mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 4));
  }
  LILLIPUT_INLINE Floats wholes(const int8_t* from) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
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
