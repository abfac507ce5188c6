// Holds every variant that this machine can run to the reference, bit for bit, on random data, without Python: for
// targets that are only emulated. Prints what was compared; returns 1 on the first difference.
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "ops/dispatch.hpp"

using namespace lilliput;

namespace {

std::mt19937 source(1);

uint32_t below(uint32_t n) { return static_cast<uint32_t>(source()) % n; }

struct Case {
  std::vector<int> widths;
  int64_t out, columns, group, tokens;
  bool zeros, table, factors;
  int grid_bytes;
};

int compare(const Case& c) {
  const int64_t row_tiles = (c.out + 15) / 16, input_tiles = (c.columns + 31) / 32;
  const int64_t groups = (c.columns + c.group - 1) / c.group;
  std::vector<std::vector<uint8_t>> planes;
  NestedView w{};
  for (const int width : c.widths) {
    planes.emplace_back(static_cast<size_t>(row_tiles * input_tiles * 64 * width));
    for (auto& byte : planes.back()) byte = static_cast<uint8_t>(below(c.tokens % 2 ? 256 : 2) ? below(256) : 255);
    w.widths[w.fields++] = width;
    w.bits += width;
  }
  for (int f = 0; f < w.fields; ++f) w.planes[f] = planes[static_cast<size_t>(f)].data();
  std::vector<uint16_t> scale(static_cast<size_t>(row_tiles * groups * 16)), zero(scale.size());
  for (auto& s : scale) s = static_cast<uint16_t>(below(0x3c00));  // 0 .. 1, subnormals included
  for (auto& z : zero) z = static_cast<uint16_t>(below(0x3c00) | below(2) << 15);
  if (c.grid_bytes == 1) {  // any byte is one
    for (auto& s : scale) s = static_cast<uint16_t>(below(0x10000));
    for (auto& z : zero) z = static_cast<uint16_t>(below(0x10000));
  }
  w.grid_bytes = c.grid_bytes;
  w.scale = reinterpret_cast<const uint8_t*>(scale.data());
  w.zero = c.zeros ? reinterpret_cast<const uint8_t*>(zero.data()) : nullptr;
  w.out = c.out;
  w.columns = c.columns;
  std::vector<uint8_t> table(static_cast<size_t>(row_tiles * 16) << w.bits);
  for (auto& entry : table) entry = static_cast<uint8_t>(below(2) ? below(128) : 127);
  w.table = c.table ? table.data() : nullptr;
  w.group = c.group;
  std::vector<float> factor(static_cast<size_t>(2 * row_tiles * 16));
  for (auto& f : factor) f = static_cast<float>(1 + below(4000)) / 2000;
  w.factor = c.factors ? factor.data() : nullptr;

  std::vector<float> x(static_cast<size_t>(c.tokens * c.columns));
  for (auto& v : x) v = (static_cast<float>(below(2001)) - 1000) / 300;
  const int64_t stride = quantized_stride(c.columns);
  std::vector<int8_t> codes[2];
  std::vector<float> xscale[2];
  std::vector<int32_t> sum[2];
  int failures = 0, first = 1;
  for (const auto& name : variants("quantize_i8")) {
    const int k = first ? 0 : 1;
    codes[k].assign(static_cast<size_t>(c.tokens * stride), 77);
    xscale[k].assign(static_cast<size_t>(c.tokens * groups), 0);
    sum[k].assign(static_cast<size_t>(c.tokens * groups), 0);
    for (int64_t t = 0; t < c.tokens; ++t)
      quantize_i8(name)(x.data() + t * c.columns, c.columns, c.group, codes[k].data() + t * stride,
                        xscale[k].data() + t * groups, sum[k].data() + t * groups);
    if (!first && (codes[0] != codes[1] || xscale[0] != xscale[1] || sum[0] != sum[1])) {
      std::printf("quantize_i8 %s differs from the reference\n", name.c_str());
      ++failures;
    }
    first = 0;
  }
  const QuantizedView q{codes[0].data(), xscale[0].data(), sum[0].data(), stride, groups};
  std::vector<float> wanted(static_cast<size_t>(c.tokens * c.out), -1), found;
  std::vector<uint8_t> scratch(static_cast<size_t>(matmul_nested_i8_scratch(c.columns)));
  for (const auto& name : variants("matmul_nested_i8")) {
    auto& y = name == "reference" ? wanted : found;
    y.assign(wanted.size(), -1);
    matmul_nested_i8(name)(w, q, c.tokens, y.data(), c.out, 0, row_tiles, scratch.data());
    if (&y == &found && std::memcmp(wanted.data(), found.data(), wanted.size() * sizeof(float)) != 0) {
      std::printf("matmul_nested_i8 %s differs: %d bits in %d fields%s, (%d, %d), groups of %d%s, %d tokens\n", name.c_str(),
                  w.bits, w.fields, c.table ? " with a table" : "", static_cast<int>(c.out), static_cast<int>(c.columns), static_cast<int>(c.group),
                  c.factors ? " with factors" : c.grid_bytes == 1 ? " in bytes" : "", static_cast<int>(c.tokens));
      ++failures;
    }
  }
  return failures;
}

// A code of `bits` bits, often at an end.
int32_t code(int bits) {
  const int32_t half = 1 << (bits - 1);
  return below(3) ? static_cast<int32_t>(below(static_cast<uint32_t>(2 * half))) - half : below(2) ? half - 1 : -half;
}

// An edge of `count` codes.
std::vector<uint8_t> edge(size_t count, int bits) {
  std::vector<uint8_t> codes(count * static_cast<size_t>(bits / 8));
  for (size_t n = 0; n < count; ++n) {
    if (bits == 8)
      reinterpret_cast<int8_t*>(codes.data())[n] = static_cast<int8_t>(code(8));
    else
      reinterpret_cast<int16_t*>(codes.data())[n] = static_cast<int16_t>(code(16));
  }
  return codes;
}

int compare_matmul_integer(const std::vector<int>& widths, int64_t out, int64_t columns, int64_t tokens, int parts,
                           int bits) {
  const int64_t row_tiles = (out + 15) / 16, input_tiles = (columns + 31) / 32, stride = quantized_stride(columns);
  std::vector<std::vector<uint8_t>> planes;
  NestedView w{};
  for (const int width : widths) {
    planes.emplace_back(static_cast<size_t>(row_tiles * input_tiles * 64 * width));
    for (auto& byte : planes.back()) byte = static_cast<uint8_t>(below(2) ? below(256) : 255);
    w.widths[w.fields++] = width;
    w.bits += width;
  }
  for (int f = 0; f < w.fields; ++f) w.planes[f] = planes[static_cast<size_t>(f)].data();
  w.out = out;
  w.columns = w.group = columns;
  const auto rows = static_cast<size_t>(tokens * parts), n = static_cast<size_t>(out);
  std::vector<int8_t> codes(rows * static_cast<size_t>(stride));
  std::vector<int32_t> sum(rows), multiplier(n);
  std::vector<int64_t> bias(n);
  std::vector<int8_t> shift(n);
  std::vector<int16_t> zero(n);
  for (size_t t = 0; t < rows; ++t)
    for (int64_t k = 0; k < columns; ++k)
      sum[t] += codes[t * static_cast<size_t>(stride) + static_cast<size_t>(k)] = static_cast<int8_t>(code(8));
  for (size_t r = 0; r < n; ++r) {
    bias[r] = static_cast<int64_t>(below(1 << 20)) - (1 << 19);
    zero[r] = static_cast<int16_t>(r % 4 == 0 ? below(2) * ((1u << w.bits) - 1) : below(1u << w.bits));
    multiplier[r] = static_cast<int32_t>((1u << 22) + below(1 << 22));
    shift[r] = static_cast<int8_t>(22 + 8 * parts + w.bits + static_cast<int>(below(5)) - bits / 2);
  }
  std::vector<uint8_t> wanted, found, scratch(static_cast<size_t>(matmul_nested_i8_scratch(columns)));
  int failures = 0;
  for (const auto& name : variants("matmul_integer")) {
    auto& y = name == "reference" ? wanted : found;
    y.assign(static_cast<size_t>(tokens * out * bits / 8), 77);
    matmul_integer(name)(w, {codes.data(), sum.data(), stride, parts}, tokens,
                         {bias.data(), multiplier.data(), shift.data(), zero.data()}, {bits, -3}, y.data(), out, 0, row_tiles,
                         scratch.data());
    if (&y == &found && wanted != found) {
      std::printf("matmul_integer %s differs: %d bits, %d parts, to %d bits, %d tokens\n", name.c_str(), w.bits, parts, bits,
                  static_cast<int>(tokens));
      ++failures;
    }
  }
  return failures;
}

int compare_attention_integer(int64_t dim, int64_t group, int64_t queries, int64_t position, int64_t window,
                              int64_t probability) {
  const int64_t pages = (position + queries + kPage - 1) / kPage;
  const int64_t key_bytes = kPage * 2 * channel_pairs(dim), page_bytes = key_bytes + kPage * head_stride(dim);
  const auto memory = edge(static_cast<size_t>(pages * page_bytes), 8);
  std::vector<const uint8_t*> page;
  for (int64_t n = 0; n < pages; ++n) page.push_back(memory.data() + n * page_bytes);
  std::vector<int32_t> hi(256), lo(256);
  for (int n = 0; n < 256; ++n) {
    hi[static_cast<size_t>(n)] = 65536 >> (n / 2);
    lo[static_cast<size_t>(n)] = 65536 - 100 * n;
  }
  const IntegerAttention how{dim, window, {8, 5},       {16, 0},        {16, -77}, -9,
                             31,  {1 << 22, 24}, {1 << 22, static_cast<int>(22 + (probability > 255 ? 8 : 0))}, nullptr,
                             hi.data(), lo.data(), probability};
  const auto q = edge(static_cast<size_t>(queries * group * dim), 8);
  std::vector<uint8_t> wanted, found,
      scratch(static_cast<size_t>(attention_integer_scratch(dim, position + queries)));
  int failures = 0;
  for (const auto& name : variants("attention_integer")) {
    auto& y = name == "reference" ? wanted : found;
    y.assign(static_cast<size_t>(2 * queries * group * dim), 77);
    attention_integer(name)(how, {page.data(), 0, key_bytes, Kept::codes8}, {q.data(), y.data(), group * dim, group, position},
                            0, queries * group, scratch.data());
    if (&y == &found && wanted != found) {
      std::printf("attention_integer %s differs: heads of %d, %d queries at %d, window %d\n", name.c_str(),
                  static_cast<int>(dim), static_cast<int>(queries), static_cast<int>(position), static_cast<int>(window));
      ++failures;
    }
  }
  return failures;
}

}  // namespace

int main() {
  const std::vector<std::vector<int>> cuts = {{2},    {2, 1},    {2, 1, 1}, {2, 1, 1, 4}, {4},          {4, 4},
                                              {1},    {1, 1, 1}, {1, 2}, {1, 2, 1}, {4, 1},    {4, 2},       {1, 1, 1, 1, 1, 1, 1, 1},
                                              {2, 4}, {4, 2, 1}, {1, 4, 2, 1}};
  int cases = 0;
  for (const auto& widths : cuts)
    for (const int64_t group : {16, 64, 1000})
      for (const int64_t tokens : {1, 3, 9})
        for (const bool zeros : {false, true})
          for (const bool table : {false, true}) {
            int bits = 0;
            for (const int width : widths) bits += width;
            if (table && bits > 4) continue;
            for (const bool factors : {false, true})
              for (const int grid_bytes : {1, 2}) {
                if (compare({widths, tokens == 1 ? 16 : 53, group == 1000 ? 97 : 200, group, tokens, zeros, table, factors,
                             grid_bytes}))
                  return 1;
                ++cases;
              }
          }
  for (const auto& widths : {std::vector<int>{4}, {4, 4}, {2, 1, 1}, {2, 1, 1, 4}, {2, 2}, {1, 4, 2, 1}})
    for (const int64_t columns : {97, 200})
      for (const int64_t tokens : {1, 3, 9})
        for (const int parts : {1, 2})
          for (const int bits : {8, 16}) {
            if (compare_matmul_integer(widths, tokens == 1 ? 16 : 53, columns, tokens, parts, bits)) return 1;
            ++cases;
          }
  for (const int64_t dim : {16, 33, 128})
    for (const int64_t position : {0, 61, 200})
      for (const int64_t window : {0, 7, 70})
        for (const int64_t probability : {255, 65535}) {
          if (compare_attention_integer(dim, 3, position == 61 ? 5 : 1, position, window, probability)) return 1;
          ++cases;
        }
  std::printf("%d cases:", cases);
  for (const char* op : {"quantize_i8", "matmul_nested_i8", "matmul_integer", "attention_integer"})
    for (const auto& name : variants(op)) std::printf(" %s/%s", op, name.c_str());
  std::printf("\n");
  return 0;
}
