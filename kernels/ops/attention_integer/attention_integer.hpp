// The node `attend` of an integer graph (docs/integer.md): queries of one key-value head against the cache of codes, in
// three passes, since every weight hangs on the largest score and the sum of all.
//
//     t[j] = clamp(rq(sum over d of (q[d] - zero_q) (k[j][d] - zero_k), score) + zero_t)
//     t[j] = cap[t[j] + 2^15]                                              where there is a soft-cap
//     e[j] = (hi[delta >> 8] lo[delta & 255] + 2^15) >> 16                 delta = max t - t[j]
//     p[j] = (e[j] ((P << 31) / sum e) + 2^30) >> 31
//     y[d] = clamp(rq(sum over j of p[j] (v[j][d] - zero_v), mix) + zero_y)
//
// over the positions j that the query sees. All are whole numbers, so no order of summation is laid down.
//
// A page holds kPage positions of one layer and head, keys as (kPage / 16, pairs of channels, 16, 2), a channel of zeros
// behind an odd number of them, then values as (kPage / 2, head_stride, 2): what one multiplication of pairs takes stands
// side by side. Codes are int8 (Kept::codes8) or, where the keys or values of any layer have 16 bits, int16.
#pragma once

#include "ops/attention/attention.hpp"
#include "ops/integer.hpp"

namespace lilliput {

constexpr int64_t kCodeRows = 4;  // queries that the variants take at once
constexpr int64_t kShareRows = 16;  // that a thread claims at a time

constexpr int64_t channel_pairs(int64_t head_dim) { return (head_dim + 1) / 2; }
// Where a code is, counted in codes from the keys or values of a page; position within the page.
constexpr int64_t key_place(int64_t head_dim, int64_t position, int64_t channel) {
  return (position / 16 * channel_pairs(head_dim) + channel / 2) * 32 + position % 16 * 2 + channel % 2;
}
constexpr int64_t value_place(int64_t head_dim, int64_t position, int64_t channel) {
  return (position / 2 * head_stride(head_dim) + channel) * 2 + position % 2;
}

struct IntegerAttention {
  int64_t head_dim;
  int64_t window;  // positions a query sees, itself included; 0: all
  CodeGrid q, y, scores;
  int32_t zero_k, zero_v;
  Factor score, mix;
  const int16_t* cap;       // (65536,) or null
  const int32_t *hi, *lo;   // (256,), up to 2^16
  int64_t probability;      // P
};

struct CodePages {
  const uint8_t* const* pages;
  int64_t key_offset, value_offset;  // bytes from the start of a page to this layer and head
  Kept kept;
};

// As QueryRows, of codes: row r is head r % group at position `position` + r / group and stands at code
// r / group * ld + r % group * head_dim of q and of y.
struct CodeRows {
  const void* q;
  void* y;
  int64_t ld, group, position;
};

// Bytes of scratch for sequences of `positions` positions: scores, weights, sums and queries of kCodeRows rows.
constexpr int64_t attention_integer_scratch(int64_t head_dim, int64_t positions) {
  return kCodeRows * (6 * ((positions + 31) / 16 * 16) + 4 * head_stride(head_dim) + 4 * channel_pairs(head_dim)) + 256;
}

// Rows begin .. end - 1; scratch: attention_integer_scratch(head_dim, positions) bytes of the calling thread.
typedef void AttentionInteger(const IntegerAttention& how, const CodePages& kv, const CodeRows& rows, int64_t begin,
                              int64_t end, uint8_t* scratch);
AttentionInteger attention_integer_reference, attention_integer_avx2, attention_integer_avx512, attention_integer_neon;

}  // namespace lilliput
