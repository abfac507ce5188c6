// The vector body of matmul_nested_i8, over an instruction set `I`:
//
//     I::Bytes, I::Sums, I::Floats    one register as bytes, int32 and float32
//     I::kRows                        rows a register holds: 4 inputs of each, so 4 * kRows bytes; 16 / kRows parts a line
//     I::kBlock                       tokens whose sums stay in registers
//     I::kSplit                       codes beyond a nibble come as two nibbles, low and high
//     I::kSigned                      8-bit codes come as c - 128
//     I::Partial                      sums of products on the way to I::Sums: int16 where I splits, else I::Sums
//     I::steps<T, E, J>(p, codes, x, at)  adds steps E, E + J, .. of 8 to the partial sums of T tokens, inputs at x[t] + at
//     I::both_steps<T>(p, q, low, high, x, at)  the same of low and high nibbles at once, where I splits
//     I::widen<F>(sums, p)            sums + F * p; F is 1 unless I splits
//     I::kAbreast                     rows of tiles that a block of tokens takes at once from a panel; where it is not 1:
//     I::more(p, codes, four)         p + the products of one step and `four`, I::inputs of a token
//     I::halves(p), I::smalls(p), I::wholes(p)  kRows float16, bytes that times 16 are float16, int8, as floats
//     I::hold(p)                      keeps the compiler from adding in another order than it is told
//     I::interleave(rows, count, to)  kBlock rows of `count` times 4 bytes as (count, kBlock)
//
// Unpacking is written once for all of them. As in vec.hpp, everything has internal linkage and stays inline.
#pragma once

#include "ops/matmul_nested_i8/matmul_nested_i8.hpp"
#include "ops/vec.hpp"

namespace lilliput {
namespace {

// The cuts with an unpacking of their own; `any` takes every other list of fields.
enum class Cut { f2, f21, f211, f2114, f4, f44, any };

// Their widths are known to the compiler; those of `any` are read from the view.
template <Cut C>
LILLIPUT_INLINE int fields_in(const NestedView& w) {
  if constexpr (C == Cut::any) return w.fields;
  return C == Cut::f2 || C == Cut::f4 ? 1 : C == Cut::f21 || C == Cut::f44 ? 2 : C == Cut::f211 ? 3 : 4;
}
template <Cut C>
LILLIPUT_INLINE int width_in(const NestedView& w, int f) {
  if constexpr (C == Cut::any) return w.widths[f];
  if (C == Cut::f4 || C == Cut::f44 || f == 3) return 4;
  return f == 0 ? 2 : 1;
}

LILLIPUT_INLINE Cut cut_of(const NestedView& w) {
  const auto is = [&w](int count, int a, int b, int c, int d) {
    const int want[4] = {a, b, c, d};
    bool same = w.fields == count;
    for (int f = 0; same && f < count; ++f) same = w.widths[f] == want[f];
    return same;
  };
  if (is(1, 2, 0, 0, 0)) return Cut::f2;
  if (is(2, 2, 1, 0, 0)) return Cut::f21;
  if (is(3, 2, 1, 1, 0)) return Cut::f211;
  if (is(4, 2, 1, 1, 4)) return Cut::f2114;
  if (is(1, 4, 0, 0, 0)) return Cut::f4;
  if (is(2, 4, 4, 0, 0)) return Cut::f44;
  return Cut::any;
}

template <class I>
LILLIPUT_INLINE typename I::Bytes nibble(typename I::Bytes v) {
  return I::both(v, I::splat(0x0f));
}

// Four lines of a 4-bit field, or what has its arrangement, as the nibbles of eight steps.
template <class I>
LILLIPUT_INLINE void nibbles(const typename I::Bytes line[4], typename I::Bytes to[8]) {
  for (int n = 0; n < 4; ++n) {
    const int j = 4 * (n / 2) + n % 2;
    to[j] = nibble<I>(line[n]);
    to[j + 2] = nibble<I>(I::template right<4>(line[n]));
  }
}

// One part of one tile as eight steps of codes; `low` alone unless I splits and the cut is wider than a nibble.
template <class I, Cut C>
LILLIPUT_INLINE void unpack(const NestedView& w, int64_t tile, int part, typename I::Bytes low[8],
                            typename I::Bytes high[8]) {
  using B = typename I::Bytes;
  constexpr int kBytes = 4 * I::kRows;
  const auto line = [&](int f, int n) {
    return I::load(w.planes[f] + tile * 64 * width_in<C>(w, f) + 64 * n + kBytes * part);
  };
  if constexpr (C == Cut::f2) {
    for (int n = 0; n < 2; ++n) {
      const B v = line(0, n), m = I::splat(0x03);
      low[4 * n] = I::both(v, m);
      low[4 * n + 1] = I::both(I::template right<2>(v), m);
      low[4 * n + 2] = I::both(I::template right<4>(v), m);
      low[4 * n + 3] = I::both(I::template right<6>(v), m);
    }
  } else if constexpr (C == Cut::f21 || C == Cut::f211 || C == Cut::f2114) {
    // The single bits become a 2-bit field of each half, and with the leading field the nibbles of eight steps. Without
    // the third field its bit is 0, so that codes are doubled.
    const B odd = I::splat(0xaa), top = I::splat(0xcc), v0 = line(0, 0), v1 = line(0, 1), p = line(1, 0);
    B s0, s1;
    if constexpr (C == Cut::f21) {
      s0 = I::both(p, odd);
      s1 = I::both(I::template left<1>(p), odd);
    } else {
      const B q = line(2, 0);
      s0 = I::choose(odd, p, I::template right<1>(q));
      s1 = I::choose(odd, I::template left<1>(p), q);
    }
    const B lines[4] = {
        I::choose(top, I::template left<2>(v0), s0), I::choose(top, v0, I::template right<2>(s0)),
        I::choose(top, I::template left<2>(v1), s1), I::choose(top, v1, I::template right<2>(s1))};
    if constexpr (C != Cut::f2114) {
      nibbles<I>(lines, low);
    } else {
      const B tail[4] = {line(3, 0), line(3, 1), line(3, 2), line(3, 3)};
      if constexpr (I::kSplit) {
        nibbles<I>(lines, high);
        nibbles<I>(tail, low);
      } else {
        for (int n = 0; n < 4; ++n) {
          const int j = 4 * (n / 2) + n % 2;
          low[j] = I::choose(I::splat(0xf0), I::template left<4>(lines[n]), tail[n]);
          low[j + 2] = I::choose(I::splat(0xf0), lines[n], I::template right<4>(tail[n]));
        }
      }
    }
  } else if constexpr (C == Cut::f4) {
    const B lines[4] = {line(0, 0), line(0, 1), line(0, 2), line(0, 3)};
    nibbles<I>(lines, low);
  } else if constexpr (C == Cut::f44) {
    const B lines[4] = {line(0, 0), line(0, 1), line(0, 2), line(0, 3)};
    const B tail[4] = {line(1, 0), line(1, 1), line(1, 2), line(1, 3)};
    if constexpr (I::kSplit) {
      nibbles<I>(lines, high);
      nibbles<I>(tail, low);
    } else {
      for (int n = 0; n < 4; ++n) {
        const int j = 4 * (n / 2) + n % 2;
        low[j] = I::choose(I::splat(0xf0), I::template left<4>(lines[n]), tail[n]);
        low[j + 2] = I::choose(I::splat(0xf0), lines[n], I::template right<4>(tail[n]));
      }
    }
  } else {
    for (int j = 0; j < 8; ++j) low[j] = I::splat(0);
    for (int f = 0; f < w.fields; ++f) {
      if (w.widths[f] == 4) {
        B lines[4], more[8];
        for (int n = 0; n < 4; ++n) lines[n] = line(f, n);
        nibbles<I>(lines, more);
        for (int j = 0; j < 8; ++j) low[j] = I::either(I::template left<4>(low[j]), more[j]);
      } else if (w.widths[f] == 2) {
        for (int n = 0; n < 2; ++n) {
          B v = line(f, n);
          for (int s = 0; s < 4; ++s, v = I::template right<2>(v))
            low[4 * n + s] = I::either(I::template left<2>(low[4 * n + s]), I::both(v, I::splat(0x03)));
        }
      } else {
        B v = line(f, 0);
        for (int b = 0; b < 8; ++b, v = I::template right<1>(v)) {
          const int j = b / 2 + (b % 2 ? 0 : 4);
          low[j] = I::either(I::template left<1>(low[j]), I::both(v, I::splat(0x01)));
        }
      }
    }
    if constexpr (I::kSplit) {
      for (int j = 0; j < 8; ++j) {
        high[j] = nibble<I>(I::template right<4>(low[j]));
        low[j] = nibble<I>(low[j]);
      }
    }
  }
  if constexpr (I::kSigned) {
    if (w.bits == 8)
      for (int j = 0; j < 8; ++j) low[j] = I::differ(low[j], I::splat(0x80));
  }
}

// A 2-bit field with every odd step times four, which saves its shift.
template <class I>
LILLIPUT_INLINE void unpack_quads(const NestedView& w, int64_t tile, int part, typename I::Bytes codes[8]) {
  for (int n = 0; n < 2; ++n) {
    const auto v = I::load(w.planes[0] + tile * 128 + 64 * n + 4 * I::kRows * part), u = I::template right<4>(v);
    codes[4 * n] = I::both(v, I::splat(0x03));
    codes[4 * n + 1] = I::both(v, I::splat(0x0c));
    codes[4 * n + 2] = I::both(u, I::splat(0x03));
    codes[4 * n + 3] = I::both(u, I::splat(0x0c));
  }
}

template <class I, Cut C>
constexpr bool has_high = I::kSplit && (C == Cut::f2114 || C == Cut::f44 || C == Cut::any);

// Scales and zeros of one group and I::kRows rows.
template <class I>
struct GroupGrid {
  typename I::Floats scale, zero;
};

template <class I>
LILLIPUT_INLINE GroupGrid<I> grid_at(const NestedView& w, int64_t row_tile, int64_t groups, int64_t g, int part) {
  const int64_t at = (row_tile * groups + g) * kTileRows + part * I::kRows;
  GroupGrid<I> grid;
  if (w.grid_bytes == 1) {
    grid.scale = I::smalls(w.scale + at);
    grid.zero = w.zero ? I::wholes(reinterpret_cast<const int8_t*>(w.zero) + at) : I::zero();
  } else {
    grid.scale = I::halves(reinterpret_cast<const uint16_t*>(w.scale) + at);
    grid.zero = w.zero ? I::halves(reinterpret_cast<const uint16_t*>(w.zero) + at) : I::zero();
  }
  if (w.factor) {
    grid.scale = grid.scale * I::load_floats(w.factor + row_tile * kTileRows + part * I::kRows);
    grid.zero = grid.zero * I::load_floats(w.inverse() + row_tile * kTileRows + part * I::kRows);
  }
  return grid;
}

// Codes as they are stored, unpacked where they are used.
template <class I, Cut C>
struct Packed {
  const NestedView& w;
  int64_t first;  // tile of input 0

  // Streams of a row of tiles are a few lines each; asking for the lines some tiles ahead keeps all of them coming.
  inline __attribute__((always_inline)) void fetch(int64_t tile) const {
    for (int f = 0; f < fields_in<C>(w); ++f) {
      const uint8_t* bytes = w.planes[f] + (first + tile + kAhead) * 64 * width_in<C>(w, f);
      for (int n = 0; n < width_in<C>(w, f); ++n) __builtin_prefetch(bytes + 64 * n);
    }
  }
  inline __attribute__((always_inline)) void codes(int64_t tile, int part, typename I::Bytes low[8],
                                                   typename I::Bytes high[8]) const {
    unpack<I, C>(w, first + tile, part, low, high);
  }
  inline __attribute__((always_inline)) void quads(int64_t tile, int part, typename I::Bytes codes[8]) const {
    unpack_quads<I>(w, first + tile, part, codes);
  }
  inline __attribute__((always_inline)) GroupGrid<I> grid(int64_t row_tile, int64_t groups, int64_t g, int part) const {
    return grid_at<I>(w, row_tile, groups, g, part);
  }
  static constexpr int64_t kAhead = 16;
  static constexpr bool kPacked = true;
};

// Codes unpacked beforehand: for each tile eight lines of low parts, then eight of high ones if there are any. Those of
// the cut f21 are halved again, which costs little here, so that int16 holds two tiles of them. And scales and zeros in
// float32, sixteen of each a group.
template <class I, Cut C>
struct Panel {
  static constexpr int64_t kTile = has_high<I, C> ? 1024 : 512;
  uint8_t* data;
  float* grids = nullptr;

  inline __attribute__((always_inline)) void fetch(int64_t) const {}
  inline __attribute__((always_inline)) GroupGrid<I> grid(int64_t, int64_t, int64_t g, int part) const {
    const float* from = grids + g * 2 * kTileRows + part * I::kRows;
    return {I::load_floats(from), I::load_floats(from + kTileRows)};
  }
  inline __attribute__((always_inline)) void fill_grid(const NestedView& w, int64_t row_tile, int64_t groups) const {
    for (int64_t g = 0; g < groups; ++g)
      for (int part = 0; part < kTileRows / I::kRows; ++part) {
        const GroupGrid<I> own = grid_at<I>(w, row_tile, groups, g, part);
        float* to = grids + g * 2 * kTileRows + part * I::kRows;
        I::store(to, own.scale);
        I::store(to + kTileRows, own.zero);
      }
  }
  inline __attribute__((always_inline)) void fill(const NestedView& w, int64_t first, int64_t tiles) const {
    const Packed<I, C> from{w, first};
    for (int64_t tile = 0; tile < tiles; ++tile) {
      from.fetch(tile);
      for (int part = 0; part < kTileRows / I::kRows; ++part) {
        typename I::Bytes low[8], high[8];
        from.codes(tile, part, low, high);
        uint8_t* to = data + tile * kTile + 4 * I::kRows * part;
        for (int j = 0; j < 8; ++j) I::keep(to + 64 * j, C == Cut::f21 ? I::template right<1>(low[j]) : low[j]);
        if constexpr (has_high<I, C>)
          for (int j = 0; j < 8; ++j) I::keep(to + 512 + 64 * j, high[j]);
      }
    }
  }
  inline __attribute__((always_inline)) void lines(int64_t tile, int part, int from, typename I::Bytes to[8]) const {
    for (int j = 0; j < 8; ++j) to[j] = I::load(data + tile * kTile + from + 64 * j + 4 * I::kRows * part);
  }
  static constexpr bool kPacked = false;
};

// What a group of a token adds apart from its products, (tokens of a block, groups) each.
struct Terms {
  int32_t* middle;  // (1 - 2^bits) sum; sum where codes come lowered by 128
  float* twice;     // 2 sum
  float* half;      // scale / 2
};

template <class I>
LILLIPUT_INLINE int32_t middle_factor(const NestedView& w) {
  return I::kSigned && w.bits == 8 ? 1 : 1 - (1 << w.bits);
}

template <class I>
LILLIPUT_INLINE void fill_terms(const NestedView& w, const QuantizedView& x, int64_t first_token, int64_t count,
                                const Terms& to) {
  const int32_t middle = middle_factor<I>(w);
  const int64_t at = first_token * x.groups, size = count * x.groups;
  for (int64_t n = 0; n < size; ++n) to.middle[n] = middle * x.sum[at + n];
  for (int64_t n = 0; n < size; ++n) to.twice[n] = static_cast<float>(2 * x.sum[at + n]);
  for (int64_t n = 0; n < size; ++n) to.half[n] = x.scale[at + n] * 0.5f;
}

// Everything is doubled, which costs nothing where widening multiplies and for codes that are doubled already.
template <Cut C, bool kPacked>
constexpr bool codes_doubled = C == Cut::f21 && kPacked;
template <class I, Cut C, bool kPacked>
constexpr int twice = I::kSplit && !codes_doubled<C, kPacked> ? 2 : 1;
template <class I, Cut C, bool kPacked>
constexpr bool sums_doubled = I::kSplit || codes_doubled<C, kPacked>;

// `Times` the products of `Tiles` tiles added to the sums. Partial sums in int16 hold those of two tiles of 2-bit codes.
template <class I, Cut C, int T, int Tiles, int Times, class Source>
LILLIPUT_INLINE void add_tiles(const Source& source, int64_t tile, int part, const int8_t* const codes[T],
                               typename I::Sums sums[T]) {
  using B = typename I::Bytes;
  using P = typename I::Partial;
  B low[8], high[8];
  P p[T], q[T];
  for (int t = 0; t < T; ++t) p[t] = q[t] = I::begin();
  for (int n = 0; n < Tiles; ++n) {
    const int64_t at = (tile + n) * kTileInputs;
    if constexpr (I::kSplit && C == Cut::f2 && T == 1 && Source::kPacked) {
      source.quads(tile + n, part, low);
      I::template steps<T, 0, 2>(p, low, codes, at);
      I::template steps<T, 1, 2>(q, low, codes, at);
    } else {
      if constexpr (Source::kPacked)
        source.codes(tile + n, part, low, high);
      else
        source.lines(tile + n, part, 0, low);
      if constexpr (has_high<I, C>) {
        if constexpr (!Source::kPacked) source.lines(tile + n, part, 512, high);
        I::template both_steps<T>(p, q, low, high, codes, at);
      } else {
        I::template steps<T, 0, 1>(p, low, codes, at);
      }
    }
  }
  for (int t = 0; t < T; ++t) {
    sums[t] = I::template widen<Times>(sums[t], p[t]);
    if constexpr (has_high<I, C>) sums[t] = I::template widen<16 * Times>(sums[t], q[t]);
    if constexpr (I::kSplit && C == Cut::f2 && T == 1 && Source::kPacked)
      sums[t] = sums[t] + (I::template widen<2>(I::none(), q[t]) >> 2);
  }
}

// Scales and zeros come too slowly for the processor to foresee: those of a group are asked for a row of tiles ahead.
LILLIPUT_INLINE void fetch_grid(const NestedView& w, int64_t row_tile, int64_t groups, int64_t g) {
  const int64_t at = ((row_tile + 1) * groups + g) * kTileRows * w.grid_bytes;
  __builtin_prefetch(w.scale + at);
  if (w.zero) __builtin_prefetch(w.zero + at);
}

// One row of tiles against `count` of `T` tokens; the places beyond `count` compute the first token once more. `terms`
// begins at the first token.
template <class I, Cut C, int T, class Source>
LILLIPUT_INLINE void multiply_tokens(const NestedView& w, int64_t row_tile, const Source& source, const QuantizedView& x,
                                     const Terms& terms, int64_t first_token, int count, float* y, int64_t ldy) {
  using F = typename I::Floats;
  constexpr int kParts = kTileRows / I::kRows;
  constexpr int kRun = I::kSplit && C == Cut::f2 ? 2 : 1, kTimes = twice<I, C, Source::kPacked>;
  const int64_t input_tiles = x.stride / kTileInputs, group_tiles = (w.group + kTileInputs - 1) / kTileInputs;
  const int64_t rest = w.out - row_tile * kTileRows, rows = rest < kTileRows ? rest : kTileRows;
  const int8_t* codes[T];
  int64_t place[T];
  for (int t = 0; t < T; ++t) {
    const int64_t token = t < count ? t : 0;
    codes[t] = x.codes + (first_token + token) * x.stride;
    place[t] = token * x.groups;
  }
  alignas(64) float result[T * kTileRows] = {};
  for (int64_t g = 0, tile = 0; g < x.groups; ++g) {
    const int64_t end = input_tiles - tile < group_tiles ? input_tiles : tile + group_tiles;
    typename I::Sums dots[kParts][T];
    for (int part = 0; part < kParts; ++part)
      for (int t = 0; t < T; ++t) dots[part][t] = I::none();
    for (; tile < end; tile += kRun) {
      for (int n = 0; n < kRun; ++n) source.fetch(tile + n);
      for (int part = 0; part < kParts; ++part) {
        if (kRun == 2 && tile + 1 < end)
          add_tiles<I, C, T, kRun, kTimes>(source, tile, part, codes, dots[part]);
        else
          add_tiles<I, C, T, 1, kTimes>(source, tile, part, codes, dots[part]);
      }
    }
    tile = end;
    if constexpr (Source::kPacked) fetch_grid(w, row_tile, x.groups, g);
    for (int part = 0; part < kParts; ++part) {
      const GroupGrid<I> grid = source.grid(row_tile, x.groups, g, part);
      for (int t = 0; t < T; ++t) {
        const auto d = sums_doubled<I, C, Source::kPacked> ? dots[part][t] : dots[part][t] + dots[part][t];
        F e = I::to_floats(d + I::spread_sum(terms.middle[place[t] + g]));
        if (w.zero) e = e - grid.zero * I::spread(terms.twice[place[t] + g]);
        float* to = result + t * kTileRows + part * I::kRows;
        I::store(to, I::load_floats(to) + (grid.scale * I::spread(terms.half[place[t] + g])) * e);
      }
    }
    if (T > 1) asm volatile("" : : "r"(result) : "memory");  // kept in memory: registers are for the partial sums
  }
  for (int t = 0; t < count; ++t) {
    float* to = y + (first_token + t) * ldy + row_tile * kTileRows;
    if (rows == kTileRows)
      std::memcpy(to, result + t * kTileRows, kTileRows * sizeof(float));
    else
      for (int64_t r = 0; r < rows; ++r) to[r] = result[t * kTileRows + r];
  }
}

template <class I, Cut C, class Source>
static __attribute__((noinline)) void multiply_one(const NestedView& w, int64_t row_tile, const Source& source,
                                                   const QuantizedView& x, const Terms& terms, int64_t t, float* y,
                                                   int64_t ldy) {
  multiply_tokens<I, C, 1>(w, row_tile, source, x, terms, t, 1, y, ldy);
}

template <class I, Cut C, class Source>
static __attribute__((noinline)) void multiply_some(const NestedView& w, int64_t row_tile, const Source& source,
                                                    const QuantizedView& x, const Terms& terms, int64_t t, int count,
                                                    float* y, int64_t ldy) {
  if (count <= 2)
    multiply_tokens<I, C, 2>(w, row_tile, source, x, terms, t, count, y, ldy);
  else if (count <= 4)
    multiply_tokens<I, C, 4>(w, row_tile, source, x, terms, t, count, y, ldy);
  else if constexpr (Source::kPacked || I::kAbreast == 1)
    multiply_tokens<I, C, I::kBlock>(w, row_tile, source, x, terms, t, count, y, ldy);
}

// A block of tokens as the rows of tiles abreast read it: one stream, whatever the tokens are apart.
template <class I>
struct Block {
  int8_t* codes;  // (inputs / 4, kBlock, 4)
  Terms terms;    // (groups, kBlock) each

  // The places beyond `count` hold the first token once more.
  inline __attribute__((always_inline)) void fill(const NestedView& w, const QuantizedView& x, int64_t first_token,
                                                  int count) const {
    const void *at[I::kBlock], *sum[I::kBlock], *scale[I::kBlock];
    for (int t = 0; t < I::kBlock; ++t) {
      const int64_t token = first_token + (t < count ? t : 0);
      at[t] = x.codes + token * x.stride;
      sum[t] = x.sum + token * x.groups;
      scale[t] = x.scale + token * x.groups;
    }
    I::interleave(at, x.stride / 4, codes);
    I::interleave(sum, x.groups, terms.middle);
    I::interleave(scale, x.groups, terms.half);
    const int32_t middle = middle_factor<I>(w);
    const int64_t size = x.groups * I::kBlock;
    for (int64_t n = 0; n < size; ++n) terms.twice[n] = static_cast<float>(2 * terms.middle[n]);
    for (int64_t n = 0; n < size; ++n) terms.middle[n] *= middle;
    for (int64_t n = 0; n < size; ++n) terms.half[n] *= 0.5f;
  }
};

// `Times` the products of `Tiles` tiles of R rows of tiles, `apart` bytes between them, and a block added to the sums.
template <class I, Cut C, int R, int Tiles, int Times>
LILLIPUT_INLINE void add_abreast(const uint8_t* lines, int64_t apart, const int8_t* x,
                                 typename I::Sums sums[R][I::kBlock]) {
  constexpr int T = I::kBlock;
  typename I::Partial p[R][T], q[R][T];
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) p[r][t] = q[r][t] = I::begin();
#pragma GCC unroll 2
  for (int n = 0; n < Tiles; ++n)
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      typename I::Bytes low[R], high[R];
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) {
        const uint8_t* line = lines + r * apart + n * Panel<I, C>::kTile + 64 * j;
        low[r] = I::load(line);
        if constexpr (has_high<I, C>) high[r] = I::load(line + 512);
      }
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const typename I::Bytes four = I::inputs(x + 4 * ((8 * n + j) * T + t));
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) {
          p[r][t] = I::more(p[r][t], low[r], four);
          I::hold(p[r][t]);
          if constexpr (has_high<I, C>) {
            q[r][t] = I::more(q[r][t], high[r], four);
            I::hold(q[r][t]);
          }
        }
      }
    }
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      sums[r][t] = I::template widen<Times>(sums[r][t], p[r][t]);
      if constexpr (has_high<I, C>) sums[r][t] = I::template widen<16 * Times>(sums[r][t], q[r][t]);
    }
}

// R rows of tiles from `row_tile` on, unpacked from `panel` on, against `count` of a block of tokens. A broadcast of
// four inputs serves all of the rows; only the partial sums of a few tiles stay in registers.
template <class I, Cut C, int R>
static __attribute__((noinline)) void multiply_abreast(const NestedView& w, int64_t row_tile, const Panel<I, C>& panel,
                                                       const Block<I>& block, int64_t input_tiles, int64_t groups,
                                                       int count, float* y, int64_t ldy) {
  using F = typename I::Floats;
  static_assert(I::kRows == kTileRows);
  constexpr int T = I::kBlock, kTimes = twice<I, C, false>;
  constexpr int kRun = I::kSplit && (C == Cut::f2 || C == Cut::f21) ? 2 : 1;
  const int64_t group_tiles = (w.group + kTileInputs - 1) / kTileInputs, apart = input_tiles * Panel<I, C>::kTile;
  const uint8_t* lines = panel.data;
  const int8_t* codes = block.codes;
  const int32_t* middle = block.terms.middle;
  const float *twice_sum = block.terms.twice, *half = block.terms.half;
  alignas(64) float result[R][T][kTileRows] = {};
  for (int64_t g = 0, left = input_tiles; g < groups; ++g, middle += T, twice_sum += T, half += T) {
    alignas(64) typename I::Sums sums[R][T];
    for (int t = 0; t < T; ++t) {
      const auto first = sums_doubled<I, C, false> ? I::spread_sum(middle[t]) : I::none();
      for (int r = 0; r < R; ++r) sums[r][t] = first;
    }
    const int64_t rest = left < group_tiles ? 0 : left - group_tiles;
    while (left > rest) {
      asm volatile("" : "+m"(sums));  // kept in memory: registers are for the partial sums
      const int run = kRun == 2 && left - rest > 1 ? 2 : 1;
      if (run == kRun)
        add_abreast<I, C, R, kRun, kTimes>(lines, apart, codes, sums);
      else
        add_abreast<I, C, R, 1, kTimes>(lines, apart, codes, sums);
      lines += run * Panel<I, C>::kTile;
      codes += run * kTileInputs * T;
      left -= run;
    }
    for (int r = 0; r < R; ++r) {
      const GroupGrid<I> grid = Panel<I, C>{nullptr, panel.grids + r * groups * 2 * kTileRows}.grid(0, 0, g, 0);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const auto d = sums_doubled<I, C, false> ? sums[r][t] : sums[r][t] + sums[r][t] + I::spread_sum(middle[t]);
        F e = I::to_floats(d);
        if (w.zero) e = e - grid.zero * I::spread(twice_sum[t]);
        I::store(result[r][t], I::load_floats(result[r][t]) + (grid.scale * I::spread(half[t])) * e);
      }
    }
    asm volatile("" : "+m"(result));
  }
  for (int r = 0; r < R; ++r) {
    const int64_t rest = w.out - (row_tile + r) * kTileRows, rows = rest < kTileRows ? rest : kTileRows;
    for (int t = 0; t < count; ++t) {
      float* to = y + t * ldy + (row_tile + r) * kTileRows;
      if (rows == kTileRows)
        I::store(to, I::load_floats(result[r][t]));
      else
        for (int64_t n = 0; n < rows; ++n) to[n] = result[r][t][n];
    }
  }
}

template <class I, Cut C>
LILLIPUT_INLINE void multiply_cut(const NestedView& w, const QuantizedView& x, int64_t tokens, float* y, int64_t ldy,
                                  int64_t tile_begin, int64_t tile_end, uint8_t* scratch) {
  const int64_t input_tiles = x.stride / kTileInputs, most_terms = kMostI8Tokens * x.groups;
  uint8_t* data = scratch + (64 - reinterpret_cast<uintptr_t>(scratch) % 64) % 64;
  auto* floats = reinterpret_cast<float*>(data);
  const Terms terms{reinterpret_cast<int32_t*>(data), floats + most_terms, floats + 2 * most_terms};
  if (tokens <= I::kBlock) {  // the codes are used at once: no panel
    fill_terms<I>(w, x, 0, tokens, terms);
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
      const Packed<I, C> source{w, tile * input_tiles};
      if (tokens == 1)
        multiply_one<I, C>(w, tile, source, x, terms, 0, y, ldy);
      else
        multiply_some<I, C>(w, tile, source, x, terms, 0, static_cast<int>(tokens), y, ldy);
    }
    return;
  }
  data += terms_bytes(w.columns);
  auto* block_codes = reinterpret_cast<int8_t*>(data);
  data += kMostI8Tokens * x.stride;
  auto* grids = reinterpret_cast<float*>(data);
  data += panel_grid_bytes(w.columns);
  const int64_t most = panel_tiles(w.columns, has_high<I, C> ? 2 : 1);
  for (int64_t begin = tile_begin; begin < tile_end; begin += most) {
    const int64_t count = tile_end - begin < most ? tile_end - begin : most;
    const auto panel = [&](int64_t n) {
      return Panel<I, C>{data + n * input_tiles * Panel<I, C>::kTile, grids + n * x.groups * 2 * kTileRows};
    };
    for (int64_t n = 0; n < count; ++n) {
      panel(n).fill(w, (begin + n) * input_tiles, input_tiles);
      panel(n).fill_grid(w, begin + n, x.groups);
    }
    for (int64_t t = 0; t < tokens; t += I::kBlock) {
      const int block = tokens - t < I::kBlock ? static_cast<int>(tokens - t) : I::kBlock;
      int64_t n = 0;
      if constexpr (I::kAbreast > 1) {
        constexpr int kRows = has_high<I, C> ? 1 : I::kAbreast;  // two nibbles share a broadcast as well
        if (block > I::kBlock / 2) {
          const Block<I> interleaved{block_codes, terms};
          interleaved.fill(w, x, t, block);
          float* to = y + t * ldy;
          for (; n + kRows <= count; n += kRows)
            multiply_abreast<I, C, kRows>(w, begin + n, panel(n), interleaved, input_tiles, x.groups, block, to, ldy);
          for (; n < count; ++n)
            multiply_abreast<I, C, 1>(w, begin + n, panel(n), interleaved, input_tiles, x.groups, block, to, ldy);
        }
      }
      if (n < count) fill_terms<I>(w, x, t, block, terms);
      for (; n < count; ++n) multiply_some<I, C>(w, begin + n, panel(n), x, terms, t, block, y, ldy);
    }
  }
}

template <class I>
LILLIPUT_INLINE void matmul_nested_i8_body(const NestedView& w, const QuantizedView& x, int64_t tokens, float* y,
                                           int64_t ldy, int64_t tile_begin, int64_t tile_end, uint8_t* scratch) {
  if (!fits_i8(w.columns, w.group))
    return matmul_nested_i8_reference(w, x, tokens, y, ldy, tile_begin, tile_end, scratch);
  switch (cut_of(w)) {
    case Cut::f2: return multiply_cut<I, Cut::f2>(w, x, tokens, y, ldy, tile_begin, tile_end, scratch);
    case Cut::f21: return multiply_cut<I, Cut::f21>(w, x, tokens, y, ldy, tile_begin, tile_end, scratch);
    case Cut::f211: return multiply_cut<I, Cut::f211>(w, x, tokens, y, ldy, tile_begin, tile_end, scratch);
    case Cut::f2114: return multiply_cut<I, Cut::f2114>(w, x, tokens, y, ldy, tile_begin, tile_end, scratch);
    case Cut::f4: return multiply_cut<I, Cut::f4>(w, x, tokens, y, ldy, tile_begin, tile_end, scratch);
    case Cut::f44: return multiply_cut<I, Cut::f44>(w, x, tokens, y, ldy, tile_begin, tile_end, scratch);
    case Cut::any: return multiply_cut<I, Cut::any>(w, x, tokens, y, ldy, tile_begin, tile_end, scratch);
  }
}

}  // namespace
}  // namespace lilliput
