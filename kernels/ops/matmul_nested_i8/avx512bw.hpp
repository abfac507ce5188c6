// VPMADDUBSW in 512 bits, nibble by nibble: its int16 sums would saturate with wider codes.
#pragma once

#include "ops/matmul_nested_i8/zmm.hpp"

namespace lilliput {
namespace {

struct Avx512Bw : Zmm {
  typedef Bytes Partial;
  static constexpr bool kSplit = true;

  // Sums of two products of a code and an int8, in int16: eight steps of nibbles, sixteen of 3-bit codes and eight of
  // 2-bit codes times four stay within it: 8 * 2 * 15 * 127 = 30480, 16 * 2 * 7 * 127 = 28448, 8 * 2 * 12 * 127 = 24384.
  LILLIPUT_INLINE Partial begin() { return _mm512_setzero_si512(); }
  template <int T, int First, int Each>
  LILLIPUT_INLINE void steps(Partial p[T], const Bytes codes[8], const int8_t* const x[T], int64_t at) {
#pragma GCC unroll 8
    for (int j = First; j < 8; j += Each)
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        p[t] = _mm512_add_epi16(p[t], _mm512_maddubs_epi16(codes[j], inputs(x[t] + at + 4 * j)));
        if (T > 1) asm("" : "+v"(p[t]));  // gcc would add in a tree, for which there are too few registers
      }
  }
  template <int T>
  LILLIPUT_INLINE void both_steps(Partial p[T], Partial q[T], const Bytes low[8], const Bytes high[8],
                                  const int8_t* const x[T], int64_t at) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j)
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const Bytes four = inputs(x[t] + at + 4 * j);
        p[t] = _mm512_add_epi16(p[t], _mm512_maddubs_epi16(low[j], four));
        q[t] = _mm512_add_epi16(q[t], _mm512_maddubs_epi16(high[j], four));
        if (T > 1) asm("" : "+v"(p[t]), "+v"(q[t]));
      }
  }
  LILLIPUT_INLINE Partial more(Partial p, Bytes codes, Bytes four) {
    return _mm512_add_epi16(p, _mm512_maddubs_epi16(codes, four));
  }
  LILLIPUT_INLINE void hold(Partial& p) { asm("" : "+v"(p)); }
  template <int F>
  LILLIPUT_INLINE Sums widen(Sums sums, Partial p) {
    return sums + (Sums)_mm512_madd_epi16(p, _mm512_set1_epi16(F));
  }
};

}  // namespace
}  // namespace lilliput
