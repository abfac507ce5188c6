// The portable body of attention; each variant compiles it for its instruction set and block of sums.
//
// Queries that share a head's keys go through a page together: all of them against a few tiles of its keys, then against
// the next, so that keys come from memory once a call and from the first cache once a block of queries. Values likewise,
// a few tiles of channels at a time.
#pragma once

#include "ops/attention/attention.hpp"
#include "ops/vec.hpp"

namespace lilliput {
namespace {

constexpr int kTiles = kPage / kLanes;

struct Nibbles {};  // the cell of an int4 page

// Sixteen low nibbles and sixteen high ones as floats.
LILLIPUT_INLINE void load_nibbles(const uint8_t* from, Floats& low, Floats& high) {
  const Ints wide = load_wide_bytes(from);
  low = to_floats(wide & 15);
  high = to_floats(wide >> 4);
}

LILLIPUT_INLINE Floats load_cached(const float* from) { return load(from); }
LILLIPUT_INLINE Floats load_cached(const int8_t* from) { return to_floats(load_wide_bytes(from)); }

// A query, what it carries from page to page, and what it sees of the page or group at hand.
struct Row {
  float *q, *p, *z, *sum;
  float most, keep;      // the largest score so far; the factor due to its old sums
  int64_t first, last;   // absolute positions it sees
  int64_t low, high;     // those of the page
  int64_t ahead;         // bytes from that page to the next
};

// f(n, count) for rows from .. to - 1 in blocks of `Rows`, then of half as many, down to one; count: a block's, as a type.
template <int N>
struct Count {
  static constexpr int value = N;
};
template <int Rows, class F>
LILLIPUT_INLINE void by_block(int64_t from, int64_t to, F f) {
  for (; from + Rows <= to; from += Rows) f(from, Count<Rows>{});
  if constexpr (Rows > 1)
    if (from < to) by_block<Rows / 2>(from, to, f);
}

// Puts `other` where positions are outside low .. high.
LILLIPUT_INLINE Floats masked(Floats s, int64_t base, int64_t low, int64_t high, float other) {
  if (base >= low && base + kLanes - 1 <= high) return s;
  const Ints place = numbered();
  const Ints outside = (place < static_cast<int32_t>(low - base)) | (place > static_cast<int32_t>(high - base));
  return select(outside, spread(other), s);
}

// Codes are used as they are where few rows leave little to do but wait for them, so the next page is asked for ahead:
// it lies far off, and what the processor fetches by itself ends with the 4 KiB it is in. Floats come fast enough.
template <class Cell>
LILLIPUT_INLINE void fetch_ahead(const Cell* from, const Row* rows) {
  if constexpr (sizeof(Cell) == 1) __builtin_prefetch(from + rows->ahead, 0, 2);
}

// Raw q . k of Rows queries and Tiles * 16 keys that begin at `from` into their p from `tile` on.
template <int Rows, int Tiles, class Cell>
LILLIPUT_INLINE void score_tiles(const Cell* from, int64_t dim, const Row* rows, int64_t tile) {
  Floats sum[Rows * Tiles];
#pragma GCC unroll 32
  for (int n = 0; n < Rows * Tiles; ++n) sum[n] = Floats{};
  for (int64_t d = 0; d < dim; ++d) {
    Floats key[Tiles];
#pragma GCC unroll 16
    for (int t = 0; t < Tiles; ++t) key[t] = load_cached(from + (t * dim + d) * kLanes);
    fetch_ahead(from + d * Tiles * kLanes, rows);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const Floats q = spread(rows[r].q[d]);
#pragma GCC unroll 16
      for (int t = 0; t < Tiles; ++t) sum[r * Tiles + t] = fused(q, key[t], sum[r * Tiles + t]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
    for (int t = 0; t < Tiles; ++t) store(rows[r].p + (tile + t) * kLanes, sum[r * Tiles + t]);
}

// Raw scores of rows from .. to - 1 and tiles of keys first .. last, the key at `keys` being that of tile `first`.
template <int Rows, int Tiles, class Cell>
LILLIPUT_INLINE void score(const Cell* keys, int64_t dim, const Row* rows, int64_t from, int64_t to, int64_t first,
                           int64_t last) {
  int64_t tile = first;
  for (; tile + Tiles <= last + 1; tile += Tiles)
    by_block<Rows>(from, to, [&](int64_t n, auto count) LILLIPUT_LAMBDA {
      constexpr int kRows = decltype(count)::value;  // lows and highs ascend
      if (rows[n + kRows - 1].high >= tile * kLanes && rows[n].low < (tile + Tiles) * kLanes)
        score_tiles<kRows, Tiles>(keys + (tile - first) * dim * kLanes, dim, rows + n, tile);
    });
  if constexpr (Tiles > 1)
    if (tile <= last) score<Rows, Tiles / 2>(keys + (tile - first) * dim * kLanes, dim, rows, from, to, tile, last);
}

// From raw scores to weights: scales, cap, mask, softmax state.
LILLIPUT_INLINE void weigh(const AttentionView& kv, const float* key_scale, const float* value_scale, Row& row) {
  Floats s[kTiles];
  Floats most = spread(-__builtin_inff());
  const int64_t first = row.low / kLanes, last = row.high / kLanes;
  for (int64_t t = first; t <= last; ++t) {
    Floats v = load(row.p + t * kLanes);
    if (key_scale) v *= load(key_scale + t * kLanes);
    v *= kv.scale;
    if (kv.softcap > 0) v = kv.softcap * hyperbolic_tangent(v / kv.softcap);
    v = masked(v, t * kLanes, row.low, row.high, -__builtin_inff());
    most = select(v > most, v, most);
    s[t] = v;
  }
  const float before = row.most, here = largest(most);
  row.keep = 1;
  if (!(here <= before)) {  // also where either is no number
    row.most = here > before ? here : before;
    float lane[kLanes];
    store(lane, exponential(spread(before - row.most)));
    row.keep = lane[0];
  }
  Floats z = load(row.z) * row.keep;
  for (int64_t t = first; t <= last; ++t) {
    const Floats p = exponential(s[t] - row.most);
    z += p;
    store(row.p + t * kLanes, value_scale ? p * load(value_scale + t * kLanes) : p);
  }
  store(row.z, z);
}

// Sums of Rows queries, Tiles * 16 channels, over positions low .. high of a page; `from` is the channel at low.
template <int Rows, int Tiles, class Cell>
LILLIPUT_INLINE void mix_values(const Cell* from, const Row* rows, const float* keep, int64_t low, int64_t high,
                                int64_t channel, int64_t stride) {
  Floats sum[Rows * Tiles];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
    for (int t = 0; t < Tiles; ++t) sum[r * Tiles + t] = load(rows[r].sum + channel + t * kLanes) * keep[r];
  for (int64_t j = low; j <= high; ++j, from += stride) {
    Floats value[Tiles];
#pragma GCC unroll 16
    for (int t = 0; t < Tiles; ++t) value[t] = load_cached(from + t * kLanes);
    fetch_ahead(from, rows);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const Floats p = spread(rows[r].p[j]);
#pragma GCC unroll 16
      for (int t = 0; t < Tiles; ++t) sum[r * Tiles + t] = fused(p, value[t], sum[r * Tiles + t]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
    for (int t = 0; t < Tiles; ++t) store(rows[r].sum + channel + t * kLanes, sum[r * Tiles + t]);
}

// Rows that see different positions have those in common go together, and what is before and behind one by one.
template <int Rows, int Tiles, class Cell>
LILLIPUT_INLINE void mix_block(const Cell* values, const Row* rows, int64_t channel, int64_t stride) {
  const auto from = [&](int64_t j) LILLIPUT_LAMBDA { return values + j * stride + channel; };
  const int64_t low = rows[Rows - 1].low, high = rows[0].high;
  float keep[Rows];
  for (int r = 0; r < Rows; ++r) keep[r] = rows[r].keep;
  for (int r = 0; r < Rows; ++r) {
    const int64_t before = (low < rows[r].high + 1 ? low : rows[r].high + 1) - 1;
    if (before < rows[r].low) continue;
    mix_values<1, Tiles>(from(rows[r].low), rows + r, keep + r, rows[r].low, before, channel, stride);
    keep[r] = 1;
  }
  if (low <= high) {
    mix_values<Rows, Tiles>(from(low), rows, keep, low, high, channel, stride);
    for (int r = 0; r < Rows; ++r) keep[r] = 1;
  }
  for (int r = 0; r < Rows; ++r) {
    const int64_t behind = low > high + 1 ? low : high + 1;
    if (behind <= rows[r].high)
      mix_values<1, Tiles>(from(behind), rows + r, keep + r, behind, rows[r].high, channel, stride);
  }
}

// Adds to the sums of rows from .. to - 1, from `channel` on, what each sees of `values`, (kPage, stride).
template <int Rows, int Tiles, class Cell>
LILLIPUT_INLINE void mix(const Cell* values, const Row* rows, int64_t from, int64_t to, int64_t stride,
                         int64_t channel = 0) {
  for (; channel + Tiles * kLanes <= stride; channel += Tiles * kLanes)
    by_block<Rows>(from, to, [&](int64_t n, auto count) LILLIPUT_LAMBDA {
      mix_block<decltype(count)::value, Tiles>(values, rows + n, channel, stride);
    });
  if constexpr (Tiles > 1)
    if (channel < stride) mix<Rows, Tiles / 2>(values, rows, from, to, stride, channel);
}

// One page and rows from .. to - 1, which see something of it.
template <int Rows, int Tiles, class Cell>
LILLIPUT_INLINE void take_page(const AttentionView& kv, const Cell* keys, const Cell* values, const float* key_scale,
                               const float* value_scale, Row* rows, int64_t from, int64_t to) {
  const int64_t dim = kv.head_dim, first = rows[from].low / kLanes, last = rows[to - 1].high / kLanes;
  score<Rows, Tiles>(keys + first * dim * kLanes, dim, rows, from, to, first, last);
  for (int64_t n = from; n < to; ++n) weigh(kv, key_scale, value_scale, rows[n]);
  mix<Rows, Tiles>(values, rows, from, to, head_stride(dim));
}

template <int Rows, int Tiles>
LILLIPUT_INLINE void take_page(const AttentionView& kv, int64_t page, Row* rows, int64_t from, int64_t to, float*,
                               const float*) {
  const float* keys = (const float*)(kv.pages[page] + kv.key_offset);
  const float* values = (const float*)(kv.pages[page] + kv.value_offset);
  take_page<Rows, Tiles>(kv, keys, values, nullptr, nullptr, rows, from, to);
}

// Codes of many rows are made floats once; wide: (kPage, head_dim) and (kPage, head_stride).
template <int Rows, int Tiles>
LILLIPUT_INLINE void take_page(const AttentionView& kv, int64_t page, Row* rows, int64_t from, int64_t to, float* wide,
                               const int8_t*) {
  const int64_t dim = kv.head_dim, stride = head_stride(dim);
  const int8_t* keys = (const int8_t*)(kv.pages[page] + kv.key_offset);
  const int8_t* values = (const int8_t*)(kv.pages[page] + kv.value_offset);
  const float *key_scale = (const float*)(keys + kPage * dim), *value_scale = (const float*)(values + kPage * stride);
  if (to - from < 2 * Rows)
    return take_page<Rows, Tiles>(kv, keys, values, key_scale, value_scale, rows, from, to);
  for (int64_t i = 0; i < kPage * dim; i += kLanes) store(wide + i, load_cached(keys + i));
  for (int64_t i = 0; i < kPage * stride; i += kLanes) store(wide + kPage * dim + i, load_cached(values + i));
  take_page<Rows, Tiles>(kv, (const float*)wide, (const float*)wide + kPage * dim, key_scale, value_scale, rows, from, to);
}

// Raw q . k of Rows queries and a rounded group of keys into their p from `tile` on; scaled: Rows * head_stride floats.
template <int Rows>
LILLIPUT_INLINE void score_group(const uint8_t* codes, int64_t dim, const Row* rows, int64_t tile, float* scaled) {
  const int64_t stride = head_stride(dim);
  const uint16_t *scale = (const uint16_t*)(codes + 16 * dim), *least = scale + stride;
  Floats base[Rows];
  for (int r = 0; r < Rows; ++r) base[r] = Floats{};
  for (int64_t d = 0; d < dim; d += kLanes) {
    const Floats s = widen_half(scale + d), m = widen_half(least + d);
    for (int r = 0; r < Rows; ++r) {
      const Floats v = load_some(rows[r].q + d, dim - d);
      store(scaled + r * stride + d, v * s);
      base[r] += v * m;
    }
  }
  Floats sum[Rows * 2];
#pragma GCC unroll 32
  for (int n = 0; n < Rows * 2; ++n) sum[n] = Floats{};
  for (int64_t d = 0; d < dim; ++d) {
    Floats low, high;
    load_nibbles(codes + d * 16, low, high);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const Floats q = spread(scaled[r * stride + d]);
      sum[r * 2] = fused(q, low, sum[r * 2]);
      sum[r * 2 + 1] = fused(q, high, sum[r * 2 + 1]);
    }
  }
  for (int r = 0; r < Rows; ++r) {
    const float b = total(base[r]);
    store(rows[r].p + tile * kLanes, sum[r * 2] + b);
    store(rows[r].p + (tile + 1) * kLanes, sum[r * 2 + 1] + b);
  }
}

// Sums of Rows queries over a rounded group of values, from position low of it to its end; first: its place in the page.
template <int Rows>
LILLIPUT_INLINE void mix_group(const uint8_t* codes, int64_t blocks, Row* rows, int64_t first, int64_t low) {
  const uint16_t *scale = (const uint16_t*)(codes + blocks * kGroup * 16), *least = scale + blocks * kGroup;
  for (int64_t block = 0; block < blocks; ++block, codes += kGroup * 16, scale += kGroup, least += kGroup) {
    float weight[Rows][kGroup], added[Rows];
    Floats sum[Rows * 2];
    for (int r = 0; r < Rows; ++r) {
      Floats minima = Floats{};
      for (int64_t l = low / kLanes * kLanes; l < kGroup; l += kLanes) {
        const Floats p = load(rows[r].p + first + l);
        store(weight[r] + l, p * widen_half(scale + l));
        // a position out of sight may hold what is no number
        minima += masked(p * widen_half(least + l), l, low, kGroup - 1, 0.0f);
      }
      added[r] = total(minima);
    }
#pragma GCC unroll 32
    for (int n = 0; n < Rows * 2; ++n)
      sum[n] = load(rows[n / 2].sum + block * kGroup + n % 2 * kLanes) * rows[n / 2].keep;
    for (int64_t j = low; j < kGroup; ++j) {
      Floats left, right;
      load_nibbles(codes + j * 16, left, right);
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        const Floats w = spread(weight[r][j]);
        sum[r * 2] = fused(w, left, sum[r * 2]);
        sum[r * 2 + 1] = fused(w, right, sum[r * 2 + 1]);
      }
    }
#pragma GCC unroll 32
    for (int n = 0; n < Rows * 2; ++n)
      store(rows[n / 2].sum + block * kGroup + n % 2 * kLanes, sum[n] + added[n / 2]);
  }
}

// Of an int4 cache all rows are in one group of positions; wide: Rows * head_stride floats.
template <int Rows, int Tiles>
LILLIPUT_INLINE void take_page(const AttentionView& kv, int64_t page, Row* rows, int64_t from, int64_t to, float* wide,
                               const Nibbles*) {
  constexpr int64_t kTilesOfGroup = kGroup / kLanes, kGroups = kPage / kGroup;
  const int64_t dim = kv.head_dim, stride = head_stride(dim), own = rows[from].last / kGroup;
  const int64_t begin = rows[from].low / kGroup, end = rows[to - 1].high / kGroup;
  for (int64_t g = begin; g <= end; ++g) {
    const int64_t group = page * kGroups + g, tile = g * kTilesOfGroup;
    if (group > 0 && group < own) {
      const uint8_t* codes = kv.pages[page] + kv.key_offset + g * key_group_bytes(dim);
      by_block<Rows>(from, to, [&](int64_t n, auto count) LILLIPUT_LAMBDA {
        score_group<decltype(count)::value>(codes, dim, rows + n, tile, wide);
      });
    } else {
      const float* keys = kv.near_keys + (group > 0 ? kGroup * dim : 0);
      score<Rows, Tiles>(keys, dim, rows, from, to, tile, tile + kTilesOfGroup - 1);
    }
  }
  for (int64_t n = from; n < to; ++n) weigh(kv, nullptr, nullptr, rows[n]);
  for (int64_t g = begin; g <= end; ++g) {
    const int64_t group = page * kGroups + g, first = g * kGroup, last = first + kGroup - 1;
    Row seen[kQueryRows];  // what each sees of the group
    int64_t count = 0;
    for (int64_t n = from; n < to && rows[n].low <= last; ++n) {  // lows ascend
      if (rows[n].high < first) continue;
      seen[count] = rows[n];
      rows[n].keep = 1;  // old sums are scaled once a page
      if (seen[count].low < first) seen[count].low = first;
      if (seen[count].high > last) seen[count].high = last;
      ++count;
    }
    if (group > 0 && group < own) {
      const uint8_t* codes = kv.pages[page] + kv.value_offset + g * value_group_bytes(dim);
      by_block<Rows>(0, count, [&](int64_t n, auto block) LILLIPUT_LAMBDA {
        constexpr int kRows = decltype(block)::value;
        if (seen[n].low == seen[n + kRows - 1].low)
          mix_group<kRows>(codes, head_blocks(dim), seen + n, first, seen[n].low - first);
        else
          for (int r = 0; r < kRows; ++r)
            mix_group<1>(codes, head_blocks(dim), seen + n + r, first, seen[n + r].low - first);
      });
    } else {
      const float* values = kv.near_values + ((group > 0 ? kGroup : 0) - first) * stride;
      mix<Rows, Tiles>(values, seen, 0, count, stride);
    }
  }
}

template <int Rows, int Tiles, class Cell>
LILLIPUT_INLINE void attend_pages(const AttentionView& kv, const QueryRows& queries, int64_t begin, int64_t end,
                                  float* scratch) {
  const int64_t dim = kv.head_dim, sums = head_blocks(dim) * kGroup, count = end - begin;
  if (count < 1) return;
  float* wide = scratch + kQueryRows * query_floats(dim);
  Row rows[kQueryRows];
  for (int64_t n = 0; n < count; ++n) {
    const int64_t row = begin + n;
    Row& to = rows[n];
    to.sum = scratch + n * query_floats(dim);
    to.q = to.sum + sums;
    to.z = to.q + head_stride(dim);
    to.p = to.z + kLanes;
    to.most = -__builtin_inff();
    store(to.z, Floats{});
    for (int64_t d = 0; d < sums; d += kLanes) store(to.sum + d, Floats{});
    const float* q = queries.q + row / queries.group * queries.ld + row % queries.group * dim;
    for (int64_t d = 0; d < dim; d += kLanes) store(to.q + d, load_some(q + d, dim - d));
    to.last = queries.position + row / queries.group;
    to.first = kv.window > 0 && to.last >= kv.window ? to.last - kv.window + 1 : 0;
  }
  const Cell* cell = nullptr;  // picks the kind of page
  int64_t from = 0, to = 0;    // of rows that see the page: firsts and lasts ascend
  for (int64_t page = rows[0].first / kPage; page <= rows[count - 1].last / kPage; ++page) {
    const int64_t base = page * kPage;
    while (rows[from].last < base) ++from;
    while (to < count && rows[to].first < base + kPage) ++to;
    for (int64_t n = from; n < to; ++n) {
      rows[n].low = rows[n].first > base ? rows[n].first - base : 0;
      rows[n].high = rows[n].last - base < kPage ? rows[n].last - base : kPage - 1;
      rows[n].ahead = page < rows[count - 1].last / kPage ? kv.pages[page + 1] - kv.pages[page] : 0;
    }
    take_page<Rows, Tiles>(kv, page, rows, from, to, wide, cell);
  }
  for (int64_t n = 0; n < count; ++n) {
    const int64_t row = begin + n;
    float* y = queries.y + row / queries.group * queries.ld + row % queries.group * dim;
    const float z = total(load(rows[n].z));
    for (int64_t d = 0; d < dim; ++d) y[d] = rows[n].sum[d] / z;
  }
}

// Rows * Tiles sums are in registers at a time.
template <int Rows, int Tiles>
LILLIPUT_INLINE void attention_body(const AttentionView& kv, const QueryRows& rows, int64_t begin, int64_t end,
                                    float* scratch) {
  switch (kv.kept) {
    case Kept::float32: return attend_pages<Rows, Tiles, float>(kv, rows, begin, end, scratch);
    case Kept::int8: return attend_pages<Rows, Tiles, int8_t>(kv, rows, begin, end, scratch);
    case Kept::int4: return attend_pages<Rows, Tiles, Nibbles>(kv, rows, begin, end, scratch);
    case Kept::codes8:
    case Kept::codes16: return;  // attention_integer has them
  }
}

}  // namespace
}  // namespace lilliput
