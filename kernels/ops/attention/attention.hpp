// Queries of one key-value head against cached keys and values; online softmax over pages of kPage positions.
//
// For a query that sees positions first .. last, pages in ascending order, only those that hold one of them:
//
//     s[j]  = cap(((q . k[j]) * kscale[j]) * scale)      q . k sums over channels, ascending
//     m'    = max(m, max s),  c = exp(m - m')            m begins at minus infinity
//     p[j]  = exp(s[j] - m')
//     z[l]  = z[l] * c, then + p[j] for j = l, l + 16, .. of the page's positions
//     y     = y * c, then + (p[j] * vscale[j]) * v[j], j ascending over first .. last
//
// and at the end y / total(z), the tree of vec.hpp. cap(s) = c tanh(s / c) where there is a soft cap c; in a float
// cache there is no multiplication by kscale and vscale. The order hangs on absolute positions alone, so chunked
// prefill, batches and threads do not change a bit, and scratch does not grow with the context.
//
// A page holds kPage positions of one layer and kv head: keys as (kPage / 16, head_dim, 16), sixteen positions side by
// side so that scores need no transposition; values as (kPage, head_stride), head_stride being head_dim rounded up to
// 16 with zeros. An int8 page holds the same as int8 and, behind each, (kPage,) float32 scales.
#pragma once

#include <cstdint>

namespace lilliput {

constexpr int64_t kPage = 64;
constexpr int64_t kQueryRows = 16;  // queries that one call takes at most

constexpr int64_t head_stride(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }
// Of one query: its page of weights, its lanes of z, its maximum (padded), its sums.
constexpr int64_t query_floats(int64_t head_dim) { return kPage + 16 + 16 + head_stride(head_dim); }
constexpr int64_t attention_scratch(int64_t head_dim) { return kQueryRows * query_floats(head_dim); }

struct AttentionView {
  const uint8_t* const* pages;
  int64_t key_offset, value_offset;  // bytes from the start of a page to this layer and head
  int64_t head_dim;
  bool int8;
  float scale;
  float softcap;  // 0: none
  int64_t window;  // positions a query sees, itself included; 0: all
};

// Queries of consecutive positions, `group` heads of each share the keys: row r is head r % group at position
// `position` + r / group, and stands at q + r / group * ld + r % group * head_dim; y likewise.
struct QueryRows {
  const float* q;
  float* y;
  int64_t ld, group, position;
};

// Rows begin .. end - 1, at most kQueryRows; scratch: attention_scratch(head_dim) floats of the calling thread.
typedef void Attention(const AttentionView& kv, const QueryRows& rows, int64_t begin, int64_t end, float* scratch);
Attention attention_reference, attention_avx2, attention_avx512;

}  // namespace lilliput
