// matmul_nested_i8 for matrices with tables: codes become entries of their row's table, 0..127, by byte shuffles, and
// the entries are multiplied as codes of 7 bits are.
//
// A line is 4 inputs of 16 rows, so each 128-bit lane of it holds 4 rows. A shuffle looks 16 bytes up in 16: the tables
// of 4 rows with 4 entries, of 2 with 8, of 1 with 16. The row goes into the bits of the index that the code leaves free.
// Beyond what the body asks for, an instruction set has
//
//     I::look_up<Each>(codes, rows, table)    entries of codes, where a register of `table` has the tables of Each rows
//     I::dot_entries(sums, entries, x)        adds the products of 8 steps of entries and the 32 inputs at x to the sums
#pragma once

#include "ops/matmul_nested_i8/body.hpp"

namespace lilliput {
namespace {

// Rows whose tables one register of 16-byte lanes holds.
template <Cut C>
constexpr int rows_each = C == Cut::f2 ? 4 : C == Cut::f21 ? 2 : 1;

// The tables of 16 rows as `look_up` reads them: byte i of lane l of register n. `rows` is what the index has besides
// the code; its bits from 16 up pick the register where one instruction reads several, and others pass over them.
template <Cut C>
struct Tables {
  alignas(64) uint8_t rows[64];
  alignas(64) uint8_t entries[4 / rows_each<C>][64];

  inline __attribute__((always_inline)) void fill(const uint8_t* table, int bits) {
    constexpr int kEach = rows_each<C>;
    for (int p = 0; p < 64; ++p) {
      const int row = p / 4 % 4;
      rows[p] = static_cast<uint8_t>(kEach == 4 ? 4 * row : kEach == 2 ? row % 2 + 16 * (row / 2) : 16 * row);
    }
    for (int lane = 0; lane < 4; ++lane)
      for (int n = 0; n < 4 / kEach; ++n)
        for (int i = 0; i < 16; ++i) {
          // codes of the cut f21 come doubled, see `unpack_doubled`
          const int row = kEach == 4 ? i / 4 : kEach == 2 ? i % 2 : 0;
          const int code = kEach == 4 ? i % 4 : kEach == 2 ? i / 2 : i & ((1 << bits) - 1);
          entries[n][16 * lane + i] = table[((4 * lane + kEach * n + row) << bits) + code];
        }
  }
};

// A 2-bit and a 1-bit field as eight steps of codes times two, whose bit 0 is free.
template <class I>
LILLIPUT_INLINE void unpack_doubled(const NestedView& w, int64_t tile, int part, typename I::Bytes to[8]) {
  using B = typename I::Bytes;
  const int at = 4 * I::kRows * part;
  const B odd = I::splat(0xaa), top = I::splat(0xcc), p = I::load(w.planes[1] + tile * 64 + at);
  const B v0 = I::load(w.planes[0] + tile * 128 + at), v1 = I::load(w.planes[0] + tile * 128 + 64 + at);
  const B s0 = I::both(p, odd), s1 = I::both(I::template left<1>(p), odd);
  const B lines[4] = {
      I::choose(top, I::template left<2>(v0), s0), I::choose(top, v0, I::template right<2>(s0)),
      I::choose(top, I::template left<2>(v1), s1), I::choose(top, v1, I::template right<2>(s1))};
  nibbles<I>(lines, to);
}

// Codes as they are stored, unpacked and looked up where they are used.
template <class I, Cut C>
struct Looked {
  Packed<I, C> from;
  const Tables<C>& tables;

  inline __attribute__((always_inline)) void fetch(int64_t tile) const { from.fetch(tile); }
  inline __attribute__((always_inline)) void entries(int64_t tile, int part, typename I::Bytes to[8]) const {
    constexpr int kRegisters = 4 / rows_each<C>;
    if constexpr (C == Cut::f21) {
      unpack_doubled<I>(from.w, from.first + tile, part, to);
    } else if constexpr (C == Cut::any && I::kSplit) {
      typename I::Bytes none[8];  // high nibbles of codes that have none
      from.codes(tile, part, to, none);
    } else {
      from.codes(tile, part, to, nullptr);
    }
    const int at = 4 * I::kRows * part;
    typename I::Bytes table[kRegisters];
    for (int n = 0; n < kRegisters; ++n) table[n] = I::load(tables.entries[n] + at);
    const typename I::Bytes rows = I::load(tables.rows + at);
    for (int j = 0; j < 8; ++j) to[j] = I::template look_up<rows_each<C>>(to[j], rows, table);
  }
};

// Entries looked up beforehand: eight lines a tile.
template <class I>
struct Entries {
  uint8_t* data;

  inline __attribute__((always_inline)) void fetch(int64_t) const {}
  inline __attribute__((always_inline)) uint8_t* line(int64_t tile, int part, int j) const {
    return data + tile * 512 + 64 * j + 4 * I::kRows * part;
  }
  inline __attribute__((always_inline)) void entries(int64_t tile, int part, typename I::Bytes to[8]) const {
    for (int j = 0; j < 8; ++j) to[j] = I::load(line(tile, part, j));
  }
  template <Cut C>
  inline __attribute__((always_inline)) void fill(const Looked<I, C>& from, int64_t tiles) const {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      from.fetch(tile);
      for (int part = 0; part < kTileRows / I::kRows; ++part) {
        typename I::Bytes made[8];
        from.entries(tile, part, made);
        for (int j = 0; j < 8; ++j) I::keep(line(tile, part, j), made[j]);
      }
    }
  }
};

// One row of tiles against `count` of `T` tokens; the places beyond `count` compute the first token once more.
template <class I, int T, class Source>
static __attribute__((noinline)) void multiply_entries(const NestedView& w, int64_t row_tile, const Source& source,
                                                       const QuantizedView& x, int64_t first_token, int count, float* y,
                                                       int64_t ldy) {
  using F = typename I::Floats;
  constexpr int kParts = kTileRows / I::kRows;
  const int64_t input_tiles = x.stride / kTileInputs, group_tiles = (w.group + kTileInputs - 1) / kTileInputs;
  const int64_t rest = w.out - row_tile * kTileRows, rows = rest < kTileRows ? rest : kTileRows;
  int64_t token[T];
  for (int t = 0; t < T; ++t) token[t] = first_token + (t < count ? t : 0);
  F result[kParts][T];
  for (int part = 0; part < kParts; ++part)
    for (int t = 0; t < T; ++t) result[part][t] = I::zero();
  for (int64_t g = 0, tile = 0; g < x.groups; ++g) {
    const int64_t end = input_tiles - tile < group_tiles ? input_tiles : tile + group_tiles;
    typename I::Sums dots[kParts][T];
    for (int part = 0; part < kParts; ++part)
      for (int t = 0; t < T; ++t) dots[part][t] = I::none();
    for (; tile < end; ++tile) {
      source.fetch(tile);
      for (int part = 0; part < kParts; ++part) {
        typename I::Bytes entries[8];
        source.entries(tile, part, entries);
        for (int t = 0; t < T; ++t)
          dots[part][t] = I::dot_entries(dots[part][t], entries, x.codes + token[t] * x.stride + tile * kTileInputs);
      }
    }
    for (int part = 0; part < kParts; ++part) {
      const auto grid = grid_at<I>(w, row_tile, x.groups, g, part);
      for (int t = 0; t < T; ++t) {
        const int64_t n = token[t] * x.groups + g;
        F e = I::to_floats(dots[part][t] + dots[part][t] - I::spread_sum(127 * x.sum[n]));
        if (w.zero) e = e - grid.zero * I::spread(static_cast<float>(2 * x.sum[n]));
        result[part][t] = result[part][t] + (grid.scale * I::spread(x.scale[n] * 0.5f)) * e;
      }
    }
  }
  for (int t = 0; t < count; ++t) {
    float lane[kTileRows];
    for (int part = 0; part < kParts; ++part) I::store(lane + part * I::kRows, result[part][t]);
    float* to = y + (first_token + t) * ldy + row_tile * kTileRows;
    for (int64_t r = 0; r < rows; ++r) to[r] = lane[r];
  }
}

template <class I, class Source>
LILLIPUT_INLINE void multiply_block(const NestedView& w, int64_t row_tile, const Source& source, const QuantizedView& x,
                                    int64_t t, int64_t left, float* y, int64_t ldy) {
  const int count = static_cast<int>(left < I::kBlock ? left : I::kBlock);
  if (count == 1)
    multiply_entries<I, 1>(w, row_tile, source, x, t, count, y, ldy);
  else if (count <= 4)
    multiply_entries<I, 4>(w, row_tile, source, x, t, count, y, ldy);
  else
    multiply_entries<I, I::kBlock>(w, row_tile, source, x, t, count, y, ldy);
}

template <class I, Cut C>
LILLIPUT_INLINE void multiply_levels(const NestedView& w, const QuantizedView& x, int64_t tokens, float* y, int64_t ldy,
                                     int64_t tile_begin, int64_t tile_end, uint8_t* scratch) {
  const int64_t input_tiles = x.stride / kTileInputs;
  const Entries<I> panel{scratch + (64 - reinterpret_cast<uintptr_t>(scratch) % 64) % 64};
  Tables<C> tables;
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    tables.fill(w.table + (tile * kTileRows << w.bits), w.bits);
    const Looked<I, C> source{{w, tile * input_tiles}, tables};
    if (tokens <= I::kBlock) {
      multiply_block<I>(w, tile, source, x, 0, tokens, y, ldy);
      continue;
    }
    panel.fill(source, input_tiles);
    for (int64_t t = 0; t < tokens; t += I::kBlock) multiply_block<I>(w, tile, panel, x, t, tokens - t, y, ldy);
  }
}

template <class I>
LILLIPUT_INLINE void matmul_levels_i8(const NestedView& w, const QuantizedView& x, int64_t tokens, float* y,
                                      int64_t ldy, int64_t tile_begin, int64_t tile_end, uint8_t* scratch) {
  switch (cut_of(w)) {
    case Cut::f2: return multiply_levels<I, Cut::f2>(w, x, tokens, y, ldy, tile_begin, tile_end, scratch);
    case Cut::f21: return multiply_levels<I, Cut::f21>(w, x, tokens, y, ldy, tile_begin, tile_end, scratch);
    case Cut::f211: return multiply_levels<I, Cut::f211>(w, x, tokens, y, ldy, tile_begin, tile_end, scratch);
    case Cut::f4: return multiply_levels<I, Cut::f4>(w, x, tokens, y, ldy, tile_begin, tile_end, scratch);
    default: return multiply_levels<I, Cut::any>(w, x, tokens, y, ldy, tile_begin, tile_end, scratch);
  }
}

// What every variant runs.
template <class I>
LILLIPUT_INLINE void matmul_i8(const NestedView& w, const QuantizedView& x, int64_t tokens, float* y, int64_t ldy,
                               int64_t tile_begin, int64_t tile_end, uint8_t* scratch) {
  if (w.table && fits_i8(w.columns, w.group))
    return matmul_levels_i8<I>(w, x, tokens, y, ldy, tile_begin, tile_end, scratch);
  matmul_nested_i8_body<I>(w, x, tokens, y, ldy, tile_begin, tile_end, scratch);
}

}  // namespace
}  // namespace lilliput
