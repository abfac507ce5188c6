// y = x W^T for a matrix stored as nested bit fields and activations in int8 (quantize_i8), groups as in the matrix.
//
//     d[t, n, g] = sum over the group of c[n, k] q[t, k]                          int32, exact
//     i[t, n, g] = 2 d - (2^bits - 1) sum[t, g]                                   int32, exact
//
// (with a table: table[n, c[n, k]] in the place of c, and 127 in the place of 2^bits - 1; with factors of rows scale and
// zero are what matmul_nested.hpp says)
//
//     e[t, n, g] = float(i) - zero[n, g] float(2 sum[t, g])                       e = float(i) without zeros
//     y[t, n]    = ((0 + (scale[n, 0] (xscale[t, 0] / 2)) e[t, n, 0]) + (scale[n, 1] ..) ..      g ascending, float32
//
// The middle of the code range is a half, so everything is doubled until the integers become floats: a symmetric group
// is rounded nowhere before that. The integers are the same in any order; the float sum runs over groups in order.
#pragma once

#include "ops/matmul_nested/matmul_nested.hpp"
#include "ops/quantize_i8/quantize_i8.hpp"

namespace lilliput {

// 255 * 127 times this stays below 2^31. Wider groups have no int8 path.
constexpr int64_t kWidestI8Group = 65536;
constexpr int64_t kPanelBytes = 384 * 1024;  // codes unpacked at once for several tokens: part of an L2 cache
constexpr int64_t kPanelTiles = 8;           // row tiles a panel at most
constexpr int64_t kMostI8Tokens = 8;         // tokens multiplied at once at most

// The functions here are static for the reason given in vec.hpp.

// Whether a tile of 32 inputs never spans two groups, so that the vector variants apply. Others run the reference.
static constexpr bool fits_i8(int64_t columns, int64_t group) {
  return (group < columns ? group : columns) <= kWidestI8Group && (group % kTileInputs == 0 || group >= columns);
}

// Row tiles a panel has room for, codes taking one byte or two (a nibble each).
static constexpr int64_t panel_tiles(int64_t columns, int64_t bytes) {
  const int64_t tile = bytes * kTileRows * quantized_stride(columns), most = kPanelBytes / tile;
  return most < 1 ? 1 : most > kPanelTiles ? kPanelTiles : most;
}
static constexpr int64_t panel_bytes(int64_t columns) {
  const int64_t tile = kTileRows * quantized_stride(columns), narrow = panel_tiles(columns, 1) * tile;
  const int64_t wide = panel_tiles(columns, 2) * 2 * tile;
  return narrow > wide ? narrow : wide;
}

// Bytes of three numbers for each token of a block and each group; a group that the variants take has 32 inputs or all.
static constexpr int64_t terms_bytes(int64_t columns) {
  const int64_t groups = quantized_stride(columns) / kTileInputs;
  return (3 * 4 * kMostI8Tokens * groups + 63) / 64 * 64;
}

// Bytes of the scales and zeros of a panel in float32, a group having 32 inputs or all.
static constexpr int64_t panel_grid_bytes(int64_t columns) {
  return kPanelTiles * (quantized_stride(columns) / kTileInputs) * 2 * kTileRows * 4;
}

// Bytes of scratch for `columns` inputs: terms and codes of a block, a panel, and 64 to align them.
static constexpr int64_t matmul_nested_i8_scratch(int64_t columns) {
  const int64_t block = kMostI8Tokens * quantized_stride(columns);
  return terms_bytes(columns) + block + panel_bytes(columns) + panel_grid_bytes(columns) + 64;
}

// Rows [16 * tile_begin, min(16 * tile_end, out)) of y. x: `tokens` tokens; y: (tokens, ldy) float32;
// scratch: matmul_nested_i8_scratch(columns) bytes of the calling thread.
typedef void MatmulNestedI8(const NestedView& w, const QuantizedView& x, int64_t tokens, float* y, int64_t ldy,
                            int64_t tile_begin, int64_t tile_end, uint8_t* scratch);
MatmulNestedI8 matmul_nested_i8_reference, matmul_nested_i8_avx2, matmul_nested_i8_avxvnni, matmul_nested_i8_avx512bw,
    matmul_nested_i8_avx512vnni, matmul_nested_i8_neon;

}  // namespace lilliput
