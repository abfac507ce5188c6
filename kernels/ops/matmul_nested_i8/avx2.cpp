// VPMADDUBSW in 256 bits, nibble by nibble: its int16 sums would saturate with wider codes.
#include "ops/matmul_nested_i8/ymm.hpp"

namespace lilliput {
namespace {

struct Avx2 : Ymm {
  static constexpr bool kSplit = true;

  // Sums of two products of a nibble and an int8; eight steps of them stay within int16: 8 * 2 * 15 * 127 = 30480.
  LILLIPUT_INLINE Bytes pairs(const Bytes codes[8], const int8_t* x) {
    Bytes p[8];
    for (int j = 0; j < 8; ++j) p[j] = _mm256_maddubs_epi16(codes[j], inputs(x + 4 * j));
    const Bytes a = _mm256_add_epi16(_mm256_add_epi16(p[0], p[1]), _mm256_add_epi16(p[2], p[3]));
    const Bytes b = _mm256_add_epi16(_mm256_add_epi16(p[4], p[5]), _mm256_add_epi16(p[6], p[7]));
    return _mm256_add_epi16(a, b);
  }

  template <bool High>
  LILLIPUT_INLINE Sums dot(Sums sums, const Bytes low[8], const Bytes high[8], const int8_t* x) {
    sums += (Sums)_mm256_madd_epi16(pairs(low, x), _mm256_set1_epi16(1));
    if constexpr (High) sums += (Sums)_mm256_madd_epi16(pairs(high, x), _mm256_set1_epi16(16));
    return sums;
  }
};

}  // namespace

void matmul_nested_i8_avx2(const NestedView& w, const QuantizedView& x, int64_t tokens, float* y, int64_t ldy,
                           int64_t tile_begin, int64_t tile_end, uint8_t* scratch) {
  matmul_i8<Avx2>(w, x, tokens, y, ldy, tile_begin, tile_end, scratch);
}

}  // namespace lilliput
