// The ops of the nested model one by one, for tests and benchmarks.
#include "bind/bind.hpp"

#include <algorithm>

#include "ops/read_bandwidth/read_bandwidth.hpp"

namespace lilliput::bind {
namespace {

nb::object op_matmul_nested(const std::vector<Bytes>& planes, const std::vector<int>& widths,
                            int grid_bytes, const Bytes& scale,
                            const std::optional<Bytes>& zero, const std::optional<Bytes>& table,
                            const std::optional<Bytes>& factor, int64_t out, int64_t columns, int64_t group,
                            const Table& x, const std::string& variant) {
  const HeldMatrix h = cut_matrix(planes, widths, grid_bytes, scale, zero, table, factor, out, columns, group);
  require(static_cast<int64_t>(x.shape(1)) == columns, "x has not as many columns as the matrix");
  float* y = nullptr;
  nb::object array = new_array({x.shape(0), static_cast<size_t>(out)}, &y);
  std::vector<float> scratch(kPanelFloats);
  matmul_nested(variant)(h.matrix.at(h.matrix.fields.bits), x.data(), static_cast<int64_t>(x.shape(0)), columns, y, out,
                         0, (out + kTileRows - 1) / kTileRows, scratch.data());
  return array;
}

// Inputs rounded to int8 and what holds them.
struct HeldInputs {
  std::vector<int8_t> codes;
  std::vector<float> scale;
  std::vector<int32_t> sum;
  QuantizedView view;
};

HeldInputs quantize_rows(const Table& x, int64_t group, const std::string& variant) {
  const auto tokens = static_cast<int64_t>(x.shape(0)), columns = static_cast<int64_t>(x.shape(1));
  require(columns > 0 && group > 0, "x has no columns or the group no inputs");
  const int64_t stride = quantized_stride(columns), groups = (columns + group - 1) / group;
  HeldInputs h;
  h.codes.resize(static_cast<size_t>(tokens * stride));
  h.scale.resize(static_cast<size_t>(tokens * groups));
  h.sum.resize(static_cast<size_t>(tokens * groups));
  for (int64_t t = 0; t < tokens; ++t)
    quantize_i8(variant)(x.data() + t * columns, columns, group, h.codes.data() + t * stride,
                         h.scale.data() + t * groups, h.sum.data() + t * groups);
  h.view = {h.codes.data(), h.scale.data(), h.sum.data(), stride, groups};
  return h;
}

nb::tuple op_quantize_i8(const Table& x, int64_t group, const std::string& variant) {
  const HeldInputs h = quantize_rows(x, group, variant);
  const size_t tokens = x.shape(0), columns = x.shape(1), groups = static_cast<size_t>(h.view.groups);
  float *codes = nullptr, *scale = nullptr, *sum = nullptr;  // all three are whole numbers or floats below 2^24
  nb::object arrays[] = {new_array({tokens, columns}, &codes), new_array({tokens, groups}, &scale),
                         new_array({tokens, groups}, &sum)};
  for (size_t t = 0; t < tokens; ++t)
    for (size_t k = 0; k < columns; ++k) codes[t * columns + k] = h.codes[t * static_cast<size_t>(h.view.stride) + k];
  std::copy(h.scale.begin(), h.scale.end(), scale);
  std::copy(h.sum.begin(), h.sum.end(), sum);
  return nb::make_tuple(arrays[0], arrays[1], arrays[2]);
}

nb::object op_matmul_nested_i8(const std::vector<Bytes>& planes, const std::vector<int>& widths,
                               int grid_bytes, const Bytes& scale,
                               const std::optional<Bytes>& zero, const std::optional<Bytes>& table,
                               const std::optional<Bytes>& factor, int64_t out, int64_t columns, int64_t group,
                               const Table& x, const std::string& variant) {
  const HeldMatrix h = cut_matrix(planes, widths, grid_bytes, scale, zero, table, factor, out, columns, group);
  require(static_cast<int64_t>(x.shape(1)) == columns, "x has not as many columns as the matrix");
  require(std::min(group, columns) <= kWidestI8Group, "a group is too wide for sums of int32");
  const HeldInputs inputs = quantize_rows(x, group, "");
  float* y = nullptr;
  nb::object array = new_array({x.shape(0), static_cast<size_t>(out)}, &y);
  std::vector<uint8_t> scratch(static_cast<size_t>(matmul_nested_i8_scratch(columns)));
  matmul_nested_i8(variant)(h.matrix.at(h.matrix.fields.bits), inputs.view, static_cast<int64_t>(x.shape(0)), y, out, 0,
                            (out + kTileRows - 1) / kTileRows, scratch.data());
  return array;
}

nb::object op_nested_rows(const std::vector<Bytes>& planes, const std::vector<int>& widths,
                          int grid_bytes, const Bytes& scale,
                          const std::optional<Bytes>& zero, const std::optional<Bytes>& table,
                          const std::optional<Bytes>& factor, int64_t out, int64_t columns, int64_t group) {
  const HeldMatrix h = cut_matrix(planes, widths, grid_bytes, scale, zero, table, factor, out, columns, group);
  float* y = nullptr;
  nb::object array = new_array({static_cast<size_t>(out), static_cast<size_t>(columns)}, &y);
  for (int64_t row = 0; row < out; ++row) nested_row(h.matrix.at(h.matrix.fields.bits), row, y + row * columns);
  return array;
}

nb::object op_matmul_float(const Bytes& data, const std::string& dtype, int64_t out, const Table& x,
                           const std::string& variant) {
  const auto columns = static_cast<int64_t>(x.shape(1));
  const HeldMatrix h = float_matrix("matrix", data, dtype, out, columns);
  float* y = nullptr;
  nb::object array = new_array({x.shape(0), static_cast<size_t>(out)}, &y);
  matmul_float(variant)(h.matrix.plain, x.data(), static_cast<int64_t>(x.shape(0)), columns, y, out, 0, out);
  return array;
}

// q: (positions, group, head_dim), the heads of one key-value head at `position` and what follows. `share`: rows that
// one call of the kernel takes.
nb::object op_attention(const Cube& q, const Table& keys, const Table& values, int64_t position, int64_t window,
                        float scale, float cap, const std::string& kv, int64_t share, const std::string& variant) {
  const auto dim = static_cast<int64_t>(q.shape(2)), group = static_cast<int64_t>(q.shape(1));
  const auto queries = static_cast<int64_t>(q.shape(0)), count = static_cast<int64_t>(keys.shape(0));
  require(static_cast<int64_t>(keys.shape(1)) == dim && static_cast<int64_t>(values.shape(1)) == dim &&
              static_cast<int64_t>(values.shape(0)) == count && position >= 0 && position + queries <= count,
          "queries, keys and values do not fit");
  require(share >= 1 && share <= kQueryRows, "a share is 1 to " + std::to_string(kQueryRows) + " rows");
  const CacheShape shape{1, 1, dim, kept_of(kv)};
  Arena arena(shape, shape.pages(count), 1);
  Cache cache(arena);
  cache.reserve(count);
  float* y = nullptr;
  nb::object array = new_array({q.shape(0), q.shape(1), q.shape(2)}, &y);
  std::vector<float> scratch(static_cast<size_t>(attention_scratch(dim)));
  const AttentionView view = cache.view(0, 0, scale, cap, window);
  int64_t put = 0;
  for (int64_t n = 0; n < queries;) {
    // queries of one group of an int4 cache before the next group is written, which rounds it
    const bool apart = shape.kept == Kept::int4;
    const int64_t next = apart ? ((position + n) / kGroup + 1) * kGroup : count;
    for (; put < std::min(next, count); ++put) cache.put(0, 0, put, keys.data() + put * dim, values.data() + put * dim);
    const int64_t last = std::min(queries, next - position);
    for (int64_t row = n * group; row < last * group; row += share)
      attention(variant)(view, {q.data(), y, group * dim, group, position}, row, std::min(row + share, last * group),
                         scratch.data());
    n = last;
  }
  return array;
}

nb::object op_norm(const Row& x, const Row& weight, const std::optional<Row>& bias, float eps, float offset, bool layer,
                   const std::string& variant) {
  require(x.size() == weight.size() && (!bias || bias->size() == x.size()), "weight or bias do not fit x");
  float* y = nullptr;
  nb::object array = new_array({x.size()}, &y);
  norm(variant)({weight.data(), bias ? bias->data() : nullptr, eps, offset, layer}, x.data(),
                static_cast<int64_t>(x.size()), y);
  return array;
}

nb::object op_rotary(const Row& x, const Row& inv_freq, int64_t position, float scale, const std::string& variant) {
  const auto half = static_cast<int64_t>(inv_freq.size());
  require(static_cast<int64_t>(x.size()) >= 2 * half, "x is shorter than the rotary dimension");
  float* y = nullptr;
  nb::object array = new_array({x.size()}, &y);
  std::copy_n(x.data(), x.size(), y);
  std::vector<float> cos(inv_freq.size()), sin(inv_freq.size());
  rotary_angles(inv_freq.data(), half, position, scale, cos.data(), sin.data());
  rotary(variant)(cos.data(), sin.data(), half, y);
  return array;
}

nb::object op_activation(const std::string& kind, const Row& x, const std::optional<Row>& up,
                         const std::string& variant) {
  require(!up || up->size() == x.size(), "up does not fit x");
  float* y = nullptr;
  nb::object array = new_array({x.size()}, &y);
  activation(variant)(activation_of(kind), x.data(), up ? up->data() : nullptr, static_cast<int64_t>(x.size()), y);
  return array;
}

nb::object op_softcap(const Row& x, float cap) {
  float* y = nullptr;
  nb::object array = new_array({x.size()}, &y);
  std::copy_n(x.data(), x.size(), y);
  softcap(cap, y, static_cast<int64_t>(x.size()));
  return array;
}

nb::object op_exponential(const Row& x) {
  float* y = nullptr;
  nb::object array = new_array({x.size()}, &y);
  std::copy_n(x.data(), x.size(), y);
  exponentials(y, static_cast<int64_t>(x.size()));
  return array;
}

std::vector<int32_t> op_sample(const Row& row, const nb::dict& sampling, const std::vector<int32_t>& seen,
                               int64_t draws) {
  const auto vocab = static_cast<int64_t>(row.size());
  Sampler sampler(sampling_of(sampling), vocab);
  for (const int32_t token : seen) {
    require(token >= 0 && token < vocab, "a token is outside the vocabulary");
    sampler.see(token);
  }
  std::vector<int32_t> drawn;
  for (int64_t n = 0; n < draws; ++n) {
    std::vector<float> copy(row.data(), row.data() + vocab);
    drawn.push_back(sampler.draw(copy.data()));
  }
  return drawn;
}

}  // namespace

void bind_ops(nb::module_& m) {
  m.def("variants", &variants, "op"_a);
  m.def("matmul_nested", &op_matmul_nested, "planes"_a, "widths"_a,
        "grid_bytes"_a, "scale"_a, "zero"_a.none(), "table"_a.none(),
        "factor"_a.none(), "out"_a, "columns"_a, "group"_a, "x"_a, "variant"_a);
  m.def("matmul_nested_i8", &op_matmul_nested_i8, "planes"_a, "widths"_a, "grid_bytes"_a, "scale"_a, "zero"_a.none(),
        "table"_a.none(), "factor"_a.none(), "out"_a, "columns"_a, "group"_a, "x"_a, "variant"_a);
  m.def("quantize_i8", &op_quantize_i8, "x"_a, "group"_a, "variant"_a);
  m.def("nested_rows", &op_nested_rows, "planes"_a, "widths"_a,
        "grid_bytes"_a, "scale"_a, "zero"_a.none(), "table"_a.none(),
        "factor"_a.none(), "out"_a, "columns"_a, "group"_a);
  m.def("matmul_float", &op_matmul_float, "data"_a, "dtype"_a, "out"_a, "x"_a, "variant"_a);
  m.def("attention", &op_attention, "q"_a, "keys"_a, "values"_a, "position"_a, "window"_a, "scale"_a, "softcap"_a,
        "kv"_a, "share"_a, "variant"_a);
  m.def("norm", &op_norm, "x"_a, "weight"_a, "bias"_a.none(), "eps"_a, "offset"_a, "layer"_a, "variant"_a);
  m.def("rotary", &op_rotary, "x"_a, "inv_freq"_a, "position"_a, "scale"_a, "variant"_a);
  m.def("activation", &op_activation, "kind"_a, "x"_a, "up"_a.none(), "variant"_a);
  m.def("softcap", &op_softcap, "x"_a, "cap"_a);
  m.def("exponential", &op_exponential, "x"_a);
  m.def("read_bandwidth", &read_bandwidth, "bytes"_a, "threads"_a, "rounds"_a,
        nb::call_guard<nb::gil_scoped_release>());
  m.def("sample", &op_sample, "row"_a, "sampling"_a, "seen"_a, "draws"_a);
}

}  // namespace lilliput::bind
