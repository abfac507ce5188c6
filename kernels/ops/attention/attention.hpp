// One query of one head against the cached keys first .. last, float32 throughout:
//
//     s[j] = cap((q . k[j]) * scale)         q . k sums over channels, ascending
//     p[j] = exp(s[j] - max s)
//     z    = sum of p: lane l adds p[l], p[l + 16], .. of absolute positions, then the tree of vec.hpp
//     y    = ((0 + p[first] v[first]) + p[first + 1] v[first + 1] + ..) / z
//
// with cap(s) = c tanh(s / c) where there is a soft cap c. The order hangs on absolute positions alone, so chunked
// prefill, batches and threads do not change a bit.
//
// A page holds kPage positions of one layer and kv head: keys as (kPage / 16, head_dim, 16), sixteen positions side by
// side so that scores need no transposition; values as (kPage, head_stride), head_stride being head_dim rounded up to
// 16 with zeros.
#pragma once

#include <cstdint>

namespace lilliput {

constexpr int64_t kPage = 256;

constexpr int64_t head_stride(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }
constexpr int64_t attention_scratch(int64_t positions) { return (positions / 16 + 2) * 16; }

struct AttentionView {
  const float* const* pages;
  int64_t key_offset, value_offset;  // floats from the start of a page to this layer and head
  int64_t head_dim;
  float scale;
  float softcap;  // 0: none
};

// q, y: (head_dim,) float32; scratch: attention_scratch(last + 1) floats of the calling thread.
typedef void Attention(const AttentionView& kv, const float* q, int64_t first, int64_t last, float* y, float* scratch);
Attention attention_reference, attention_avx2, attention_avx512;


}  // namespace lilliput
