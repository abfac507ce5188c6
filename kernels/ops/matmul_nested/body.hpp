// The portable body of matmul_nested; each variant compiles it for its instruction set and block of tokens.
#pragma once

#include "ops/matmul_nested/matmul_nested.hpp"
#include "ops/vec.hpp"

namespace lilliput {
namespace {

// One tile of codes as eight steps; word r of step j holds row r, inputs 4j .. 4j + 3, one a byte. load(line): what is
// wanted of 64 bytes of a field, all sixteen rows as Words or one as its word.
template <class Word, class Load>
LILLIPUT_INLINE void unpack_tile(const NestedView& w, int64_t tile, Load load, Word codes[8]) {
  for (int j = 0; j < 8; ++j) codes[j] = Word{};
  for (int f = 0; f < w.fields; ++f) {
    const int width = w.widths[f];
    const uint8_t* bytes = w.planes[f] + tile * 64 * width;
    if (width == 4) {
      for (int line = 0; line < 4; ++line) {
        const Word raw = load(bytes + 64 * line);
        const int j = 4 * (line / 2) + line % 2;
        codes[j] = (codes[j] << 4) | (raw & 0x0f0f0f0fu);
        codes[j + 2] = (codes[j + 2] << 4) | ((raw >> 4) & 0x0f0f0f0fu);
      }
    } else if (width == 2) {
      for (int line = 0; line < 2; ++line) {
        const Word raw = load(bytes + 64 * line);
        for (int s = 0; s < 4; ++s) {
          const int j = 4 * line + s;
          codes[j] = (codes[j] << 2) | ((raw >> (2 * s)) & 0x03030303u);
        }
      }
    } else {
      const Word raw = load(bytes);
      for (int j = 0; j < 8; ++j) {
        const int bit = 2 * (j % 4) + 1 - j / 4;
        codes[j] = (codes[j] << 1) | ((raw >> bit) & 0x01010101u);
      }
    }
  }
}

struct Grid {
  Floats scale, zero;
};

LILLIPUT_INLINE Grid grid_of(const NestedView& w, int64_t row_tile, int64_t groups, int64_t g) {
  const int64_t at = (row_tile * groups + g) * kTileRows * w.grid_bytes;
  Grid grid{};
  if (w.grid_bytes == 1) {
    grid.scale = widen_small(w.scale + at);
    if (w.zero) grid.zero = to_floats(load_wide_bytes(reinterpret_cast<const int8_t*>(w.zero + at)));
  } else {
    grid.scale = widen_half(reinterpret_cast<const uint16_t*>(w.scale + at));
    if (w.zero) grid.zero = widen_half(reinterpret_cast<const uint16_t*>(w.zero + at));
  }
  if (w.factor) {
    grid.scale = grid.scale * load(w.factor + row_tile * kTileRows);
    grid.zero = grid.zero * load(w.inverse() + row_tile * kTileRows);
  }
  return grid;
}

// Entries of the tables of 16 rows, one a row. Byte by byte: this path is for checks, not for speed.
LILLIPUT_INLINE Words look_up(const uint8_t* table, int bits, Words codes) {
  uint32_t lane[kLanes];
  store_registers(lane, codes);
  for (int r = 0; r < kLanes; ++r) lane[r] = table[(r << bits) + static_cast<int>(lane[r])];
  return load_words(lane);
}

// Calls use(k - begin, w[rows, k]) for k in [begin, end), ascending; begin is a multiple of 32.
template <class Use>
LILLIPUT_INLINE void each_column(const NestedView& w, int64_t row_tile, int64_t begin, int64_t end, Use use) {
  const int64_t groups = (w.columns + w.group - 1) / w.group;
  const int64_t input_tiles = (w.columns + kTileInputs - 1) / kTileInputs;
  const float middle = w.table ? 63.5f : static_cast<float>((1 << w.bits) - 1) / 2;
  const uint8_t* table = w.table ? w.table + (row_tile * kTileRows << w.bits) : nullptr;
  int64_t g = begin / w.group, next = (g + 1) * w.group;
  Grid grid = grid_of(w, row_tile, groups, g);
  Words codes[8];
  for (int64_t at = begin; at < end; at += kTileInputs) {
    unpack_tile(w, row_tile * input_tiles + at / kTileInputs, load_words, codes);
    for (int64_t j = 0; j < 8; ++j) {
      Words word = codes[j];
      for (int64_t c = 0; c < 4; ++c, word = word >> 8) {
        const int64_t k = at + 4 * j + c;
        if (k >= end) return;
        if (k == next) {
          grid = grid_of(w, row_tile, groups, ++g);
          next += w.group;
        }
        const Words level = table ? look_up(table, w.bits, word & 0xffu) : word & 0xffu;
        use(k - begin, grid.scale * ((to_floats(as_ints(level)) - middle) - grid.zero));
      }
    }
  }
}

LILLIPUT_INLINE void store_rows(float* to, Floats v, int64_t rows) {
  if (rows == kTileRows) return store(to, v);
  float lane[kLanes];
  store(lane, v);
  for (int64_t r = 0; r < rows; ++r) to[r] = lane[r];
}

LILLIPUT_INLINE Floats load_rows(const float* from, int64_t rows) {
  if (rows == kTileRows) return load(from);
  float lane[kLanes] = {};
  for (int64_t r = 0; r < rows; ++r) lane[r] = from[r];
  return load(lane);
}

// `Block` tokens against one dequantized panel; sums go on from y unless `first`.
template <int Block>
LILLIPUT_INLINE void multiply_panel(const float* panel, int64_t count, const float* x, int64_t ldx, float* y,
                                    int64_t ldy, int64_t rows, bool first) {
  Floats sum[Block];
  for (int t = 0; t < Block; ++t) sum[t] = first ? Floats{} : load_rows(y + t * ldy, rows);
  for (int64_t k = 0; k < count; ++k) {
    const Floats column = load(panel + k * kTileRows);
    for (int t = 0; t < Block; ++t) sum[t] += x[t * ldx + k] * column;
  }
  for (int t = 0; t < Block; ++t) store_rows(y + t * ldy, sum[t], rows);
}

template <int Block>
LILLIPUT_INLINE void matmul_nested_body(const NestedView& w, const float* x, int64_t tokens, int64_t ldx, float* y,
                                        int64_t ldy, int64_t tile_begin, int64_t tile_end, float* scratch) {
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const int64_t left = w.out - tile * kTileRows, rows = left < kTileRows ? left : kTileRows;
    float* to = y + tile * kTileRows;
    if (tokens == 1) {  // the weights are used once: no panel
      Floats sum{};
      each_column(w, tile, 0, w.columns, [&](int64_t k, Floats column) { sum += x[k] * column; });
      store_rows(to, sum, rows);
      continue;
    }
    for (int64_t begin = 0; begin < w.columns; begin += kPanel) {
      const int64_t end = w.columns - begin < kPanel ? w.columns : begin + kPanel;
      each_column(w, tile, begin, end, [&](int64_t k, Floats column) { store(scratch + k * kTileRows, column); });
      int64_t t = 0;
      for (; t + Block <= tokens; t += Block)
        multiply_panel<Block>(scratch, end - begin, x + t * ldx + begin, ldx, to + t * ldy, ldy, rows, begin == 0);
      for (; t < tokens; ++t)
        multiply_panel<1>(scratch, end - begin, x + t * ldx + begin, ldx, to + t * ldy, ldy, rows, begin == 0);
    }
  }
}

}  // namespace
}  // namespace lilliput
