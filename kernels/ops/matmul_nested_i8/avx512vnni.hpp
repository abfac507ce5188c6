// VPDPBUSD in 512 bits.
#pragma once

#include "ops/matmul_nested_i8/zmm.hpp"

namespace lilliput {
namespace {

struct Avx512Vnni : Zmm {
  typedef Sums Partial;
  static constexpr bool kSplit = false;

  LILLIPUT_INLINE Partial begin() { return none(); }
  template <int T, int, int>
  LILLIPUT_INLINE void steps(Partial p[T], const Bytes codes[8], const int8_t* const x[T], int64_t at) {
    for (int t = 0; t < T; ++t) p[t] += dot(codes, x[t] + at);
  }
  LILLIPUT_INLINE Partial more(Partial p, Bytes codes, Bytes four) {
    return (Sums)_mm512_dpbusd_epi32((__m512i)p, codes, four);
  }
  LILLIPUT_INLINE void hold(Partial& p) { asm("" : "+v"(p)); }
  template <int>
  LILLIPUT_INLINE Sums widen(Sums sums, Partial p) { return sums + p; }

  // Two chains that begin at 0 each time, so that one tile does not wait for the one before.
  LILLIPUT_INLINE Sums dot(const Bytes codes[8], const int8_t* x) {
    Bytes a = _mm512_setzero_si512(), b = a;
    for (int j = 0; j < 8; j += 2) {
      a = _mm512_dpbusd_epi32(a, codes[j], inputs(x + 4 * j));
      b = _mm512_dpbusd_epi32(b, codes[j + 1], inputs(x + 4 * j + 4));
    }
    return (Sums)a + (Sums)b;
  }
  LILLIPUT_INLINE Sums dot_entries(Sums sums, const Bytes entries[8], const int8_t* x) {
    return sums + dot(entries, x);
  }
};

}  // namespace
}  // namespace lilliput
