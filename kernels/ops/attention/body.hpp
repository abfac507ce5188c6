// The portable body of attention; each variant compiles it for its instruction set and block of keys.
#pragma once

#include "ops/attention/attention.hpp"
#include "ops/vec.hpp"

namespace lilliput {
namespace {

LILLIPUT_INLINE Floats masked(Floats s, int64_t base, int64_t first, int64_t last) {
  if (base >= first && base + kLanes - 1 <= last) return s;
  float lane[kLanes];
  store(lane, s);
  for (int64_t l = 0; l < kLanes; ++l)
    if (base + l < first || base + l > last) lane[l] = -__builtin_inff();
  return load(lane);
}

// Scores of Block * 16 keys from position `base` on, all within one page.
template <int Block>
LILLIPUT_INLINE void score_keys(const AttentionView& kv, const float* q, int64_t base, float* to) {
  const int64_t stride = kv.head_dim * kLanes;
  const float* keys = kv.pages[base / kPage] + kv.key_offset + (base % kPage) / kLanes * stride;
  Floats sum[Block];
  for (int b = 0; b < Block; ++b) sum[b] = Floats{};
  for (int64_t d = 0; d < kv.head_dim; ++d)
    for (int b = 0; b < Block; ++b) sum[b] += q[d] * load(keys + b * stride + d * kLanes);
  for (int b = 0; b < Block; ++b) {
    Floats s = sum[b] * kv.scale;
    if (kv.softcap > 0) s = kv.softcap * hyperbolic_tangent(s / kv.softcap);
    store(to + b * kLanes, s);
  }
}

// y[channel .. channel + 16 * Block) = sum of p[j] v[j] / z; p[0] belongs to position `begin`.
template <int Block>
LILLIPUT_INLINE void mix_values(const AttentionView& kv, const float* p, int64_t begin, int64_t first, int64_t last,
                                int64_t channel, int64_t stride, float z, float* y) {
  Floats sum[Block];
  for (int b = 0; b < Block; ++b) sum[b] = Floats{};
  for (int64_t j = first; j <= last;) {
    const int64_t page = j / kPage, end = (page + 1) * kPage;
    const float* values = kv.pages[page] + kv.value_offset + j % kPage * stride + channel;
    for (const int64_t stop = last < end ? last + 1 : end; j < stop; ++j, values += stride)
      for (int b = 0; b < Block; ++b) sum[b] += p[j - begin] * load(values + b * kLanes);
  }
  for (int b = 0; b < Block; ++b) {
    const int64_t at = channel + b * kLanes, left = kv.head_dim - at;
    float lane[kLanes];
    store(lane, sum[b] / z);
    for (int64_t l = 0; l < kLanes && l < left; ++l) y[at + l] = lane[l];
  }
}

template <int Block>
LILLIPUT_INLINE void attention_body(const AttentionView& kv, const float* q, int64_t first, int64_t last, float* y,
                                    float* scratch) {
  const int64_t begin = first / kLanes * kLanes;  // scratch[0] belongs to this position
  for (int64_t base = begin; base <= last;) {
    float* to = scratch + (base - begin);
    if (base + (Block - 1) * kLanes <= last && base % kPage + Block * kLanes <= kPage) {
      score_keys<Block>(kv, q, base, to);
      base += Block * kLanes;
    } else {
      score_keys<1>(kv, q, base, to);
      base += kLanes;
    }
  }
  Floats most = spread(-__builtin_inff());
  for (int64_t base = begin; base <= last; base += kLanes) {
    const Floats s = masked(load(scratch + (base - begin)), base, first, last);
    store(scratch + (base - begin), s);
    most = select(s > most, s, most);
  }
  const float peak = largest(most);
  Floats sum{};
  for (int64_t base = begin; base <= last; base += kLanes) {
    const Floats p = exponential(load(scratch + (base - begin)) - peak);
    store(scratch + (base - begin), p);
    sum += p;
  }
  const float z = total(sum);
  const int64_t stride = head_stride(kv.head_dim);
  int64_t channel = 0;
  for (; channel + Block * kLanes <= stride; channel += Block * kLanes)
    mix_values<Block>(kv, scratch, begin, first, last, channel, stride, z, y);
  for (; channel + 2 * kLanes <= stride; channel += 2 * kLanes)
    mix_values<2>(kv, scratch, begin, first, last, channel, stride, z, y);
  for (; channel < stride; channel += kLanes)
    mix_values<1>(kv, scratch, begin, first, last, channel, stride, z, y);
}

}  // namespace
}  // namespace lilliput
