// The definition of matmul_integer, code by code.
#include "ops/matmul_integer/matmul_integer.hpp"

namespace lilliput {

void matmul_integer_reference(const NestedView& w, const CodesView& x, int64_t tokens, const RowFactors& rows,
                              const CodeGrid& grid, void* y, int64_t ldy, int64_t tile_begin, int64_t tile_end,
                              uint8_t*) {
  const int64_t last = tile_end * kTileRows < w.out ? tile_end * kTileRows : w.out;
  for (int64_t n = tile_begin * kTileRows; n < last; ++n)
    for (int64_t t = 0; t < tokens; ++t) {
      int64_t a = 0;
      for (int part = 0; part < x.parts; ++part) {
        const int8_t* codes = x.codes + (t * x.parts + part) * x.stride;
        int64_t dot = 0;
        for (int64_t k = 0; k < w.columns; ++k) dot += int64_t{nested_code(w, n, k) - rows.zero[n]} * codes[k];
        a = 256 * a + dot;
      }
      a += rows.bias[n];
      const int64_t code = clamp_to(
          round_down(a * rows.multiplier[n], static_cast<uint64_t>(rows.shift[n])) + grid.zero, grid.low(), grid.high());
      if (grid.bits == 8)
        static_cast<int8_t*>(y)[t * ldy + n] = static_cast<int8_t>(code);
      else
        static_cast<int16_t*>(y)[t * ldy + n] = static_cast<int16_t>(code);
    }
}

void split_codes(const int16_t* x, int64_t columns, int64_t stride, int8_t* codes, int32_t* sum) {
  int32_t high = 0, low = 0;
  for (int64_t k = 0; k < columns; ++k) {
    const int32_t h = x[k] >> 8, l = (x[k] & 255) - 128;
    codes[k] = static_cast<int8_t>(h);
    codes[stride + k] = static_cast<int8_t>(l);
    high += h;
    low += l;
  }
  for (int64_t k = columns; k < stride; ++k) codes[k] = codes[stride + k] = 0;
  sum[0] = high;
  sum[1] = low;
}

int32_t sum_codes(const int8_t* x, int64_t columns) {
  int32_t sum = 0;
  for (int64_t k = 0; k < columns; ++k) sum += x[k];
  return sum;
}

}  // namespace lilliput
