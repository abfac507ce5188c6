// The portable body of attention; each variant compiles it for its instruction set and block of rows.
#pragma once

#include "ops/attention/attention.hpp"
#include "ops/vec.hpp"

namespace lilliput {
namespace {

constexpr int kTiles = kPage / kLanes;

typedef int8_t Bytes16 __attribute__((vector_size(16)));
typedef int16_t Shorts __attribute__((vector_size(32)));

LILLIPUT_INLINE Floats load_bytes(const int8_t* from) {
  Bytes16 v;
  std::memcpy(&v, from, sizeof v);
  // by way of 16 bits: gcc takes one step of widening as one instruction and two as sixteen scalars
  return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(v, Shorts), Ints), Floats);
}

LILLIPUT_INLINE Floats load_cached(const float* from) { return load(from); }
LILLIPUT_INLINE Floats load_cached(const int8_t* from) { return load_bytes(from); }

// What a query carries from page to page.
struct State {
  float *p, *z, *most, *sum;
};

LILLIPUT_INLINE State state_of(float* scratch, int64_t row, int64_t stride) {
  float* at = scratch + row * (kPage + 2 * kLanes + stride);
  return {at, at + kPage, at + kPage + kLanes, at + kPage + 2 * kLanes};
}

LILLIPUT_INLINE Floats masked(Floats s, int64_t base, int64_t low, int64_t high) {
  if (base >= low && base + kLanes - 1 <= high) return s;
  float lane[kLanes];
  store(lane, s);
  for (int64_t l = 0; l < kLanes; ++l)
    if (base + l < low || base + l > high) lane[l] = -__builtin_inff();
  return load(lane);
}

// Raw q . k of Rows queries and Tiles * 16 keys into their p.
template <int Rows, int Tiles, class Cell>
LILLIPUT_INLINE void score_tiles(const Cell* keys, int64_t dim, const float* const* q, const State* rows, int64_t tile) {
  Floats sum[Rows * Tiles];
#pragma GCC unroll 16
  for (int n = 0; n < Rows * Tiles; ++n) sum[n] = Floats{};
  const Cell* from = keys + tile * dim * kLanes;
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
    v = masked(v, t * kLanes, low, high);
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

// Sums of Rows queries, Block * 16 channels, over positions low .. high of a page.
template <int Rows, int Block, class Cell>
LILLIPUT_INLINE void mix_values(const Cell* values, const State* rows, const float* keep, int64_t low, int64_t high,
                                int64_t channel, int64_t stride) {
  Floats sum[Rows * Block];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
    for (int b = 0; b < Block; ++b) sum[r * Block + b] = load(rows[r].sum + channel + b * kLanes) * keep[r];
  const Cell* from = values + low * stride + channel;
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

// One page and Rows queries that see the same positions low .. high of it.
template <int Rows, int Block, class Cell>
LILLIPUT_INLINE void take_page(const AttentionView& kv, const Cell* keys, const float* key_scale, const Cell* values,
                               const float* value_scale, const float* const* q, const State* rows, int64_t low,
                               int64_t high) {
  const int64_t stride = head_stride(kv.head_dim), last = high / kLanes;
  int64_t tile = low / kLanes;
  if (tile == 0 && last == kTiles - 1) {
    for (; tile < kTiles; tile += Block) score_tiles<Rows, Block>(keys, kv.head_dim, q, rows, tile);
  } else {
    for (; tile <= last; ++tile) score_tiles<Rows, 1>(keys, kv.head_dim, q, rows, tile);
  }
  float keep[Rows];
  for (int r = 0; r < Rows; ++r) {
    keep[r] = weigh(kv, key_scale, rows[r], low, high);
    if (!value_scale) continue;
    for (int64_t t = low / kLanes; t <= last; ++t)
      store(rows[r].p + t * kLanes, load(rows[r].p + t * kLanes) * load(value_scale + t * kLanes));
  }
  int64_t channel = 0;
  for (; channel + Block * kLanes <= stride; channel += Block * kLanes)
    mix_values<Rows, Block>(values, rows, keep, low, high, channel, stride);
  for (; channel < stride; channel += kLanes) mix_values<Rows, 1>(values, rows, keep, low, high, channel, stride);
}

template <int Rows, int Block, class Cell>
LILLIPUT_INLINE void attend_pages(const AttentionView& kv, const QueryRows& rows, int64_t begin, int64_t end,
                                  float* scratch) {
  const int64_t dim = kv.head_dim, stride = head_stride(dim), count = end - begin;
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
  for (int64_t page = first[0] / kPage; page <= last[count - 1] / kPage; ++page) {
    const int64_t base = page * kPage;
    const Cell* keys = (const Cell*)(kv.pages[page] + kv.key_offset);
    const Cell* values = (const Cell*)(kv.pages[page] + kv.value_offset);
    const float* key_scale = kv.int8 ? (const float*)(keys + kPage * dim) : nullptr;
    const float* value_scale = kv.int8 ? (const float*)(values + kPage * stride) : nullptr;
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
        take_page<Rows, Block>(kv, keys, key_scale, values, value_scale, q + n, state + n, low, high);
        n += Rows;
      } else {
        take_page<1, Block>(kv, keys, key_scale, values, value_scale, q + n, state + n, low, high);
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
  if (kv.int8)
    attend_pages<Rows, Block, int8_t>(kv, rows, begin, end, scratch);
  else
    attend_pages<Rows, Block, float>(kv, rows, begin, end, scratch);
}

}  // namespace
}  // namespace lilliput
