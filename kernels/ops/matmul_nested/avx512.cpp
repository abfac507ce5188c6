// The portable body compiled for AVX512: 8 tokens of sums stay in registers.
#include "ops/matmul_nested/body.hpp"

namespace lilliput {

void matmul_nested_avx512(const NestedView& w, const float* x, int64_t tokens, int64_t ldx, float* y, int64_t ldy,
                      int64_t tile_begin, int64_t tile_end, float* scratch) {
  matmul_nested_body<8>(w, x, tokens, ldx, y, ldy, tile_begin, tile_end, scratch);
}

}  // namespace lilliput
