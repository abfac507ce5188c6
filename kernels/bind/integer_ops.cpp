// The ops of integer graphs one by one, for tests and benchmarks. Codes come as int16 whatever their bits.
#include "bind/bind.hpp"

#include "ops/integer.hpp"

namespace lilliput::bind {
namespace {

using Codes = nb::ndarray<const int16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Heads = nb::ndarray<const int16_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
template <class T>
using Vector = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Grid = std::tuple<int, int32_t>;      // bits, zero
using Ratio = std::tuple<int32_t, int>;     // multiplier, shift

CodeGrid grid_of(const Grid& g) { return {std::get<0>(g), std::get<1>(g)}; }
Factor factor_of(const Ratio& r) { return {std::get<0>(r), std::get<1>(r)}; }

// Rows of codes as an edge of `bits` bits holds them, and back.
std::vector<uint8_t> edge_of(const int16_t* from, size_t rows, size_t width, size_t stride, int bits) {
  std::vector<uint8_t> edge(rows * stride * static_cast<size_t>(bits / 8));
  for (size_t t = 0; t < rows; ++t)
    for (size_t k = 0; k < width; ++k) {
      if (bits == 8)
        reinterpret_cast<int8_t*>(edge.data())[t * stride + k] = static_cast<int8_t>(from[t * width + k]);
      else
        reinterpret_cast<int16_t*>(edge.data())[t * stride + k] = from[t * width + k];
    }
  return edge;
}

nb::object codes_of_edge(const std::vector<uint8_t>& edge, std::vector<size_t> shape, int bits) {
  float* to = nullptr;
  size_t count = 1;
  for (const size_t n : shape) count *= n;
  nb::object array = new_array(std::move(shape), &to);
  for (size_t n = 0; n < count; ++n)
    to[n] = bits == 8 ? reinterpret_cast<const int8_t*>(edge.data())[n] : reinterpret_cast<const int16_t*>(edge.data())[n];
  return array;
}

nb::object op_matmul_integer(const std::vector<Bytes>& planes, const std::vector<int>& widths,
                             int grid_bytes, const Bytes& scale,
                             const std::optional<Bytes>& zero, const std::optional<Bytes>& table,
                             const std::optional<Bytes>& factor, int64_t out, int64_t columns, int64_t group,
                             const Codes& x, int bits, const Vector<int64_t>& bias,
                             const Vector<int32_t>& multiplier, const Vector<int8_t>& shift,
                             const Vector<int16_t>& zeros, const Grid& to, const std::string& variant) {
  const HeldMatrix h = cut_matrix(planes, widths, grid_bytes, scale, zero, table, factor, out, columns, group);
  const auto tokens = static_cast<int64_t>(x.shape(0)), stride = quantized_stride(columns);
  const auto rows = static_cast<size_t>(out), parts = static_cast<size_t>(bits / 8);
  require(static_cast<int64_t>(x.shape(1)) == columns && bias.size() == rows && multiplier.size() == rows &&
              shift.size() == rows && zeros.size() == rows && columns <= kWidestIntegerRow,
          "inputs and factors do not fit the matrix");
  std::vector<int8_t> codes(static_cast<size_t>(tokens * stride) * parts);
  std::vector<int32_t> sum(static_cast<size_t>(tokens) * parts);
  for (int64_t t = 0; t < tokens; ++t) {
    const int16_t* from = x.data() + t * columns;
    int8_t* row = codes.data() + t * stride * bits / 8;
    if (bits == 16) {
      split_codes(from, columns, stride, row, sum.data() + 2 * t);
    } else {
      for (int64_t k = 0; k < columns; ++k) row[k] = static_cast<int8_t>(from[k]);
      sum[static_cast<size_t>(t)] = sum_codes(row, columns);
    }
  }
  std::vector<int64_t> whole(bias.data(), bias.data() + rows);
  const NestedView w = h.matrix.at(h.matrix.fields.bits);
  if (bits == 16)
    for (int64_t n = 0; n < out; ++n)
      for (int64_t k = 0; k < columns; ++k) whole[static_cast<size_t>(n)] += 128 * (nested_code(w, n, k) - zeros(static_cast<size_t>(n)));
  const CodeGrid grid = grid_of(to);
  std::vector<uint8_t> y(static_cast<size_t>(tokens) * rows * static_cast<size_t>(grid.bits / 8)),
      scratch(static_cast<size_t>(matmul_nested_i8_scratch(columns)));
  matmul_integer(variant)(w, {codes.data(), sum.data(), stride, bits / 8}, tokens,
                          {whole.data(), multiplier.data(), shift.data(), zeros.data()}, grid, y.data(), out, 0,
                          (out + kTileRows - 1) / kTileRows, scratch.data());
  return codes_of_edge(y, {x.shape(0), rows}, grid.bits);
}

// q: (positions, group, head_dim), the heads of one key-value head at `position` and what follows.
nb::object op_attention_integer(const Heads& q, const Codes& keys, const Codes& values, int64_t position, int64_t window,
                                const std::tuple<Grid, Grid, Grid, Grid, Grid>& grids, const Ratio& score, const Ratio& mix,
                                const std::optional<Vector<int16_t>>& cap, const Vector<int32_t>& hi,
                                const Vector<int32_t>& lo, int64_t probability, int64_t share,
                                const std::string& variant) {
  const auto& [of_q, of_k, of_v, scores, to] = grids;
  const auto dim = static_cast<int64_t>(q.shape(2)), group = static_cast<int64_t>(q.shape(1));
  const auto queries = static_cast<int64_t>(q.shape(0)), count = static_cast<int64_t>(keys.shape(0));
  require(static_cast<int64_t>(keys.shape(1)) == dim && static_cast<int64_t>(values.shape(1)) == dim &&
              static_cast<int64_t>(values.shape(0)) == count && position >= 0 && position + queries <= count,
          "queries, keys and values do not fit");
  require(share >= 1 && hi.size() == 256 && lo.size() == 256 && (!cap || cap->size() == 65536), "tables do not fit");
  const CodeGrid k = grid_of(of_k), v = grid_of(of_v), y = grid_of(to);
  const CacheShape shape{1, 1, dim, k.bits == 8 && v.bits == 8 ? Kept::codes8 : Kept::codes16};
  Arena arena(shape, shape.pages(count), 1);
  Cache cache(arena);
  cache.reserve(count);
  for (int64_t at = 0; at < count; ++at) {
    const auto key = edge_of(keys.data() + at * dim, 1, keys.shape(1), keys.shape(1), k.bits);
    const auto value = edge_of(values.data() + at * dim, 1, keys.shape(1), keys.shape(1), v.bits);
    cache.put_codes(0, 0, at, key.data(), k.bits, value.data(), v.bits);
  }
  const IntegerAttention how{dim,    window, grid_of(of_q), y, grid_of(scores), k.zero, v.zero, factor_of(score), factor_of(mix),
                             cap ? cap->data() : nullptr, hi.data(), lo.data(), probability};
  const size_t width = q.shape(1) * q.shape(2);
  const auto from = edge_of(q.data(), q.shape(0), width, width, how.q.bits);
  std::vector<uint8_t> made(q.shape(0) * width * static_cast<size_t>(y.bits / 8));
  std::vector<uint8_t> scratch(static_cast<size_t>(attention_integer_scratch(dim, count)));
  const CodeRows rows{from.data(), made.data(), group * dim, group, position};
  for (int64_t row = 0; row < queries * group; row += share)
    attention_integer(variant)(how, cache.codes(0, 0), rows, row, std::min(row + share, queries * group), scratch.data());
  return codes_of_edge(made, {q.shape(0), q.shape(1), q.shape(2)}, y.bits);
}

nb::object op_norm_integer(const Vector<int16_t>& x, const Grid& own, const Vector<int32_t>& gain,
                           const std::optional<Vector<int64_t>>& offset, bool layer, int64_t eps, int shift, const Grid& to,
                           const std::string& variant) {
  require(gain.size() == x.size() && (!offset || offset->size() == x.size()), "gain or offset do not fit x");
  const IntegerNorm how{grid_of(own), grid_of(to), layer, eps, shift};
  const auto from = edge_of(x.data(), 1, x.size(), x.size(), how.x.bits);
  std::vector<uint8_t> y(x.size() * static_cast<size_t>(how.y.bits / 8));
  std::vector<int32_t> scratch(x.size());
  norm_integer(variant)(how, gain.data(), offset ? offset->data() : nullptr, from.data(), static_cast<int64_t>(x.size()),
                        y.data(), scratch.data());
  return codes_of_edge(y, {x.size()}, how.y.bits);
}

nb::object op_rotary_integer(const Codes& x, const Grid& own, const Vector<int16_t>& cos, const Vector<int16_t>& sin,
                             const Ratio& turned, const Ratio& plain, const Grid& to, const std::string& variant) {
  require(cos.size() == sin.size() && 2 * cos.size() <= x.shape(1), "cos and sin do not fit x");
  const auto dim = static_cast<int64_t>(2 * cos.size());
  const IntegerRotary how{grid_of(own), grid_of(to), static_cast<int64_t>(x.shape(1)), dim, factor_of(turned), factor_of(plain)};
  const auto from = edge_of(x.data(), x.shape(0), x.shape(1), x.shape(1), how.x.bits);
  std::vector<uint8_t> y(x.size() * static_cast<size_t>(how.y.bits / 8));
  rotary_integer(variant)(how, cos.data(), sin.data(), from.data(), static_cast<int64_t>(x.shape(0)), y.data());
  return codes_of_edge(y, {x.shape(0), x.shape(1)}, how.y.bits);
}

nb::object op_multiply_integer(const Vector<int16_t>& a, const Grid& of_a, const Vector<int16_t>& b, const Grid& of_b,
                               const Ratio& factor, const Grid& to, const std::string& variant) {
  require(a.size() == b.size(), "a and b do not fit");
  const IntegerProduct how{grid_of(of_a), grid_of(of_b), grid_of(to), factor_of(factor)};
  const auto left = edge_of(a.data(), 1, a.size(), a.size(), how.a.bits);
  const auto right = edge_of(b.data(), 1, b.size(), b.size(), how.b.bits);
  std::vector<uint8_t> y(a.size() * static_cast<size_t>(how.y.bits / 8));
  multiply_integer(variant)(how, left.data(), right.data(), y.data(), 0, static_cast<int64_t>(a.size()));
  return codes_of_edge(y, {a.size()}, how.y.bits);
}

nb::object op_sum_integer(const std::vector<Vector<int16_t>>& x, const std::vector<Grid>& own,
                          const std::vector<int32_t>& multipliers, int shift, const Grid& to, const std::string& variant) {
  require(!x.empty() && x.size() <= kMostTerms && own.size() == x.size() && multipliers.size() == x.size(), "terms do not fit");
  IntegerSum how{};
  how.terms = static_cast<int>(x.size());
  how.y = grid_of(to);
  how.shift = shift;
  std::vector<std::vector<uint8_t>> held;
  const void* from[kMostTerms] = {};
  for (size_t n = 0; n < x.size(); ++n) {
    require(x[n].size() == x[0].size(), "terms differ in length");
    how.x[n] = grid_of(own[n]);
    how.multiplier[n] = multipliers[n];
    held.push_back(edge_of(x[n].data(), 1, x[n].size(), x[n].size(), how.x[n].bits));
    from[n] = held.back().data();
  }
  std::vector<uint8_t> y(x[0].size() * static_cast<size_t>(how.y.bits / 8));
  sum_integer(variant)(how, from, y.data(), 0, static_cast<int64_t>(x[0].size()));
  return codes_of_edge(y, {x[0].size()}, how.y.bits);
}

nb::object op_table_integer(const Vector<int16_t>& x, int bits, const Vector<int16_t>& table, int to,
                            const std::string& variant) {
  require(table.size() == size_t{1} << bits, "the table does not fit x");
  const IntegerTable how{{bits, 0}, {to, 0}, table.data()};
  const auto from = edge_of(x.data(), 1, x.size(), x.size(), bits);
  std::vector<uint8_t> y(x.size() * static_cast<size_t>(to / 8));
  table_integer(variant)(how, from.data(), y.data(), 0, static_cast<int64_t>(x.size()));
  return codes_of_edge(y, {x.size()}, to);
}

}  // namespace

void bind_integer_ops(nb::module_& m) {
  m.def("matmul_integer", &op_matmul_integer, "planes"_a, "widths"_a,
        "grid_bytes"_a, "scale"_a, "zero"_a.none(), "table"_a.none(),
        "factor"_a.none(), "out"_a, "columns"_a, "group"_a, "x"_a,
        "bits"_a, "bias"_a, "multiplier"_a, "shift"_a, "zeros"_a, "to"_a, "variant"_a);
  m.def("attention_integer", &op_attention_integer, "q"_a, "keys"_a, "values"_a, "position"_a, "window"_a, "grids"_a,
        "score"_a, "mix"_a, "cap"_a.none(), "hi"_a, "lo"_a, "probability"_a, "share"_a, "variant"_a);
  m.def("norm_integer", &op_norm_integer, "x"_a, "own"_a, "gain"_a, "offset"_a.none(), "layer"_a, "eps"_a, "shift"_a,
        "to"_a, "variant"_a);
  m.def("rotary_integer", &op_rotary_integer, "x"_a, "own"_a, "cos"_a, "sin"_a, "turned"_a, "plain"_a, "to"_a, "variant"_a);
  m.def("multiply_integer", &op_multiply_integer, "a"_a, "of_a"_a, "b"_a, "of_b"_a, "factor"_a, "to"_a, "variant"_a);
  m.def("sum_integer", &op_sum_integer, "x"_a, "own"_a, "multipliers"_a, "shift"_a, "to"_a, "variant"_a);
  m.def("table_integer", &op_table_integer, "x"_a, "bits"_a, "table"_a, "to"_a, "variant"_a);
}

}  // namespace lilliput::bind
