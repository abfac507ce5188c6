// Arrays and matrices over them, and the names that Python has for kinds of things.
#include "bind/bind.hpp"

#include <algorithm>
#include <chrono>
#include <stdexcept>

namespace lilliput::bind {
namespace {

void require_size(const Bytes& bytes, int64_t size, const std::string& what) {
  require(static_cast<int64_t>(bytes.size()) == size,
          what + " has " + std::to_string(bytes.size()) + " bytes instead of " + std::to_string(size));
}

Dtype dtype_of(const std::string& name) {
  if (name == "F32") return Dtype::f32;
  if (name == "F16") return Dtype::f16;
  if (name == "BF16") return Dtype::bf16;
  throw std::invalid_argument("no matrix can be stored as " + name);
}

}  // namespace

nb::object new_array(std::vector<size_t> shape, float** data) {
  size_t count = 1;
  for (const size_t n : shape) count *= n;
  auto* memory = new float[count]();
  *data = memory;
  nb::capsule owner(memory, [](void* p) noexcept { delete[] static_cast<float*>(p); });
  return nb::cast(nb::ndarray<nb::numpy, float>(memory, shape.size(), shape.data(), owner));
}

void require(bool holds, const std::string& what) {
  if (!holds) throw std::invalid_argument(what);
}

// Signals are looked at twenty times a second: often enough for Ctrl-C, seldom enough to cost nothing.
std::function<void()> signal_poll() {
  return [last = std::chrono::steady_clock::now()]() mutable {
    const auto now = std::chrono::steady_clock::now();
    if (now - last < std::chrono::milliseconds(50)) return;
    last = now;
    nb::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
  };
}

Activation activation_of(const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "relu") return Activation::relu;
  throw std::invalid_argument("there is no activation " + name);
}

Kept kept_of(const std::string& name) {
  if (name == "float") return Kept::float32;
  if (name == "int8") return Kept::int8;
  if (name == "int4") return Kept::int4;
  throw std::invalid_argument("keys and values cannot be kept as " + name);
}

HeldMatrix float_matrix(const std::string& name, const Bytes& data, const std::string& dtype, int64_t out,
                        int64_t columns) {
  HeldMatrix h;
  h.matrix.plain = {data.data(), dtype_of(dtype), out, columns};
  require_size(data, out * columns * (dtype == "F32" ? 4 : 2), name);
  h.held.push_back(data);
  return h;
}

HeldMatrix nested_matrix(const std::string& name, const std::vector<Bytes>& planes, const std::vector<int>& widths,
                         int grid_bytes, const Grids& scales, const Grids& zeros, const Grids& tables,
                         const Grids& factors, int64_t out, int64_t columns, int64_t group) {
  require(out > 0 && columns > 0 && group > 0, name + " has an empty shape");
  require(!planes.empty() && planes.size() == widths.size() && planes.size() <= 8, name + ": fields do not match");
  HeldMatrix h;
  h.matrix.nested = true;
  NestedView& view = h.matrix.fields;
  const int64_t row_tiles = (out + kTileRows - 1) / kTileRows, input_tiles = (columns + kTileInputs - 1) / kTileInputs;
  view.out = out;
  view.columns = columns;
  view.group = group;
  for (size_t f = 0; f < planes.size(); ++f) {
    require(widths[f] == 1 || widths[f] == 2 || widths[f] == 4, name + ": a field is not 1, 2 or 4 bits");
    require_size(planes[f], row_tiles * input_tiles * 64 * widths[f], name + ".plane");
    view.planes[f] = planes[f].data();
    view.widths[f] = widths[f];
    view.bits += widths[f];
    h.held.push_back(planes[f]);
  }
  require(view.bits <= 8, name + ": codes of more than 8 bits");
  view.fields = static_cast<int>(planes.size());
  require(grid_bytes == 1 || grid_bytes == 2, name + ": scales are not of 1 or 2 bytes");
  view.grid_bytes = grid_bytes;
  const int64_t bytes = row_tiles * ((columns + group - 1) / group) * kTileRows * grid_bytes;
  const auto keep = [&](const Grids& from, const uint8_t** to, const char* kind) {
    for (const auto& [bits, data] : from) {
      require(bits >= 1 && bits <= 8, name + kind + " for a width outside 1..8");
      require_size(data, bytes, name + kind);
      to[bits] = data.data();
      h.held.push_back(data);
    }
  };
  keep(scales, h.matrix.scale, ".scale");
  keep(zeros, h.matrix.zero, ".zero");
  for (int bits = 1; bits <= 8 && grid_bytes == 1; ++bits)
    if (h.matrix.scale[bits])
      require(std::any_of(factors.begin(), factors.end(), [bits](const auto& f) { return f.first == bits; }),
              name + ": scales of a byte without a unit");
  for (const auto& [bits, data] : tables) {
    require(bits >= 1 && bits <= 4, name + ".table for a width outside 1..4");
    require_size(data, row_tiles * kTileRows << bits, name + ".table");
    h.matrix.table[bits] = data.data();
    h.held.push_back(data);
  }
  for (const auto& [bits, data] : factors) {
    require(bits >= 1 && bits <= 8, name + ".ratio for a width outside 1..8");
    require_size(data, 2 * row_tiles * kTileRows * 4, name + ".ratio");
    h.matrix.factor[bits] = reinterpret_cast<const float*>(data.data());
    h.held.push_back(data);
  }
  return h;
}

HeldMatrix cut_matrix(const std::vector<Bytes>& planes, const std::vector<int>& widths, int grid_bytes,
                      const Bytes& scale, const std::optional<Bytes>& zero, const std::optional<Bytes>& table,
                      const std::optional<Bytes>& factor, int64_t out, int64_t columns, int64_t group) {
  int bits = 0;
  for (const int width : widths) bits += width;
  Grids zeros, tables, factors;
  if (zero) zeros.emplace_back(bits, *zero);
  if (table) tables.emplace_back(bits, *table);
  if (factor) factors.emplace_back(bits, *factor);
  return nested_matrix("matrix", planes, widths, grid_bytes, {{bits, scale}}, zeros, tables, factors, out, columns,
                       group);
}

}  // namespace lilliput::bind
