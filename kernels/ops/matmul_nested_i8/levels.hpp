// matmul_nested_i8 for matrices with tables: codes become entries of their row's table, 0..127, by byte shuffles, and
// the entries are multiplied as codes of 7 bits are.
//
// A line is 4 inputs of 16 rows, so each 128-bit lane of it holds 4 rows. A shuffle looks 16 bytes up in 16: the tables
// of 4 rows with 4 entries, of 2 with 8, of 1 with 16. The row goes into the bits of the index that the code leaves free.
// Beyond what the body asks for, an instruction set has
//
//     I::look_up<Each>(codes, rows, table)    entries of codes, where a register of `table` has the tables of Each rows
//     I::dot_entries(sums, entries, x)        if I::kSplit: its dot for bytes of up to 127
#pragma once

#include "ops/matmul_nested_i8/body.hpp"

namespace lilliput {
namespace {

// An instruction set whose operands are entries: bytes, never two nibbles.
template <class I>
struct Entries : I {
  static constexpr bool kSplit = false;

  template <bool>
  LILLIPUT_INLINE typename I::Sums dot(typename I::Sums sums, const typename I::Bytes entries[8],
                                       const typename I::Bytes* none, const int8_t* x) {
    if constexpr (I::kSplit)
      return I::dot_entries(sums, entries, x);
    else
      return I::template dot<false>(sums, entries, none, x);
  }
};

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
          // codes of the cut f21 come doubled, see `unpack`
          const int row = kEach == 4 ? i / 4 : kEach == 2 ? i % 2 : 0;
          const int code = kEach == 4 ? i % 4 : kEach == 2 ? i / 2 : i & ((1 << bits) - 1);
          entries[n][16 * lane + i] = table[((4 * lane + kEach * n + row) << bits) + code];
        }
  }
};

// Codes as they are stored, unpacked and looked up where they are used.
template <class I, Cut C>
struct Looked {
  Packed<I, C> from;
  const Tables<C>& tables;

  inline __attribute__((always_inline)) void fetch(int64_t tile) const { from.fetch(tile); }
  inline __attribute__((always_inline)) void codes(int64_t tile, int part, typename I::Bytes low[8],
                                                   typename I::Bytes high[8]) const {
    constexpr int kRegisters = 4 / rows_each<C>;
    from.codes(tile, part, low, high);
    const int at = 4 * I::kRows * part;
    typename I::Bytes table[kRegisters];
    for (int n = 0; n < kRegisters; ++n) table[n] = I::load(tables.entries[n] + at);
    const typename I::Bytes rows = I::load(tables.rows + at);
    for (int j = 0; j < 8; ++j) low[j] = I::template look_up<rows_each<C>>(low[j], rows, table);
  }
};

template <class I, Cut C>
LILLIPUT_INLINE void multiply_levels(const NestedView& w, const QuantizedView& x, int64_t tokens, float* y, int64_t ldy,
                                     int64_t tile_begin, int64_t tile_end, uint8_t* scratch) {
  const int64_t input_tiles = x.stride / kTileInputs;
  NestedView grid = w;  // the grid that the tables pick from
  grid.bits = 7;
  Tables<C> tables;
  const auto looked = [&](int64_t tile) {
    tables.fill(w.table + (tile * kTileRows << w.bits), w.bits);
    return Looked<I, C>{{w, tile * input_tiles}, tables};
  };
  if (tokens <= I::kBlock) {
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
      const auto source = looked(tile);
      if (tokens == 1)
        multiply_one<I, Cut::any>(grid, tile, source, x, 0, y, ldy);
      else
        multiply_some<I, Cut::any>(grid, tile, source, x, 0, static_cast<int>(tokens), y, ldy);
    }
    return;
  }
  uint8_t* data = scratch + (64 - reinterpret_cast<uintptr_t>(scratch) % 64) % 64;
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const auto source = looked(tile);
    const Panel<I, Cut::any> panel{data};
    for (int64_t n = 0; n < input_tiles; ++n) {
      source.fetch(n);
      for (int part = 0; part < kTileRows / I::kRows; ++part) {
        typename I::Bytes low[8], high[8];
        source.codes(n, part, low, high);
        for (int j = 0; j < 8; ++j) I::keep(data + n * panel.kTile + 64 * j + 4 * I::kRows * part, low[j]);
      }
    }
    for (int64_t t = 0; t < tokens; t += I::kBlock)
      multiply_some<I, Cut::any>(grid, tile, panel, x, t, static_cast<int>(tokens - t < I::kBlock ? tokens - t : I::kBlock),
                                 y, ldy);
  }
}

template <class Set>
LILLIPUT_INLINE void matmul_levels_i8(const NestedView& w, const QuantizedView& x, int64_t tokens, float* y,
                                      int64_t ldy, int64_t tile_begin, int64_t tile_end, uint8_t* scratch) {
  using I = Entries<Set>;
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
