// What the files here share: numpy arrays in and out, matrices over them, the GIL and signals. These files alone know
// Python; src/lilliput/engine/native wraps them.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "model/generate.hpp"
#include "model/model.hpp"

namespace lilliput::bind {

namespace nb = nanobind;
using namespace nb::literals;

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Row = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Cube = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Grids = std::vector<std::pair<int, Bytes>>;  // by width

// arrays.cpp

// Zeros that numpy owns, and where they are.
nb::object new_array(std::vector<size_t> shape, float** data);

// Throws std::invalid_argument, which Python knows as ValueError.
void require(bool holds, const std::string& what);

// Lets Ctrl-C through while the GIL is free.
std::function<void()> signal_poll();

Activation activation_of(const std::string& name);
Kept kept_of(const std::string& name);

// A matrix and the arrays its pointers lead to.
struct HeldMatrix {
  Matrix matrix;
  std::vector<Bytes> held;
};

HeldMatrix float_matrix(const std::string& name, const Bytes& data, const std::string& dtype, int64_t out,
                        int64_t columns);
HeldMatrix nested_matrix(const std::string& name, const std::vector<Bytes>& planes, const std::vector<int>& widths,
                         int grid_bytes,
                         const Grids& scales, const Grids& zeros, const Grids& tables, const Grids& factors, int64_t out,
                         int64_t columns, int64_t group);

// A matrix of one width.
HeldMatrix cut_matrix(const std::vector<Bytes>& planes, const std::vector<int>& widths,
                      int grid_bytes, const Bytes& scale,
                      const std::optional<Bytes>& zero, const std::optional<Bytes>& table,
                      const std::optional<Bytes>& factor, int64_t out, int64_t columns, int64_t group);

// decode.cpp

float number_or_zero(const nb::handle& value);
Spec spec_of(const nb::dict& d);
SamplingOptions sampling_of(const nb::dict& d);
nb::object run_logits(Runner& model, const std::vector<int32_t>& tokens, int bits, Kept kept);

// hooks: on_bits and next_bits, where they are wanted.
nb::list run_generate(Runner& model, const std::vector<std::vector<int32_t>>& prompts, const GenerateOptions& options,
                      const nb::object& on_token, const nb::object& on_prefill, Hooks hooks = {});

// What module.cpp puts into the module, file by file.
void bind_ops(nb::module_& m);
void bind_integer_ops(nb::module_& m);
void bind_model(nb::module_& m);
void bind_integer_model(nb::module_& m);

}  // namespace lilliput::bind
