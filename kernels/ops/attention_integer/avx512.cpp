// VPMADDWD in 512 bits.
#include <immintrin.h>

#include "ops/attention_integer/body.hpp"

namespace lilliput {
namespace {

struct Avx512Pairs {
  typedef Ints Sums;
  typedef __m512i Pairs;
  static constexpr int kSums = 16;

  LILLIPUT_INLINE Sums none() { return Sums{}; }
  LILLIPUT_INLINE Pairs widen(const int8_t* from) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  LILLIPUT_INLINE Pairs spread(int32_t two) { return _mm512_set1_epi32(two); }
  LILLIPUT_INLINE Sums madd(Sums sums, Pairs a, Pairs b) { return sums + (Sums)_mm512_madd_epi16(a, b); }
};

}  // namespace

void attention_integer_avx512(const IntegerAttention& how, const CodePages& kv, const CodeRows& rows, int64_t begin,
                              int64_t end, uint8_t* scratch) {
  attention_integer_body<Avx512Pairs>(how, kv, rows, begin, end, scratch);
}

}  // namespace lilliput
