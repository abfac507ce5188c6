// y = x W^T for a matrix stored as nested bit fields (src/lilliput/numerics/packing.py draws the tiles).
//
//     w[n, k] = scale[n, g] * ((c[n, k] - (2^bits - 1) / 2) - zero[n, g]),  g = k / group, in float32
//               scale[n, g] * ((table[n, c[n, k]] - 63.5) - zero[n, g]) with a table
//
// Scales and zeros are float16. Or they are a byte each: a scale's, times 16, is the bits of a float16, and a zero's a whole
// number. Where the width has a factor for every row, as bytes always have, scale[n, g] factor[n] and zero[n, g] inverse[n]
// take the places of scale and zero, both in float32.
//
//     y[t, n] = ((0 + x[t, 0] w[n, 0]) + x[t, 1] w[n, 1]) + ..,             k ascending, in float32
//
// The order of the sum is part of the definition: it does not depend on how many tokens, tiles or threads there are.
#pragma once

#include <cstdint>

namespace lilliput {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileInputs = 32;
constexpr int64_t kPanel = 256;  // inputs dequantized at once: 16 rows of float32 make 16 KiB, half an L1 cache
constexpr int64_t kPanelFloats = kPanel * kTileRows;

struct NestedView {
  const uint8_t* planes[8];  // leading fields only; field f is (row tiles, input tiles, 64 * width)
  int widths[8];
  int fields;
  int bits;               // sum of widths
  int grid_bytes;        // of a scale and of a zero: 2 or 1
  const uint8_t* scale;  // (row tiles, groups, 16)
  const uint8_t* zero;   // the same, or null
  int64_t out, columns;
  int64_t group;  // inputs a group; `columns` for one group a row
  const uint8_t* table;  // (row tiles, 16, 2^bits) of 0..127, or null; then bits <= 4
  const float* factor;   // (2, row tiles, 16): factors of scales, then of zeros; or null

  const float* inverse() const { return factor + (out + kTileRows - 1) / kTileRows * kTileRows; }
};

// Rows [16 * tile_begin, min(16 * tile_end, out)) of y. x: (tokens, ldx); y: (tokens, ldy), both float32;
// scratch: kPanelFloats floats of the calling thread.
typedef void MatmulNested(const NestedView& w, const float* x, int64_t tokens, int64_t ldx, float* y, int64_t ldy,
                          int64_t tile_begin, int64_t tile_end, float* scratch);
MatmulNested matmul_nested_reference, matmul_nested_avx2, matmul_nested_avx512;

// The code c[row, k] of the width `w` is cut to.
int nested_code(const NestedView& w, int64_t row, int64_t k);

// The same, or the entry it has in the row's table.
int nested_level(const NestedView& w, int64_t row, int64_t k);

// The scale and zero of one row and group, with the row's factors where it has them; 0 without zeros.
float nested_scale(const NestedView& w, int64_t row, int64_t groups, int64_t g);
float nested_zero(const NestedView& w, int64_t row, int64_t groups, int64_t g);

// One row of W into `to`, (columns,) float32: the formula above, weight by weight.
void nested_row(const NestedView& w, int64_t row, float* to);

}  // namespace lilliput
