// The nested model, and what its schedules may look at.
#include "bind/bind.hpp"

#include <algorithm>

namespace lilliput::bind {
namespace {

using Starts = nb::ndarray<const uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Columns = nb::ndarray<const uint16_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Widths = std::pair<int, std::vector<std::pair<int64_t, int>>>;  // of the prompt; steps

// What a schedule may look at, while it is asked.
struct Glimpse {
  const float* row;
  const Cache* cache;
  const Runner* model;

  void check() const { require(row != nullptr, "signals are gone once the width is chosen"); }

  nb::object logits() const {
    check();
    float* data = nullptr;
    nb::object array = new_array({static_cast<size_t>(model->spec().vocab_size)}, &data);
    std::copy_n(row, model->spec().vocab_size, data);
    return array;
  }

  // Keys and values of one layer, each (kv heads, tokens, head_dim); -1 is the last.
  nb::tuple keys_values(int64_t layer) const {
    check();
    const Spec& s = model->spec();
    if (layer < 0) layer += s.num_layers;
    require(layer >= 0 && layer < s.num_layers, "there is no such layer");
    const std::vector<size_t> shape{static_cast<size_t>(s.num_kv_heads), static_cast<size_t>(cache->length()),
                                    static_cast<size_t>(s.head_dim)};
    float *keys = nullptr, *values = nullptr;
    nb::object arrays[] = {new_array(shape, &keys), new_array(shape, &values)};
    const int64_t size = cache->length() * s.head_dim;
    for (int64_t head = 0; head < s.num_kv_heads; ++head)
      cache->read(layer, head, keys + head * size, values + head * size);
    return nb::make_tuple(arrays[0], arrays[1]);
  }
};

// A Model and the arrays it points into, kept alive together.
class BoundModel {
 public:
  BoundModel(const nb::dict& spec, int threads, const std::string& variant, bool int8)
      : model_(spec_of(spec), threads, variant, int8) {}

  void add_vector(const std::string& name, const Row& values) {
    model_.add_vector(name, std::vector<float>(values.data(), values.data() + values.size()));
  }

  void add_float(const std::string& name, const Bytes& data, const std::string& dtype, int64_t out, int64_t columns,
                 const std::optional<Row>& bias) {
    add(name, float_matrix(name, data, dtype, out, columns), bias);
  }

  void add_nested(const std::string& name, const std::vector<Bytes>& planes, const std::vector<int>& widths,
                  int grid_bytes,
                  const Grids& scales, const Grids& zeros, const Grids& tables, const Grids& factors, int64_t out,
                  int64_t columns, int64_t group, const std::optional<Row>& bias) {
    add(name, nested_matrix(name, planes, widths, grid_bytes, scales, zeros, tables, factors, out, columns, group), bias);
  }

  void add_outliers(const std::string& name, const Starts& first, const Columns& column, const Row& value) {
    model_.add_outliers(name, {first.data(), first.data() + first.size()},
                        {column.data(), column.data() + column.size()}, {value.data(), value.data() + value.size()});
  }

  void finish() { model_.finish(); }
  int threads() const { return model_.threads(); }
  int64_t cache_bytes(int64_t positions, const std::string& kv) const {
    return model_.cache_shape(kept_of(kv)).bytes(positions);
  }

  nb::object run_logits(const std::vector<int32_t>& tokens, int bits, const std::string& kv) {
    return bind::run_logits(model_, tokens, bits, kept_of(kv));
  }

  nb::list run_generate(const std::vector<std::vector<int32_t>>& prompts, const std::vector<Widths>& courses,
                        int64_t max_new_tokens, int64_t context, const std::vector<int32_t>& eos,
                        const nb::dict& sampling, const std::string& kv,
                        const std::optional<std::tuple<int, int64_t, double, double>>& drafting,
                        const nb::object& on_token, const nb::object& on_prefill, const nb::object& on_bits,
                        const nb::object& next_bits) {
    GenerateOptions options{max_new_tokens, context, kept_of(kv), eos, sampling_of(sampling), {}, {}};
    require(courses.size() == prompts.size(), "there is not one course a prompt");
    for (const Widths& course : courses) options.courses.push_back(course_of(course, next_bits));
    if (drafting) {
      const auto& [bits, most, cost, row_cost] = *drafting;
      options.drafting = {bits, most, cost, row_cost};
      for (const Course& course : options.courses) require(course.steps.size() == 1, "drafting needs one width");
    }
    Hooks hooks;
    hooks.next_bits = asked(next_bits);
    if (!on_bits.is_none()) {
      hooks.on_bits = [&on_bits](int64_t sequence, int bits) {
        nb::gil_scoped_acquire gil;
        on_bits(sequence, bits);
      };
    }
    return bind::run_generate(model_, prompts, options, on_token, on_prefill, std::move(hooks));
  }

  nb::tuple run_follow(const std::vector<int32_t>& tokens, int64_t prompt, const Widths& course, const std::string& kv,
                       const nb::object& next_bits) {
    require(prompt >= 1 && prompt <= static_cast<int64_t>(tokens.size()), "the prompt is not a part of the tokens");
    const Kept kept = kept_of(kv);
    const Course widths = course_of(course, next_bits);
    float* data = nullptr;
    nb::object array = new_array({tokens.size() - static_cast<size_t>(prompt) + 1,
                                  static_cast<size_t>(model_.spec().vocab_size)}, &data);
    const Hooks hooks{nullptr, nullptr, nullptr, signal_poll(), asked(next_bits)};
    std::vector<int> used;
    {
      nb::gil_scoped_release free;
      used = follow(model_, tokens, prompt, widths, kept, data, hooks);
    }
    return nb::make_tuple(array, used);
  }

 private:
  static Course course_of(const Widths& widths, const nb::object& next_bits) {
    Course course{widths.first, {}};
    require(!widths.second.empty() || !next_bits.is_none(), "a course has no steps and nobody to ask");
    for (const auto& [from, bits] : widths.second) {
      require(course.steps.empty() ? from == 0 : from > course.steps.back().from, "steps do not ascend from 0");
      course.steps.push_back({from, bits});
    }
    return course;
  }

  // Asks Python for the width of the next decode forward.
  std::function<int(int64_t, int64_t, const float*, const Cache&)> asked(const nb::object& next_bits) {
    if (next_bits.is_none()) return nullptr;
    return [this, &next_bits](int64_t sequence, int64_t forward, const float* row, const Cache& cache) {
      nb::gil_scoped_acquire gil;
      auto* glimpse = new Glimpse{row, &cache, &model_};
      const nb::object held = nb::cast(glimpse, nb::rv_policy::take_ownership);
      struct Ended {  // whoever keeps it beyond this call is refused
        Glimpse* of;
        ~Ended() { of->row = nullptr; }
      } ended{glimpse};
      return nb::cast<int>(next_bits(sequence, forward, held));
    };
  }

  void add(const std::string& name, HeldMatrix h, const std::optional<Row>& bias) {
    if (bias) h.matrix.bias.assign(bias->data(), bias->data() + bias->size());
    for (auto& array : h.held) held_.push_back(array);
    model_.add_matrix(name, std::move(h.matrix));
  }

  std::vector<Bytes> held_;  // destroyed after the model, whose threads are then at rest
  Model model_;
};

}  // namespace

void bind_model(nb::module_& m) {
  nb::class_<Glimpse>(m, "Glimpse")
      .def("logits", &Glimpse::logits)
      .def("keys_values", &Glimpse::keys_values, "layer"_a);
  nb::class_<BoundModel>(m, "Model")
      .def(nb::init<const nb::dict&, int, const std::string&, bool>(), "spec"_a, "threads"_a, "variant"_a, "int8"_a)
      .def("add_vector", &BoundModel::add_vector, "name"_a, "values"_a)
      .def("add_float", &BoundModel::add_float, "name"_a, "data"_a, "dtype"_a, "out"_a, "columns"_a, "bias"_a.none())
      .def("add_nested", &BoundModel::add_nested, "name"_a, "planes"_a, "widths"_a,
            "grid_bytes"_a, "scales"_a, "zeros"_a, "tables"_a,
           "factors"_a, "out"_a, "columns"_a, "group"_a, "bias"_a.none())
      .def("add_outliers", &BoundModel::add_outliers, "name"_a, "first"_a, "column"_a, "value"_a)
      .def("finish", &BoundModel::finish)
      .def("cache_bytes", &BoundModel::cache_bytes, "positions"_a, "kv"_a)
      .def_prop_ro("threads", &BoundModel::threads)
      .def("logits", &BoundModel::run_logits, "tokens"_a, "bits"_a, "kv"_a)
      .def("generate", &BoundModel::run_generate, "prompts"_a, "courses"_a, "max_new_tokens"_a, "context"_a, "eos"_a,
           "sampling"_a, "kv"_a, "drafting"_a.none(), "on_token"_a.none(), "on_prefill"_a.none(), "on_bits"_a.none(),
           "next_bits"_a.none())
      .def("follow", &BoundModel::run_follow, "tokens"_a, "prompt"_a, "course"_a, "kv"_a, "next_bits"_a.none());
}

}  // namespace lilliput::bind
