#include "ops/matmul_nested_i8/neon.hpp"

#include "ops/matmul_integer/body.hpp"

namespace lilliput {

void matmul_integer_neon(const NestedView& w, const CodesView& x, int64_t tokens, const RowFactors& rows,
                       const CodeGrid& grid, void* y, int64_t ldy, int64_t tile_begin, int64_t tile_end,
                       uint8_t* scratch) {
  matmul_integer_body<Neon>(w, x, tokens, rows, grid, y, ldy, tile_begin, tile_end, scratch);
}

}  // namespace lilliput
