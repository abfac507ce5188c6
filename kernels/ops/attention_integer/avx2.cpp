// VPMADDWD in 256 bits.
#include <immintrin.h>

#include "ops/attention_integer/body.hpp"

namespace lilliput {
namespace {

struct Avx2Pairs {
  typedef int32_t Sums __attribute__((vector_size(32)));
  typedef __m256i Pairs;
  static constexpr int kSums = 8;

  LILLIPUT_INLINE Sums none() { return Sums{}; }
  LILLIPUT_INLINE Pairs widen(const int8_t* from) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  LILLIPUT_INLINE Pairs spread(int32_t two) { return _mm256_set1_epi32(two); }
  LILLIPUT_INLINE Sums madd(Sums sums, Pairs a, Pairs b) { return sums + (Sums)_mm256_madd_epi16(a, b); }
};

}  // namespace

void attention_integer_avx2(const IntegerAttention& how, const CodePages& kv, const CodeRows& rows, int64_t begin,
                            int64_t end, uint8_t* scratch) {
  attention_integer_body<Avx2Pairs>(how, kv, rows, begin, end, scratch);
}

}  // namespace lilliput
