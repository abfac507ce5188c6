#include "ops/matmul_nested_i8/neon.hpp"

namespace lilliput {

void matmul_nested_i8_neon(const NestedView& w, const QuantizedView& x, int64_t tokens, float* y, int64_t ldy,
                           int64_t tile_begin, int64_t tile_end, uint8_t* scratch) {
  matmul_i8<Neon>(w, x, tokens, y, ldy, tile_begin, tile_end, scratch);
}

}  // namespace lilliput
