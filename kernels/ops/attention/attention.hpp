// Queries of one key-value head against cached keys and values; online softmax over pages of kPage positions.
//
// For a query that sees positions first .. last, pages in ascending order, only those that hold one of them:
//
//     s[j]  = cap(((q . k[j]) * kscale[j]) * scale)      q . k sums over channels, ascending, every step rounded once
//     m'    = max(m, max s),  c = exp(m - m')            m begins at minus infinity
//     p[j]  = exp(s[j] - m')
//     z[l]  = z[l] * c, then + p[j] for j = l, l + 16, .. of the page's positions
//     y     = y * c, then + (p[j] * vscale[j]) * v[j], j ascending over first .. last, every step rounded once
//
// and at the end y / total(z), the tree of vec.hpp. cap(s) = c tanh(s / c) where there is a soft cap c; in a float
// cache there is no multiplication by kscale and vscale. The order hangs on absolute positions alone, so chunked
// prefill, batches and threads do not change a bit, and scratch does not grow with the context.
//
// A page holds kPage positions of one layer and kv head: keys as (kPage / 16, head_dim, 16), sixteen positions side by
// side so that scores need no transposition; values as (kPage, head_stride), head_stride being head_dim rounded up to
// 16 with zeros. An int8 page holds the same as int8 and, behind each, (kPage,) float32 scales.
//
// An int4 cache (after KIVI, arXiv 2402.02750) rounds groups of kGroup consecutive positions: keys for each channel over
// the positions of a group, values for each position over blocks of kGroup channels, to 0 .. 15 times a scale above a
// minimum. A query sees its own group and the first one in float32 and the groups between rounded. With
// b = sum q[d] * min[d], in sixteen lanes, and a total over the group m = sum p[j] * min[j], also in lanes, a rounded
// group gives
//
//     q . k[j] = (sum over d, ascending, of (q[d] * scale[d]) * code[j][d]) + b
//     y        = (y + (p[j] * scale[j]) * code[j], j ascending) + m
//
// A page of it holds two groups. Keys of a group: (head_dim, 16) bytes, position l in the low and l + 16 in the high
// nibble of byte l; then (head_stride,) float16 scales and as many minima. Values of a group: (blocks, kGroup, 16) bytes,
// channel c of the block in the low and c + 16 in the high nibble of byte c; then (blocks, kGroup) float16 scales and
// minima. The groups in float32 are in a page apart, laid out like a float page: the first group, then the newest.
#pragma once

#include <cstdint>

namespace lilliput {

constexpr int64_t kPage = 64;
constexpr int64_t kQueryRows = 128;  // queries that one call takes at most

constexpr int64_t kGroup = 32;      // positions, and channels of values, that an int4 cache rounds together

// How keys and values are kept; codes are those of an integer graph, laid out as ops/attention_integer says.
enum class Kept : int { float32, int8, int4, codes8, codes16 };

constexpr int64_t head_stride(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }
constexpr int64_t head_blocks(int64_t head_dim) { return (head_dim + kGroup - 1) / kGroup; }
// Bytes of one group of an int4 page.
constexpr int64_t key_group_bytes(int64_t head_dim) { return 16 * head_dim + 4 * head_stride(head_dim); }
constexpr int64_t value_group_bytes(int64_t head_dim) { return head_blocks(head_dim) * kGroup * (16 + 4); }
// Of one query: its sums, itself, its lanes of z and its page of weights. Behind all of them a page made floats.
constexpr int64_t query_floats(int64_t head_dim) {
  return head_blocks(head_dim) * kGroup + head_stride(head_dim) + 16 + kPage;
}
constexpr int64_t attention_scratch(int64_t head_dim) {
  return kQueryRows * query_floats(head_dim) + kPage * (head_dim + head_stride(head_dim));
}

struct AttentionView {
  const uint8_t* const* pages;
  int64_t key_offset, value_offset;  // bytes from the start of a page to this layer and head
  int64_t head_dim;
  Kept kept;
  float scale;
  float softcap;  // 0: none
  int64_t window;  // positions a query sees, itself included; 0: all
  const float *near_keys, *near_values;  // of an int4 cache: this layer and head in the page of float32
};

// Queries of consecutive positions, `group` heads of each share the keys: row r is head r % group at position
// `position` + r / group, and stands at q + r / group * ld + r % group * head_dim; y likewise.
struct QueryRows {
  const float* q;
  float* y;
  int64_t ld, group, position;
};

// Rows begin .. end - 1, at most kQueryRows and, of an int4 cache, all of one group of positions; scratch:
// attention_scratch(head_dim) floats of the calling thread.
typedef void Attention(const AttentionView& kv, const QueryRows& rows, int64_t begin, int64_t end, float* scratch);
Attention attention_reference, attention_avx2, attention_avx512;

}  // namespace lilliput
