// The definition of attention_integer, code by code; also what runs where queries, keys or values have 16 bits.
#include "ops/attention_integer/attention_integer.hpp"

namespace lilliput {
namespace {

template <class Code>
void attend_row(const IntegerAttention& how, const CodePages& kv, const CodeRows& rows, int64_t row, int32_t* e) {
  const int64_t dim = how.head_dim, last = rows.position + row / rows.group;
  const int64_t first = how.window > 0 && last >= how.window ? last - how.window + 1 : 0;
  const int64_t at = row / rows.group * rows.ld + row % rows.group * dim;
  const auto keys = [&](int64_t j) { return reinterpret_cast<const Code*>(kv.pages[j / kPage] + kv.key_offset); };
  const auto values = [&](int64_t j) { return reinterpret_cast<const Code*>(kv.pages[j / kPage] + kv.value_offset); };
  int32_t most = -65536;
  for (int64_t j = first; j <= last; ++j) {
    int64_t dot = 0;
    for (int64_t d = 0; d < dim; ++d) {
      int32_t q;
      read_codes(rows.q, how.q, at + d, 1, &q);
      dot += int64_t{q} * (keys(j)[key_place(dim, j % kPage, d)] - how.zero_k);
    }
    int64_t t = clamp_to(round_down(dot * how.score.multiplier, static_cast<uint64_t>(how.score.shift)) + how.scores.zero,
                         how.scores.low(), how.scores.high());
    if (how.cap) t = how.cap[t + 32768];
    e[j - first] = static_cast<int32_t>(t);
    most = e[j - first] > most ? e[j - first] : most;
  }
  int64_t sum = 0;
  for (int64_t j = first; j <= last; ++j) {
    const int32_t delta = most - e[j - first];
    e[j - first] = static_cast<int32_t>((int64_t{how.hi[delta >> 8]} * how.lo[delta & 255] + 32768) >> 16);
    sum += e[j - first];
  }
  const int64_t share = (how.probability << 31) / sum;
  for (int64_t j = first; j <= last; ++j)
    e[j - first] = static_cast<int32_t>((e[j - first] * share + (int64_t{1} << 30)) >> 31);
  for (int64_t d = 0; d < dim; ++d) {
    int64_t total = 0;
    for (int64_t j = first; j <= last; ++j)
      total += int64_t{e[j - first]} * (values(j)[value_place(dim, j % kPage, d)] - how.zero_v);
    total *= how.mix.multiplier;
    write_codes(&total, static_cast<uint64_t>(how.mix.shift), how.y, at + d, 1, rows.y);
  }
}

}  // namespace

void attention_integer_reference(const IntegerAttention& how, const CodePages& kv, const CodeRows& rows, int64_t begin,
                                 int64_t end, uint8_t* scratch) {
  auto* e = reinterpret_cast<int32_t*>(scratch + (64 - reinterpret_cast<uintptr_t>(scratch) % 64) % 64);
  for (int64_t row = begin; row < end; ++row) {
    if (kv.kept == Kept::codes8)
      attend_row<int8_t>(how, kv, rows, row, e);
    else
      attend_row<int16_t>(how, kv, rows, row, e);
  }
}

}  // namespace lilliput
