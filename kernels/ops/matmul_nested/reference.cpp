// The definition of matmul_nested, and its rows one by one for embedding tables.
#include "ops/matmul_nested/body.hpp"

namespace lilliput {

void matmul_nested_reference(const NestedView& w, const float* x, int64_t tokens, int64_t ldx, float* y, int64_t ldy,
                             int64_t tile_begin, int64_t tile_end, float* scratch) {
  matmul_nested_body<2>(w, x, tokens, ldx, y, ldy, tile_begin, tile_end, scratch);
}

int nested_code(const NestedView& w, int64_t row, int64_t k) {
  const int64_t input_tiles = (w.columns + kTileInputs - 1) / kTileInputs;
  const int64_t tile = (row / kTileRows) * input_tiles + k / kTileInputs;
  const int step = static_cast<int>(k % kTileInputs) / 4, i = step / 4, f = step % 4;
  const int lane = static_cast<int>(row % kTileRows) * 4 + static_cast<int>(k % 4);
  int code = 0;
  for (int n = 0; n < w.fields; ++n) {
    const int width = w.widths[n];
    const uint8_t* bytes = w.planes[n] + tile * 64 * width;
    int part;
    if (width == 4)
      part = (bytes[64 * (2 * i + f % 2) + lane] >> (4 * (f / 2))) & 15;
    else if (width == 2)
      part = (bytes[64 * i + lane] >> (2 * f)) & 3;
    else
      part = (bytes[lane] >> (2 * f + 1 - i)) & 1;
    code = (code << width) | part;
  }
  return code;
}

int nested_level(const NestedView& w, int64_t row, int64_t k) {
  const int code = nested_code(w, row, k);
  return w.table ? w.table[(row << w.bits) + code] : code;
}

static int64_t grid_place(int64_t row, int64_t groups, int64_t g) {
  return ((row / kTileRows) * groups + g) * kTileRows + row % kTileRows;
}

static float half_at(const uint8_t* grid, int64_t at) {
  uint16_t half;
  std::memcpy(&half, grid + 2 * at, sizeof half);
  return widen_half_1(half);
}

float nested_scale(const NestedView& w, int64_t row, int64_t groups, int64_t g) {
  const int64_t at = grid_place(row, groups, g);
  const float scale =
      w.grid_bytes == 1 ? widen_half_1(static_cast<uint16_t>(w.scale[at] << 4)) : half_at(w.scale, at);
  return w.factor ? scale * w.factor[row] : scale;
}

float nested_zero(const NestedView& w, int64_t row, int64_t groups, int64_t g) {
  if (!w.zero) return 0;
  const int64_t at = grid_place(row, groups, g);
  const float zero = w.grid_bytes == 1 ? static_cast<float>(static_cast<int8_t>(w.zero[at])) : half_at(w.zero, at);
  return w.factor ? zero * w.inverse()[row] : zero;
}

void nested_row(const NestedView& w, int64_t row, float* to) {
  const int64_t groups = (w.columns + w.group - 1) / w.group, row_tile = row / kTileRows, r = row % kTileRows;
  const int64_t input_tiles = (w.columns + kTileInputs - 1) / kTileInputs;
  const float middle = w.table ? 63.5f : static_cast<float>((1 << w.bits) - 1) / 2;
  const uint8_t* table = w.table ? w.table + (row << w.bits) : nullptr;
  const auto word_of = [r](const uint8_t* line) {
    uint32_t word;
    std::memcpy(&word, line + 4 * r, sizeof word);
    return word;
  };
  float scale = 0, zero = 0;
  uint32_t codes[8];
  for (int64_t k = 0, g = 0; k < w.columns; ++k) {
    if (k == g * w.group) {
      scale = nested_scale(w, row, groups, g);
      zero = nested_zero(w, row, groups, g++);
    }
    const int64_t place = k % kTileInputs;
    if (place == 0) unpack_tile(w, row_tile * input_tiles + k / kTileInputs, word_of, codes);
    const uint32_t code = (codes[place / 4] >> (8 * (place % 4))) & 0xffu;
    to[k] = scale * ((static_cast<float>(table ? table[code] : code) - middle) - zero);
  }
}

}  // namespace lilliput
