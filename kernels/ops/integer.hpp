// What the ops of an integer graph share (docs/integer.md): grids of codes and the factors between them.
#pragma once

#include <cstdint>

#include "ops/vec.hpp"

namespace lilliput {

constexpr int64_t kCodes = 64;  // codes that pointwise ops take at once

// Codes of an edge: `bits` is 8 (int8) or 16 (int16).
struct CodeGrid {
  int bits;
  int32_t zero;

  int64_t low() const { return -(int64_t{1} << (bits - 1)); }
  int64_t high() const { return (int64_t{1} << (bits - 1)) - 1; }
};

// A real factor, multiplier / 2^shift.
struct Factor {
  int32_t multiplier;
  int shift;  // 1 .. 62
};

namespace {

// a / 2^shift rounded down, for 0 <= shift <= 63. Written with a logical shift, which every instruction set has in
// vectors with a shift a lane; AVX2 has no such arithmetic shift.
LILLIPUT_INLINE int64_t shift_down(int64_t a, uint64_t shift) {
  constexpr uint64_t kTop = uint64_t{1} << 63;
  return static_cast<int64_t>(((static_cast<uint64_t>(a) ^ kTop) >> shift) - (kTop >> shift));
}

// rq of docs/integer.md, of what is multiplied already.
LILLIPUT_INLINE int64_t round_down(int64_t product, uint64_t shift) {
  return shift_down(product + static_cast<int64_t>(uint64_t{1} << (shift - 1)), shift);
}

// Codes from[at] .. as distances from `zero`.
LILLIPUT_INLINE void read_codes(const void* from, const CodeGrid& grid, int64_t at, int64_t count, int32_t* to) {
  if (grid.bits == 8) {
    const auto* x = static_cast<const int8_t*>(from) + at;
    for (int64_t i = 0; i < count; ++i) to[i] = x[i] - grid.zero;
  } else {
    const auto* x = static_cast<const int16_t*>(from) + at;
    for (int64_t i = 0; i < count; ++i) to[i] = x[i] - grid.zero;
  }
}

// to[at + i] = clamp((products[i] + half >> shift) + zero).
LILLIPUT_INLINE void write_codes(const int64_t* products, uint64_t shift, const CodeGrid& grid, int64_t at, int64_t count,
                                 void* to) {
  const int64_t half = static_cast<int64_t>(uint64_t{1} << (shift - 1)), zero = grid.zero;
  if (grid.bits == 8) {
    auto* y = static_cast<int8_t*>(to) + at;
    for (int64_t i = 0; i < count; ++i) {
      int64_t v = shift_down(products[i] + half, shift) + zero;
      v = v < -128 ? -128 : v;
      y[i] = static_cast<int8_t>(v > 127 ? 127 : v);
    }
  } else {
    auto* y = static_cast<int16_t*>(to) + at;
    for (int64_t i = 0; i < count; ++i) {
      int64_t v = shift_down(products[i] + half, shift) + zero;
      v = v < -32768 ? -32768 : v;
      y[i] = static_cast<int16_t>(v > 32767 ? 32767 : v);
    }
  }
}

LILLIPUT_INLINE int64_t clamp_to(int64_t v, int64_t low, int64_t high) { return v < low ? low : v > high ? high : v; }

}  // namespace
}  // namespace lilliput
