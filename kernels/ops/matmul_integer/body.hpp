// The vector body of matmul_integer: the products of matmul_nested_i8 over an instruction set `I` (its body.hpp), summed
// over whole rows in int32, and then codes in 64 bits. The last step is written as loops over the 16 rows of a tile,
// which compilers turn into vectors.
#pragma once

#include "ops/matmul_integer/matmul_integer.hpp"
#include "ops/matmul_nested_i8/levels.hpp"

namespace lilliput {
namespace {

// The sums of products of codes and `T` rows of x with one row of tiles: to (T, 16).
template <class I, Cut C, int T, class Source>
LILLIPUT_INLINE void tile_dots(const Source& source, const int8_t* const x[T], int64_t input_tiles, int32_t* to) {
  constexpr int kParts = kTileRows / I::kRows;
  typename I::Sums dots[kParts][T];
  for (int part = 0; part < kParts; ++part)
    for (int t = 0; t < T; ++t) dots[part][t] = I::none();
  for (int64_t tile = 0; tile < input_tiles; ++tile) {
    source.fetch(tile);
    for (int part = 0; part < kParts; ++part) add_tiles<I, C, T, 1, 1>(source, tile, part, x, dots[part]);
  }
  for (int part = 0; part < kParts; ++part)
    for (int t = 0; t < T; ++t)
      std::memcpy(to + t * kTileRows + part * I::kRows, &dots[part][t], sizeof dots[part][t]);
}

// What does not change from token to token, for one row of tiles; rows beyond the matrix repeat harmless numbers.
struct TileFactors {
  alignas(64) int64_t bias[kTileRows];
  alignas(64) int64_t half[kTileRows];
  alignas(64) int64_t shift[kTileRows];
  alignas(64) int32_t multiplier[kTileRows];
  alignas(64) int32_t zero[kTileRows];  // of what is multiplied

  // centre: what was taken off the codes before they were multiplied.
  inline __attribute__((always_inline)) void fill(const RowFactors& rows, int32_t centre, int64_t first, int64_t count) {
    for (int64_t r = 0; r < kTileRows; ++r) {
      const int64_t n = first + (r < count ? r : 0);
      bias[r] = rows.bias[n];
      shift[r] = rows.shift[n];
      half[r] = int64_t{1} << (rows.shift[n] - 1);
      multiplier[r] = rows.multiplier[n];
      zero[r] = rows.zero[n] - centre;
    }
  }
};

// 16 codes of one token from its sums: `high` of the codes, or of their upper parts with `low` of the lower. total: of its
// own codes.
template <int Parts, class Code>
LILLIPUT_INLINE void tile_codes(const TileFactors& f, const int32_t* high, const int32_t* low, int64_t total, int64_t zero,
                                Code* to) {
  constexpr int64_t kLow = -(int64_t{1} << (8 * sizeof(Code) - 1)), kHigh = -kLow - 1;
  alignas(64) int64_t product[kTileRows];
  if constexpr (Parts == 1) {  // the sum fits in 32 bits
    alignas(64) int32_t a[kTileRows];
    for (int r = 0; r < kTileRows; ++r)
      a[r] = static_cast<int32_t>(static_cast<uint32_t>(high[r]) + static_cast<uint32_t>(f.bias[r]) -
                                  static_cast<uint32_t>(f.zero[r]) * static_cast<uint32_t>(total));
    for (int r = 0; r < kTileRows; ++r) product[r] = int64_t{a[r]} * f.multiplier[r] + f.half[r];
  } else {
    for (int r = 0; r < kTileRows; ++r)
      product[r] = (256 * int64_t{high[r]} + low[r] + f.bias[r] - f.zero[r] * total) * f.multiplier[r] + f.half[r];
  }
  alignas(64) int32_t code[kTileRows];
  for (int r = 0; r < kTileRows; ++r) {
    int64_t v = shift_down(product[r], static_cast<uint64_t>(f.shift[r])) + zero;
    v = v < kLow ? kLow : v;
    v = v > kHigh ? kHigh : v;
    code[r] = static_cast<int32_t>(v);
  }
  for (int r = 0; r < kTileRows; ++r) to[r] = static_cast<Code>(code[r]);
}

template <int Parts, class Code>
LILLIPUT_INLINE void put_codes(const TileFactors& f, const int32_t* dots, const int32_t* sum, int64_t zero, int64_t tokens,
                               int64_t rows, Code* y, int64_t ldy) {
  for (int64_t t = 0; t < tokens; ++t) {
    const int32_t* high = dots + t * Parts * kTileRows;
    const int64_t total = Parts == 1 ? sum[t] : 256 * int64_t{sum[2 * t]} + sum[2 * t + 1];
    if (rows == kTileRows) {
      tile_codes<Parts, Code>(f, high, high + kTileRows, total, zero, y + t * ldy);
    } else {
      Code made[kTileRows];
      tile_codes<Parts, Code>(f, high, high + kTileRows, total, zero, made);
      for (int64_t r = 0; r < rows; ++r) y[t * ldy + r] = made[r];
    }
  }
}

struct IntegerJob {
  const NestedView& w;
  const CodesView& x;
  const RowFactors& rows;
  const CodeGrid& grid;
  void* y;
  int64_t ldy;
};

// From sums of products to codes, for one row of tiles and `count` rows of x from `first` on.
static __attribute__((noinline, unused)) void finish_codes(const IntegerJob& job, int64_t row_tile, int32_t centre,
                                                           const int32_t* dots, int64_t first, int64_t count) {
  const int64_t rest = job.w.out - row_tile * kTileRows, rows = rest < kTileRows ? rest : kTileRows;
  TileFactors f;
  f.fill(job.rows, centre, row_tile * kTileRows, rows);
  const int64_t tokens = count / job.x.parts, at = first / job.x.parts * job.ldy + row_tile * kTileRows;
  const int32_t* sum = job.x.sum + first;
  const auto put = [&](auto* y) {
    if (job.x.parts == 2)
      put_codes<2>(f, dots, sum, job.grid.zero, tokens, rows, y, job.ldy);
    else
      put_codes<1>(f, dots, sum, job.grid.zero, tokens, rows, y, job.ldy);
  };
  if (job.grid.bits == 8)
    put(static_cast<int8_t*>(job.y) + at);
  else
    put(static_cast<int16_t*>(job.y) + at);
}

// One row of tiles against `count` of `T` rows of x from `first` on; the places beyond compute the first once more.
template <class I, Cut C, int T, class Source>
LILLIPUT_INLINE void multiply_codes(const IntegerJob& job, int64_t row_tile, const Source& source, int64_t first,
                                    int64_t count) {
  alignas(64) int32_t dots[T * kTileRows];
  const int8_t* x[T];
  for (int t = 0; t < T; ++t) x[t] = job.x.codes + (first + (t < count ? t : 0)) * job.x.stride;
  tile_dots<I, C, T>(source, x, job.x.stride / kTileInputs, dots);
  finish_codes(job, row_tile, I::kSigned && job.w.bits == 8 ? 128 : 0, dots, first, count);
}

template <class I, Cut C, class Source>
static __attribute__((noinline)) void multiply_row(const IntegerJob& job, int64_t row_tile, const Source& source,
                                                   int64_t first, int64_t count) {
  if (count == 1)
    multiply_codes<I, C, 1>(job, row_tile, source, first, count);
  else if (count == 2)
    multiply_codes<I, C, 2>(job, row_tile, source, first, count);
  else if (count <= 4)
    multiply_codes<I, C, 4>(job, row_tile, source, first, count);
  else
    multiply_codes<I, C, I::kBlock>(job, row_tile, source, first, count);
}

template <class I, Cut C>
LILLIPUT_INLINE void multiply_rows(const IntegerJob& job, int64_t rows, int64_t tile_begin, int64_t tile_end,
                                      uint8_t* scratch) {
  const int64_t input_tiles = job.x.stride / kTileInputs;
  if (rows <= I::kBlock) {  // the codes are used at once: no panel
    for (int64_t tile = tile_begin; tile < tile_end; ++tile)
      multiply_row<I, C>(job, tile, Packed<I, C>{job.w, tile * input_tiles}, 0, rows);
    return;
  }
  uint8_t* data = scratch + (64 - reinterpret_cast<uintptr_t>(scratch) % 64) % 64;
  const int64_t most = panel_tiles(job.w.columns, has_high<I, C> ? 2 : 1);
  for (int64_t begin = tile_begin; begin < tile_end; begin += most) {
    const int64_t count = tile_end - begin < most ? tile_end - begin : most;
    const auto panel = [&](int64_t n) { return Panel<I, C>{data + n * input_tiles * Panel<I, C>::kTile}; };
    for (int64_t n = 0; n < count; ++n) panel(n).fill(job.w, (begin + n) * input_tiles, input_tiles);
    for (int64_t t = 0; t < rows; t += I::kBlock) {
      const int64_t block = rows - t < I::kBlock ? rows - t : I::kBlock;
      for (int64_t n = 0; n < count; ++n) multiply_row<I, C>(job, begin + n, panel(n), t, block);
    }
  }
}

// What every variant runs.
template <class I>
LILLIPUT_INLINE void matmul_integer_body(const NestedView& w, const CodesView& x, int64_t tokens, const RowFactors& rows,
                                         const CodeGrid& grid, void* y, int64_t ldy, int64_t tile_begin,
                                         int64_t tile_end, uint8_t* scratch) {
  const IntegerJob job{w, x, rows, grid, y, ldy};
  const int64_t count = tokens * x.parts;
  switch (cut_of(w)) {
    case Cut::f2114: return multiply_rows<I, Cut::f2114>(job, count, tile_begin, tile_end, scratch);
    case Cut::f211: return multiply_rows<I, Cut::f211>(job, count, tile_begin, tile_end, scratch);
    case Cut::f4: return multiply_rows<I, Cut::f4>(job, count, tile_begin, tile_end, scratch);
    case Cut::f44: return multiply_rows<I, Cut::f44>(job, count, tile_begin, tile_end, scratch);
    default: return multiply_rows<I, Cut::any>(job, count, tile_begin, tile_end, scratch);
  }
}

}  // namespace
}  // namespace lilliput
