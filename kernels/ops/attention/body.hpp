// The portable body of attention; each variant compiles it for its instruction set and block of rows.
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

// What a query carries from page to page.
struct State {
  float *p, *z, *most, *sum;
};

LILLIPUT_INLINE State state_of(float* scratch, int64_t row, int64_t stride) {
  float* at = scratch + row * (kPage + 2 * kLanes + stride);
  return {at, at + kPage, at + kPage + kLanes, at + kPage + 2 * kLanes};
}

// Puts `other` where positions are outside low .. high.
LILLIPUT_INLINE Floats masked(Floats s, int64_t base, int64_t low, int64_t high, float other) {
  if (base >= low && base + kLanes - 1 <= high) return s;
  const Ints place = numbered();
  const Ints outside = (place < static_cast<int32_t>(low - base)) | (place > static_cast<int32_t>(high - base));
  return select(outside, spread(other), s);
}

// Raw q . k of Rows queries and Tiles * 16 keys that begin at `from` into their p from `tile` on.
template <int Rows, int Tiles, class Cell>
LILLIPUT_INLINE void score_tiles(const Cell* from, int64_t dim, const float* const* q, const State* rows, int64_t tile) {
  Floats sum[Rows * Tiles];
#pragma GCC unroll 16
  for (int n = 0; n < Rows * Tiles; ++n) sum[n] = Floats{};
  for (int64_t d = 0; d < dim; ++d) {
#pragma GCC unroll 16
    for (int t = 0; t < Tiles; ++t) {
      const Floats key = load_cached(from + (t * dim + d) * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) sum[r * Tiles + t] += q[r][d] * key;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
    for (int t = 0; t < Tiles; ++t) store(rows[r].p + (tile + t) * kLanes, sum[r * Tiles + t]);
}

// From raw scores to weights: scales, cap, mask low .. high, softmax state. Returns the factor of the old sums.
LILLIPUT_INLINE float weigh(const AttentionView& kv, const float* key_scale, const State& row, int64_t low, int64_t high) {
  Floats s[kTiles];
  Floats most = spread(-__builtin_inff());
  const int64_t first = low / kLanes, last = high / kLanes;
  for (int64_t t = first; t <= last; ++t) {
    Floats v = load(row.p + t * kLanes);
    if (key_scale) v *= load(key_scale + t * kLanes);
    v *= kv.scale;
    if (kv.softcap > 0) v = kv.softcap * hyperbolic_tangent(v / kv.softcap);
    v = masked(v, t * kLanes, low, high, -__builtin_inff());
    most = select(v > most, v, most);
    s[t] = v;
  }
  const float before = row.most[0], here = largest(most), peak = here > before ? here : before;
  float lane[kLanes];
  store(lane, exponential(spread(before - peak)));
  const float keep = lane[0];
  Floats z = load(row.z) * keep;
  for (int64_t t = first; t <= last; ++t) {
    const Floats p = exponential(s[t] - peak);
    store(row.p + t * kLanes, p);
    z += p;
  }
  store(row.z, z);
  row.most[0] = peak;
  return keep;
}

// Sums of Rows queries, Block * 16 channels, over positions low .. high of a page; `from` is the channel at low.
template <int Rows, int Block, class Cell>
LILLIPUT_INLINE void mix_values(const Cell* from, const State* rows, const float* keep, int64_t low, int64_t high,
                                int64_t channel, int64_t stride) {
  Floats sum[Rows * Block];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
    for (int b = 0; b < Block; ++b) sum[r * Block + b] = load(rows[r].sum + channel + b * kLanes) * keep[r];
  for (int64_t j = low; j <= high; ++j, from += stride) {
#pragma GCC unroll 16
    for (int b = 0; b < Block; ++b) {
      const Floats value = load_cached(from + b * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) sum[r * Block + b] += rows[r].p[j] * value;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
    for (int b = 0; b < Block; ++b) store(rows[r].sum + channel + b * kLanes, sum[r * Block + b]);
}

template <int Rows, int Block, class Cell>
LILLIPUT_INLINE void mix_heads(const Cell* from, const State* rows, const float* keep, int64_t low, int64_t high,
                               int64_t stride) {
  int64_t channel = 0;
  for (; channel + Block * kLanes <= stride; channel += Block * kLanes)
    mix_values<Rows, Block>(from + channel, rows, keep, low, high, channel, stride);
  for (; channel < stride; channel += kLanes)
    mix_values<Rows, 1>(from + channel, rows, keep, low, high, channel, stride);
}

// One page and Rows queries that see the same positions low .. high of it.
template <int Rows, int Block, class Cell>
LILLIPUT_INLINE void take_page(const AttentionView& kv, int64_t page, const float* const* q, const State* rows, int64_t,
                               int64_t low, int64_t high, float*, const Cell*) {
  const int64_t dim = kv.head_dim, stride = head_stride(dim), last = high / kLanes;
  const Cell* keys = (const Cell*)(kv.pages[page] + kv.key_offset);
  const Cell* values = (const Cell*)(kv.pages[page] + kv.value_offset);
  const float* key_scale = kv.kept == Kept::int8 ? (const float*)(keys + kPage * dim) : nullptr;
  const float* value_scale = kv.kept == Kept::int8 ? (const float*)(values + kPage * stride) : nullptr;
  int64_t tile = low / kLanes;
  if (tile == 0 && last == kTiles - 1) {
    for (; tile < kTiles; tile += Block)
      score_tiles<Rows, Block>(keys + tile * dim * kLanes, dim, q, rows, tile);
  } else {
    for (; tile <= last; ++tile) score_tiles<Rows, 1>(keys + tile * dim * kLanes, dim, q, rows, tile);
  }
  float keep[Rows];
  for (int r = 0; r < Rows; ++r) {
    keep[r] = weigh(kv, key_scale, rows[r], low, high);
    if (!value_scale) continue;
    for (int64_t t = low / kLanes; t <= last; ++t)
      store(rows[r].p + t * kLanes, load(rows[r].p + t * kLanes) * load(value_scale + t * kLanes));
  }
  mix_heads<Rows, Block>(values + low * stride, rows, keep, low, high, stride);
}

// Raw q . k of Rows queries and a rounded group of keys into their p from `tile` on; scaled: Rows * head_stride floats.
template <int Rows>
LILLIPUT_INLINE void score_group(const uint8_t* codes, int64_t dim, const float* const* q, const State* rows,
                                 int64_t tile, float* scaled) {
  const int64_t stride = head_stride(dim);
  const uint16_t *scale = (const uint16_t*)(codes + 16 * dim), *least = scale + stride;
  Floats base[Rows];
  for (int r = 0; r < Rows; ++r) base[r] = Floats{};
  for (int64_t d = 0; d < dim; d += kLanes) {
    const Floats s = widen_half(scale + d), m = widen_half(least + d);
    for (int r = 0; r < Rows; ++r) {
      const Floats v = load_some(q[r] + d, dim - d);
      store(scaled + r * stride + d, v * s);
      base[r] += v * m;
    }
  }
  Floats sum[Rows * 2];
#pragma GCC unroll 16
  for (int n = 0; n < Rows * 2; ++n) sum[n] = Floats{};
  for (int64_t d = 0; d < dim; ++d) {
    Floats low, high;
    load_nibbles(codes + d * 16, low, high);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      sum[r * 2] += scaled[r * stride + d] * low;
      sum[r * 2 + 1] += scaled[r * stride + d] * high;
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
LILLIPUT_INLINE void mix_group(const uint8_t* codes, int64_t blocks, const State* rows, const float* keep, int64_t first,
                               int64_t low) {
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
#pragma GCC unroll 16
    for (int n = 0; n < Rows * 2; ++n)
      sum[n] = load(rows[n / 2].sum + block * kGroup + n % 2 * kLanes) * keep[n / 2];
    for (int64_t j = low; j < kGroup; ++j) {
      Floats left, right;
      load_nibbles(codes + j * 16, left, right);
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        sum[r * 2] += weight[r][j] * left;
        sum[r * 2 + 1] += weight[r][j] * right;
      }
    }
#pragma GCC unroll 16
    for (int n = 0; n < Rows * 2; ++n)
      store(rows[n / 2].sum + block * kGroup + n % 2 * kLanes, sum[n] + added[n / 2]);
  }
}

// The same of an int4 cache; own: the group that the queries are in.
template <int Rows, int Block>
LILLIPUT_INLINE void take_page(const AttentionView& kv, int64_t page, const float* const* q, const State* rows,
                               int64_t own, int64_t low, int64_t high, float* scaled, const Nibbles*) {
  constexpr int64_t kTilesOfGroup = kGroup / kLanes, kGroups = kPage / kGroup;
  const int64_t dim = kv.head_dim, stride = head_stride(dim), from = low / kGroup, to = high / kGroup;
  for (int64_t g = from; g <= to; ++g) {
    const int64_t group = page * kGroups + g, tile = g * kTilesOfGroup;
    if (group > 0 && group < own) {
      score_group<Rows>(kv.pages[page] + kv.key_offset + g * key_group_bytes(dim), dim, q, rows, tile, scaled);
      continue;
    }
    const float* keys = kv.near_keys + (group > 0 ? kGroup * dim : 0);
    for (int64_t t = 0; t < kTilesOfGroup; ++t)
      if (tile + t >= low / kLanes && tile + t <= high / kLanes)
        score_tiles<Rows, 1>(keys + t * dim * kLanes, dim, q, rows, tile + t);
  }
  float keep[Rows];
  for (int r = 0; r < Rows; ++r) keep[r] = weigh(kv, nullptr, rows[r], low, high);
  for (int64_t g = from; g <= to; ++g) {
    const int64_t group = page * kGroups + g, first = g * kGroup;
    const int64_t begin = low > first ? low : first, end = high < first + kGroup ? high : first + kGroup - 1;
    if (group > 0 && group < own) {
      mix_group<Rows>(kv.pages[page] + kv.value_offset + g * value_group_bytes(dim), head_blocks(dim), rows, keep, first,
                      begin - first);
    } else {
      const float* values = kv.near_values + ((group > 0 ? kGroup : 0) + begin - first) * stride;
      mix_heads<Rows, Block>(values, rows, keep, begin, end, stride);
    }
    for (int r = 0; r < Rows; ++r) keep[r] = 1;  // the old sums are scaled once a page
  }
}

template <int Rows, int Block, class Cell>
LILLIPUT_INLINE void attend_pages(const AttentionView& kv, const QueryRows& rows, int64_t begin, int64_t end,
                                  float* scratch) {
  const int64_t dim = kv.head_dim, stride = head_blocks(dim) * kGroup, count = end - begin;
  float* scaled = scratch + kQueryRows * query_floats(dim);
  State state[kQueryRows] = {};
  const float* q[kQueryRows] = {};
  int64_t first[kQueryRows] = {}, last[kQueryRows] = {};
  for (int64_t n = 0; n < count; ++n) {
    const int64_t row = begin + n;
    state[n] = state_of(scratch, n, stride);
    store(state[n].z, Floats{});
    state[n].most[0] = -__builtin_inff();
    for (int64_t d = 0; d < stride; d += kLanes) store(state[n].sum + d, Floats{});
    q[n] = rows.q + row / rows.group * rows.ld + row % rows.group * dim;
    last[n] = rows.position + row / rows.group;
    first[n] = kv.window > 0 && last[n] >= kv.window ? last[n] - kv.window + 1 : 0;
  }
  const int64_t own = last[0] / kGroup;
  const Cell* cell = nullptr;  // picks the kind of page
  for (int64_t page = first[0] / kPage; page <= last[count - 1] / kPage; ++page) {
    const int64_t base = page * kPage;
    for (int64_t n = 0; n < count;) {
      const int64_t low = first[n] > base ? first[n] - base : 0;
      const int64_t high = last[n] - base < kPage ? last[n] - base : kPage - 1;
      if (low > high || low >= kPage) {
        ++n;
        continue;
      }
      // rows that see the same part of the page go together; firsts and lasts ascend
      const int64_t other = n + Rows - 1;
      if (other < count && (first[other] == first[n] || first[other] <= base) &&
          (last[other] == last[n] || last[n] - base >= kPage - 1)) {
        take_page<Rows, Block>(kv, page, q + n, state + n, own, low, high, scaled, cell);
        n += Rows;
      } else {
        take_page<1, Block>(kv, page, q + n, state + n, own, low, high, scaled, cell);
        ++n;
      }
    }
  }
  for (int64_t n = 0; n < count; ++n) {
    const int64_t row = begin + n;
    float* y = rows.y + row / rows.group * rows.ld + row % rows.group * dim;
    const float z = total(load(state[n].z));
    for (int64_t d = 0; d < dim; ++d) y[d] = state[n].sum[d] / z;
  }
}

template <int Rows, int Block>
LILLIPUT_INLINE void attention_body(const AttentionView& kv, const QueryRows& rows, int64_t begin, int64_t end,
                                    float* scratch) {
  switch (kv.kept) {
    case Kept::float32: return attend_pages<Rows, Block, float>(kv, rows, begin, end, scratch);
    case Kept::int8: return attend_pages<Rows, Block, int8_t>(kv, rows, begin, end, scratch);
    case Kept::int4: return attend_pages<Rows, Block, Nibbles>(kv, rows, begin, end, scratch);
    case Kept::codes8:
    case Kept::codes16: return;  // attention_integer has them
  }
}

}  // namespace
}  // namespace lilliput
