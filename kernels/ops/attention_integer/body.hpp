// The vector body of attention_integer for codes of 8 bits, over an instruction set `I`:
//
//     I::Sums, I::kSums        one register of int32 and how many it holds
//     I::Pairs                 one register of int16, two for each sum
//     I::widen(from)           2 * kSums int8 as Pairs
//     I::spread(two)           the same two int16 for every sum
//     I::madd(sums, a, b)      sums + a[2i] b[2i] + a[2i + 1] b[2i + 1]
//
// What is constant is taken out of the sums of products: zero_k times the sum of a query, zero_v times that of its weights.
// A weight is up to 65535 and a pair takes 15 bits, so what a weight has beyond 32767 is added apart: since they sum to P,
// hardly more than one has that.
#pragma once

#include "ops/attention_integer/attention_integer.hpp"

namespace lilliput {
namespace {

struct RowState {
  int64_t first, last;  // positions it sees
  int64_t q_sum;
  int32_t* e;           // scores, then weights, of positions from `begin` on
  int16_t* p;           // weights up to 32767
  int32_t* sums;        // (head_stride,)
  const int32_t* pairs; // its query, two channels each
};

template <class I, int R>
LILLIPUT_INLINE void score_rows(const IntegerAttention& how, const CodePages& kv, const RowState* rows, int64_t begin,
                                int64_t end) {
  constexpr int kParts = 16 / I::kSums;
  const int64_t pairs = channel_pairs(how.head_dim), multiplier = how.score.multiplier;
  const auto shift = static_cast<uint64_t>(how.score.shift);
  const int64_t half = int64_t{1} << (shift - 1), low = how.scores.low(), high = how.scores.high();
  for (int64_t j = begin; j < end; j += 16) {
    const auto* keys =
        reinterpret_cast<const int8_t*>(kv.pages[j / kPage] + kv.key_offset) + j % kPage / 16 * pairs * 32;
    typename I::Sums sums[R][kParts];
    for (int r = 0; r < R; ++r)
      for (int part = 0; part < kParts; ++part) sums[r][part] = I::none();
    for (int64_t d = 0; d < pairs; ++d)
      for (int part = 0; part < kParts; ++part) {
        const auto k = I::widen(keys + d * 32 + 2 * I::kSums * part);
        for (int r = 0; r < R; ++r) sums[r][part] = I::madd(sums[r][part], k, I::spread(rows[r].pairs[d]));
      }
    for (int r = 0; r < R; ++r) {
      alignas(64) int32_t dot[16];
      for (int part = 0; part < kParts; ++part)
        std::memcpy(dot + part * I::kSums, &sums[r][part], sizeof sums[r][part]);
      const auto minus = static_cast<int32_t>(how.zero_k * rows[r].q_sum);
      int32_t* to = rows[r].e + (j - begin);
      for (int i = 0; i < 16; ++i) {
        int64_t t = shift_down(int64_t{dot[i] - minus} * static_cast<int32_t>(multiplier) + half, shift) + how.scores.zero;
        t = t < low ? low : t;
        to[i] = static_cast<int32_t>(t > high ? high : t);
      }
      if (how.cap)
        for (int i = 0; i < 16; ++i) to[i] = how.cap[to[i] + 32768];
    }
  }
}

// Scores to weights; what is not seen gets none. Returns the sum of the weights.
LILLIPUT_INLINE int64_t weigh_row(const IntegerAttention& how, const RowState& row, int64_t begin, int64_t end) {
  const int64_t from = row.first - begin, to = row.last + 1 - begin, count = end - begin;
  int32_t most = row.e[from];
  for (int64_t j = from; j < to; ++j) most = row.e[j] > most ? row.e[j] : most;
  uint64_t sum = 0;
  for (int64_t j = from; j < to; ++j) {
    const int32_t delta = most - row.e[j];
    const auto e = static_cast<uint32_t>(
        (uint64_t{static_cast<uint32_t>(how.hi[delta >> 8])} * static_cast<uint32_t>(how.lo[delta & 255]) + 32768) >> 16);
    row.e[j] = static_cast<int32_t>(e);
    sum += e;
  }
  for (int64_t j = 0; j < from; ++j) row.e[j] = 0;
  for (int64_t j = to; j < count; ++j) row.e[j] = 0;
  const auto share = static_cast<uint32_t>((static_cast<uint64_t>(how.probability) << 31) / sum);  // below 2^31
  int64_t total = 0;
  for (int64_t j = 0; j < count; ++j) {
    const auto p = static_cast<int32_t>((uint64_t{static_cast<uint32_t>(row.e[j])} * share + (1u << 30)) >> 31);
    row.e[j] = p;
    row.p[j] = static_cast<int16_t>(p > 32767 ? 32767 : p);
    total += p;
  }
  return total;
}

template <class I, int R>
LILLIPUT_INLINE void mix_rows(const IntegerAttention& how, const CodePages& kv, const RowState* rows, int64_t begin,
                              int64_t end) {
  constexpr int kParts = 16 / I::kSums;
  const int64_t stride = head_stride(how.head_dim);
  for (int r = 0; r < R; ++r)
    for (int64_t c = 0; c < stride; ++c) rows[r].sums[c] = 0;
  for (int64_t page = begin / kPage * kPage; page < end; page += kPage) {
    const auto* values = reinterpret_cast<const int8_t*>(kv.pages[page / kPage] + kv.value_offset);
    const int64_t from = page < begin ? begin : page, to = page + kPage < end ? page + kPage : end;
    for (int64_t c = 0; c < stride; c += 16) {
      typename I::Sums sums[R][kParts];
      for (int r = 0; r < R; ++r)
        for (int part = 0; part < kParts; ++part)
          std::memcpy(&sums[r][part], rows[r].sums + c + part * I::kSums, sizeof sums[r][part]);
      for (int64_t j = from; j < to; j += 2)
        for (int part = 0; part < kParts; ++part) {
          const auto v = I::widen(values + ((j - page) / 2 * stride + c + part * I::kSums) * 2);
          for (int r = 0; r < R; ++r) {
            int32_t two;
            std::memcpy(&two, rows[r].p + (j - begin), sizeof two);
            sums[r][part] = I::madd(sums[r][part], v, I::spread(two));
          }
        }
      for (int r = 0; r < R; ++r)
        for (int part = 0; part < kParts; ++part)
          std::memcpy(rows[r].sums + c + part * I::kSums, &sums[r][part], sizeof sums[r][part]);
    }
  }
}

template <class I, int R>
static __attribute__((noinline)) void attend_rows(const IntegerAttention& how, const CodePages& kv, const CodeRows& rows,
                                                  int64_t row, uint8_t* scratch) {
  const int64_t dim = how.head_dim, pairs = channel_pairs(dim), stride = head_stride(dim);
  RowState state[R];
  int64_t begin = INT64_MAX, end = 0;
  const auto place = [&](int64_t r) { return r / rows.group * rows.ld + r % rows.group * dim; };
  for (int r = 0; r < R; ++r) {
    RowState& s = state[r];
    s.last = rows.position + (row + r) / rows.group;
    s.first = how.window > 0 && s.last >= how.window ? s.last - how.window + 1 : 0;
    begin = s.first < begin ? s.first : begin;
    end = s.last + 1 > end ? s.last + 1 : end;
  }
  begin = begin / 16 * 16;
  end = (end + 15) / 16 * 16;
  uint8_t* free = scratch + (64 - reinterpret_cast<uintptr_t>(scratch) % 64) % 64;
  for (int r = 0; r < R; ++r) {
    RowState& s = state[r];
    s.e = reinterpret_cast<int32_t*>(free);
    free += 4 * (end - begin);
    s.sums = reinterpret_cast<int32_t*>(free);
    free += 4 * stride;
    auto* two = reinterpret_cast<int32_t*>(free);
    free += 4 * pairs;
    s.pairs = two;
    s.q_sum = 0;
    const auto* q = static_cast<const int8_t*>(rows.q) + place(row + r);
    for (int64_t d = 0; d < pairs; ++d) {
      const int32_t a = q[2 * d] - how.q.zero, b = 2 * d + 1 < dim ? q[2 * d + 1] - how.q.zero : 0;
      two[d] = static_cast<int32_t>((static_cast<uint32_t>(a) & 0xffffu) | static_cast<uint32_t>(b) << 16);
      s.q_sum += a + b;
    }
  }
  for (int r = 0; r < R; ++r, free += 2 * (end - begin)) state[r].p = reinterpret_cast<int16_t*>(free);
  score_rows<I, R>(how, kv, state, begin, end);
  int64_t total[R];
  for (int r = 0; r < R; ++r) total[r] = weigh_row(how, state[r], begin, end);
  mix_rows<I, R>(how, kv, state, begin, end);
  for (int r = 0; r < R; ++r) {
    const RowState& s = state[r];
    if (how.probability > 32767)
      for (int64_t j = s.first; j <= s.last; ++j) {
        const int32_t rest = s.e[j - begin] - 32767;
        if (rest <= 0) continue;
        const auto* v = reinterpret_cast<const int8_t*>(kv.pages[j / kPage] + kv.value_offset);
        for (int64_t c = 0; c < dim; ++c) s.sums[c] += rest * v[value_place(dim, j % kPage, c)];
      }
    const int64_t minus = how.zero_v * total[r];
    for (int64_t c = 0; c < dim; c += kCodes) {
      const int64_t count = dim - c < kCodes ? dim - c : kCodes;
      alignas(64) int64_t product[kCodes];
      for (int64_t i = 0; i < count; ++i) product[i] = (s.sums[c + i] - minus) * how.mix.multiplier;
      write_codes(product, static_cast<uint64_t>(how.mix.shift), how.y, place(row + r) + c, count, rows.y);
    }
  }
}

// What every variant runs.
template <class I>
LILLIPUT_INLINE void attention_integer_body(const IntegerAttention& how, const CodePages& kv, const CodeRows& rows,
                                            int64_t begin, int64_t end, uint8_t* scratch) {
  if (how.q.bits != 8 || kv.kept != Kept::codes8)
    return attention_integer_reference(how, kv, rows, begin, end, scratch);
  int64_t row = begin;
  for (; row + kCodeRows <= end; row += kCodeRows) attend_rows<I, kCodeRows>(how, kv, rows, row, scratch);
  for (; row + 2 <= end; row += 2) attend_rows<I, 2>(how, kv, rows, row, scratch);
  for (; row < end; ++row) attend_rows<I, 1>(how, kv, rows, row, scratch);
}

}  // namespace
}  // namespace lilliput
