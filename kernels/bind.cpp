// The one file that knows Python: numpy arrays in and out, the GIL, signals. src/lilliput/engine/native.py wraps it.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <map>
#include <stdexcept>

#include "model/generate.hpp"
#include "model/integer.hpp"
#include "model/model.hpp"
#include "ops/read_bandwidth/read_bandwidth.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using namespace lilliput;

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Row = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Cube = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

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

void require_size(const Bytes& bytes, int64_t size, const std::string& what) {
  require(static_cast<int64_t>(bytes.size()) == size,
          what + " has " + std::to_string(bytes.size()) + " bytes instead of " + std::to_string(size));
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

Dtype dtype_of(const std::string& name) {
  if (name == "F32") return Dtype::f32;
  if (name == "F16") return Dtype::f16;
  if (name == "BF16") return Dtype::bf16;
  throw std::invalid_argument("no matrix can be stored as " + name);
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

// A matrix and the arrays its pointers lead to.
struct HeldMatrix {
  Matrix matrix;
  std::vector<Bytes> held;
};

HeldMatrix float_matrix(const std::string& name, const Bytes& data, const std::string& dtype, int64_t out,
                        int64_t columns) {
  HeldMatrix h;
  h.matrix.plain = {data.data(), dtype_of(dtype), out, columns};
  require_size(data, out * columns * (dtype == "F32" ? 4 : 2), name);
  h.held.push_back(data);
  return h;
}

HeldMatrix nested_matrix(const std::string& name, const std::vector<Bytes>& planes, const std::vector<int>& widths,
                         const std::vector<std::pair<int, Bytes>>& scales,
                         const std::vector<std::pair<int, Bytes>>& zeros,
                         const std::vector<std::pair<int, Bytes>>& tables, int64_t out, int64_t columns, int64_t group) {
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
  const int64_t bytes = row_tiles * ((columns + group - 1) / group) * kTileRows * 2;
  const auto keep = [&](const std::vector<std::pair<int, Bytes>>& from, const uint16_t** to, const char* kind) {
    for (const auto& [bits, data] : from) {
      require(bits >= 1 && bits <= 8, name + kind + " for a width outside 1..8");
      require_size(data, bytes, name + kind);
      to[bits] = reinterpret_cast<const uint16_t*>(data.data());
      h.held.push_back(data);
    }
  };
  keep(scales, h.matrix.scale, ".scale");
  keep(zeros, h.matrix.zero, ".zero");
  for (const auto& [bits, data] : tables) {
    require(bits >= 1 && bits <= 4, name + ".table for a width outside 1..4");
    require_size(data, row_tiles * kTileRows << bits, name + ".table");
    h.matrix.table[bits] = data.data();
    h.held.push_back(data);
  }
  return h;
}

NormSpec norm_spec(const nb::dict& d) {
  return {nb::cast<std::string>(d["kind"]) == "layer", nb::cast<float>(d["eps"]), nb::cast<float>(d["offset"])};
}

float number_or_zero(const nb::handle& value) { return value.is_none() ? 0.0f : nb::cast<float>(value); }

// From ModelSpec.model_dump().
Spec spec_of(const nb::dict& d) {
  Spec s;
  const std::pair<const char*, int64_t Spec::*> sizes[] = {
      {"vocab_size", &Spec::vocab_size},     {"hidden_size", &Spec::hidden_size},
      {"num_layers", &Spec::num_layers},     {"num_heads", &Spec::num_heads},
      {"num_kv_heads", &Spec::num_kv_heads}, {"head_dim", &Spec::head_dim},
      {"intermediate_size", &Spec::intermediate_size}};
  for (const auto& [name, field] : sizes) s.*field = nb::cast<int64_t>(d[name]);
  const std::pair<const char*, bool Spec::*> flags[] = {{"gated_mlp", &Spec::gated_mlp},
                                                        {"parallel_block", &Spec::parallel_block},
                                                        {"shared_block_norm", &Spec::shared_block_norm},
                                                        {"post_norms", &Spec::post_norms},
                                                        {"tied_head", &Spec::tied_head}};
  for (const auto& [name, field] : flags) s.*field = nb::cast<bool>(d[name]);
  s.norm = norm_spec(nb::cast<nb::dict>(d["norm"]));
  s.activation = activation_of(nb::cast<std::string>(d["activation"]));
  if (nb::object rotary = d["rotary"]; !rotary.is_none()) {
    s.rotary_dim = nb::cast<int64_t>(rotary["dim"]);
    s.inv_freq = nb::cast<std::vector<float>>(rotary["inv_freq"]);
    s.rotary_scale = nb::cast<float>(rotary["scale"]);
  }
  if (nb::object offset = d["position_offset"]; !offset.is_none()) s.position_offset = nb::cast<int64_t>(offset);
  if (nb::object qk = d["qk_norm"]; !qk.is_none()) {
    s.qk_norm = norm_spec(nb::cast<nb::dict>(qk["norm"]));
    s.qk_per_head = nb::cast<bool>(qk["per_head"]);
  }
  s.attn_scale = nb::cast<float>(d["attn_scale"]);
  s.attn_softcap = number_or_zero(d["attn_softcap"]);
  s.logit_softcap = number_or_zero(d["logit_softcap"]);
  s.embed_scale = nb::cast<float>(d["embed_scale"]);
  s.windows = nb::cast<std::vector<int64_t>>(d["windows"]);
  return s;
}

SamplingOptions sampling_of(const nb::dict& d) {
  SamplingOptions s;
  s.temperature = nb::cast<double>(d["temperature"]);
  s.top_k = nb::cast<int64_t>(d["top_k"]);
  s.top_p = nb::cast<double>(d["top_p"]);
  s.min_p = nb::cast<double>(d["min_p"]);
  s.repetition_penalty = nb::cast<double>(d["repetition_penalty"]);
  s.seed = nb::cast<uint64_t>(d["seed"]);
  return s;
}

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

nb::object run_logits(Runner& model, const std::vector<int32_t>& tokens, int bits, Kept kept) {
  float* data = nullptr;
  nb::object array = new_array({tokens.size(), static_cast<size_t>(model.spec().vocab_size)}, &data);
  {
    nb::gil_scoped_release free;
    logits(model, tokens, bits, kept, data, signal_poll());
  }
  return array;
}

// hooks: on_bits and next_bits, where they are wanted.
nb::list run_generate(Runner& model, const std::vector<std::vector<int32_t>>& prompts, const GenerateOptions& options,
                      const nb::object& on_token, const nb::object& on_prefill, Hooks hooks = {}) {
  for (const auto& prompt : prompts)
    require(!prompt.empty() && static_cast<int64_t>(prompt.size()) < options.context,
            "a prompt is empty or fills the context");
  // A listener says False to end; both kinds are given two numbers.
  const auto told = [](const nb::object& listener) {
    return [&listener](int64_t a, int64_t b) {
      nb::gil_scoped_acquire gil;
      return !listener(a, b).is(nb::handle(Py_False));
    };
  };
  hooks.on_token = [](int64_t, int32_t) { return true; };
  hooks.poll = signal_poll();
  if (!on_token.is_none()) hooks.on_token = told(on_token);
  if (!on_prefill.is_none()) hooks.on_prefill = told(on_prefill);
  std::vector<Generated> results;
  {
    nb::gil_scoped_release free;
    results = generate(model, prompts, options, hooks);
  }
  static const char* const kFinish[] = {"stop", "length", "cancelled"};
  nb::list list;
  for (const auto& r : results)
    list.append(nb::make_tuple(r.tokens, kFinish[static_cast<int>(r.finish)], r.prefill_s, r.decode_s, r.widths,
                               r.drafted, r.accepted));
  return list;
}

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
                  const std::vector<std::pair<int, Bytes>>& scales, const std::vector<std::pair<int, Bytes>>& zeros,
                  const std::vector<std::pair<int, Bytes>>& tables, int64_t out, int64_t columns, int64_t group,
                  const std::optional<Row>& bias) {
    add(name, nested_matrix(name, planes, widths, scales, zeros, tables, out, columns, group), bias);
  }

  void finish() { model_.finish(); }
  int threads() const { return model_.threads(); }
  int64_t cache_bytes(int64_t positions, const std::string& kv) const {
    return model_.cache_shape(kept_of(kv)).bytes(positions);
  }

  nb::object run_logits(const std::vector<int32_t>& tokens, int bits, const std::string& kv) {
    return ::run_logits(model_, tokens, bits, kept_of(kv));
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
    return ::run_generate(model_, prompts, options, on_token, on_prefill, std::move(hooks));
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

CodeGrid code_grid(const nb::handle& d) { return {nb::cast<int>(d["bits"]), nb::cast<int32_t>(d["zero"])}; }

// From Graph.model_dump().
IntegerGraph graph_of(const nb::dict& d) {
  IntegerGraph g;
  std::map<std::string, int> at;
  for (const auto& [key, value] : nb::cast<nb::dict>(d["edges"])) {
    const auto name = nb::cast<std::string>(key);
    const nb::object grid = value["grid"];
    at[name] = static_cast<int>(g.edges.size());
    g.edges.push_back({name, nb::cast<int64_t>(value["width"]), code_grid(grid), nb::cast<float>(grid["scale"])});
  }
  const auto edge = [&](const nb::handle& name) {
    const auto found = at.find(nb::cast<std::string>(name));
    require(found != at.end(), "there is no edge " + nb::cast<std::string>(name));
    return found->second;
  };
  const auto factor = [](const nb::handle& node, const std::string& prefix) {
    return Factor{nb::cast<int32_t>(node[(prefix + "multiplier").c_str()]), nb::cast<int>(node[(prefix + "shift").c_str()])};
  };
  for (const nb::handle node : nb::cast<nb::sequence>(d["nodes"])) {
    const auto op = nb::cast<std::string>(node["op"]);
    IntegerNode made{EmbedRows{}, {}, edge(node["y"])};
    const auto number = [&](const char* name) { return nb::cast<int64_t>(node[name]); };
    const auto reads = [&](std::initializer_list<const char*> names) {
      for (const char* name : names) made.x.push_back(edge(node[name]));
    };
    if (op == "embed") {
      const nb::object positions = node["positions"];
      made.how = EmbedRows{nb::cast<std::string>(node["matrix"]),
                           positions.is_none() ? std::string() : nb::cast<std::string>(positions),
                           nb::cast<float>(node["factor"]), number("offset")};
    } else if (op == "linear") {
      reads({"x"});
      made.how = LinearRows{nb::cast<std::string>(node["matrix"])};
    } else if (op == "norm") {
      reads({"x"});
      made.how = NormRuns{{{}, {}, nb::cast<std::string>(node["kind"]) == "layer", number("eps"),
                           static_cast<int>(number("shift"))},
                          number("heads"), nb::cast<bool>(node["biased"])};
    } else if (op == "rotate") {
      reads({"x"});
      made.how = RotateHeads{{{}, {}, number("head_dim"), number("dim"), factor(node, ""), factor(node, "plain_")}};
    } else if (op == "attend") {
      reads({"q", "k", "v"});
      require(nb::cast<bool>(node["causal"]), "attention to positions that follow has no kernel");
      AttendHeads how{};
      how.attention.head_dim = number("head_dim");
      how.attention.window = number("window");
      how.attention.scores = code_grid(node["scores"]);
      how.attention.score = factor(node, "");
      how.attention.mix = factor(node, "out_");
      how.attention.probability = number("probability");
      how.heads = number("heads");
      how.kv_heads = number("kv_heads");
      how.capped = !nb::object(node["capped"]).is_none();
      made.how = how;
    } else if (op == "table") {
      reads({"x"});
      made.how = IntegerTable{};
    } else if (op == "multiply") {
      reads({"a", "b"});
      made.how = IntegerProduct{{}, {}, {}, factor(node, "")};
    } else {
      require(op == "sum", "there is no node " + op);
      for (const nb::handle name : nb::cast<nb::sequence>(node["x"])) made.x.push_back(edge(name));
      IntegerSum sum{};
      const auto multipliers = nb::cast<std::vector<int32_t>>(node["multipliers"]);
      require(!made.x.empty() && made.x.size() == multipliers.size() && made.x.size() <= kMostTerms,
              "a sum of " + std::to_string(made.x.size()) + " edges has no kernel");
      sum.terms = static_cast<int>(made.x.size());
      std::copy(multipliers.begin(), multipliers.end(), sum.multiplier);
      sum.shift = static_cast<int>(number("shift"));
      made.how = sum;
    }
    g.nodes.push_back(std::move(made));
  }
  g.output = edge(d["output"]);
  g.logit_softcap = number_or_zero(d["logit_softcap"]);
  g.positions = nb::cast<int64_t>(d["positions"]);
  return g;
}

// An IntegerModel and the arrays it points into.
class BoundInteger {
 public:
  BoundInteger(const nb::dict& spec, const nb::dict& graph, int threads, const std::string& variant)
      : model_(spec_of(spec), graph_of(graph), threads, variant) {}

  void add_constant(const std::string& name, const Bytes& data) {
    held_.push_back(data);
    model_.add_constant(name, data.data(), static_cast<int64_t>(data.size()));
  }
  void add_float(const std::string& name, const Bytes& data, const std::string& dtype, int64_t out, int64_t columns) {
    add(name, float_matrix(name, data, dtype, out, columns));
  }
  void add_nested(const std::string& name, const std::vector<Bytes>& planes, const std::vector<int>& widths,
                  const std::vector<std::pair<int, Bytes>>& scales, const std::vector<std::pair<int, Bytes>>& zeros,
                  const std::vector<std::pair<int, Bytes>>& tables, int64_t out, int64_t columns, int64_t group) {
    add(name, nested_matrix(name, planes, widths, scales, zeros, tables, out, columns, group));
  }
  void finish() { model_.finish(); }
  int threads() const { return model_.threads(); }
  int64_t cache_bytes(int64_t positions) const { return model_.cache_shape(Kept::codes8).bytes(positions); }

  nb::object run_logits(const std::vector<int32_t>& tokens) { return ::run_logits(model_, tokens, 0, Kept::codes8); }

  // bits: what its one width is called in the results.
  nb::list run_generate(const std::vector<std::vector<int32_t>>& prompts, int bits, int64_t max_new_tokens,
                        int64_t context, const std::vector<int32_t>& eos, const nb::dict& sampling,
                        const nb::object& on_token, const nb::object& on_prefill) {
    const std::vector<Course> courses(prompts.size(), Course{bits, {{0, bits}}});
    const GenerateOptions options{max_new_tokens, context, Kept::codes8, eos, sampling_of(sampling), courses, {}};
    return ::run_generate(model_, prompts, options, on_token, on_prefill);
  }

  // Codes of every edge, (positions, width) of whole numbers.
  nb::dict sites(const std::vector<int32_t>& tokens, int64_t chunk) {
    require(!tokens.empty() && chunk >= 1, "no tokens, or chunks of none");
    std::map<std::string, std::vector<float>> found;
    const auto tap = [&](const IntegerEdge& edge, const void* codes, int64_t rows) {
      std::vector<float>& to = found[edge.name];
      for (int64_t t = 0; t < rows; ++t)
        for (int64_t k = 0; k < edge.width; ++k) {
          const int64_t at = t * edge.stride() + k;
          to.push_back(edge.grid.bits == 8 ? static_cast<const int8_t*>(codes)[at] : static_cast<const int16_t*>(codes)[at]);
        }
    };
    {
      nb::gil_scoped_release free;
      model_.sites(tokens, chunk, tap, signal_poll());
    }
    nb::dict made;
    for (const auto& [name, codes] : found) {
      float* data = nullptr;
      made[name.c_str()] = new_array({tokens.size(), codes.size() / tokens.size()}, &data);
      std::copy(codes.begin(), codes.end(), data);
    }
    return made;
  }

 private:
  void add(const std::string& name, HeldMatrix h) {
    for (auto& array : h.held) held_.push_back(array);
    model_.add_matrix(name, std::move(h.matrix));
  }

  std::vector<Bytes> held_;  // destroyed after the model, whose threads are then at rest
  IntegerModel model_;
};

// The ops one by one, for tests and benchmarks.

// A matrix of one width.
HeldMatrix cut_matrix(const std::vector<Bytes>& planes, const std::vector<int>& widths, const Bytes& scale,
                      const std::optional<Bytes>& zero, const std::optional<Bytes>& table, int64_t out, int64_t columns,
                      int64_t group) {
  int bits = 0;
  for (const int width : widths) bits += width;
  std::vector<std::pair<int, Bytes>> zeros, tables;
  if (zero) zeros.emplace_back(bits, *zero);
  if (table) tables.emplace_back(bits, *table);
  return nested_matrix("matrix", planes, widths, {{bits, scale}}, zeros, tables, out, columns, group);
}

nb::object op_matmul_nested(const std::vector<Bytes>& planes, const std::vector<int>& widths, const Bytes& scale,
                            const std::optional<Bytes>& zero, const std::optional<Bytes>& table, int64_t out,
                            int64_t columns, int64_t group, const Table& x, const std::string& variant) {
  const HeldMatrix h = cut_matrix(planes, widths, scale, zero, table, out, columns, group);
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

nb::object op_matmul_nested_i8(const std::vector<Bytes>& planes, const std::vector<int>& widths, const Bytes& scale,
                               const std::optional<Bytes>& zero, const std::optional<Bytes>& table, int64_t out,
                               int64_t columns, int64_t group, const Table& x, const std::string& variant) {
  const HeldMatrix h = cut_matrix(planes, widths, scale, zero, table, out, columns, group);
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

nb::object op_matmul_integer(const std::vector<Bytes>& planes, const std::vector<int>& widths, const Bytes& scale,
                             const std::optional<Bytes>& zero, const std::optional<Bytes>& table, int64_t out,
                             int64_t columns, int64_t group, const Codes& x, int bits, const Vector<int64_t>& bias,
                             const Vector<int32_t>& multiplier, const Vector<int8_t>& shift, const Grid& to,
                             const std::string& variant) {
  const HeldMatrix h = cut_matrix(planes, widths, scale, zero, table, out, columns, group);
  const auto tokens = static_cast<int64_t>(x.shape(0)), stride = quantized_stride(columns);
  const auto rows = static_cast<size_t>(out), parts = static_cast<size_t>(bits / 8);
  require(static_cast<int64_t>(x.shape(1)) == columns && bias.size() == rows && multiplier.size() == rows &&
              shift.size() == rows && columns <= kWidestIntegerRow,
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
      for (int64_t k = 0; k < columns; ++k) whole[static_cast<size_t>(n)] += 128 * (nested_code(w, n, k) - (1 << (w.bits - 1)));
  const CodeGrid grid = grid_of(to);
  std::vector<uint8_t> y(static_cast<size_t>(tokens) * rows * static_cast<size_t>(grid.bits / 8)),
      scratch(static_cast<size_t>(matmul_nested_i8_scratch(columns)));
  matmul_integer(variant)(w, {codes.data(), sum.data(), stride, bits / 8}, tokens,
                          {whole.data(), multiplier.data(), shift.data()}, grid, y.data(), out, 0,
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

nb::object op_nested_rows(const std::vector<Bytes>& planes, const std::vector<int>& widths, const Bytes& scale,
                          const std::optional<Bytes>& zero, const std::optional<Bytes>& table, int64_t out,
                          int64_t columns, int64_t group) {
  const HeldMatrix h = cut_matrix(planes, widths, scale, zero, table, out, columns, group);
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

NB_MODULE(_native, m) {
  m.doc() = "Kernels and the decode loop. Import lilliput.engine.native, not this.";
#if defined(__clang__)
  m.attr("compiler") = "clang " __clang_version__;
#elif defined(__GNUC__)
  m.attr("compiler") = "gcc " __VERSION__;
#endif
  nb::exception<NotANumber>(m, "NotANumber", PyExc_ValueError);
  m.def("variants", &variants, "op"_a);
  m.def("matmul_nested", &op_matmul_nested, "planes"_a, "widths"_a, "scale"_a, "zero"_a.none(), "table"_a.none(),
        "out"_a, "columns"_a, "group"_a, "x"_a, "variant"_a);
  m.def("matmul_nested_i8", &op_matmul_nested_i8, "planes"_a, "widths"_a, "scale"_a, "zero"_a.none(),
        "table"_a.none(), "out"_a, "columns"_a, "group"_a, "x"_a, "variant"_a);
  m.def("matmul_integer", &op_matmul_integer, "planes"_a, "widths"_a, "scale"_a, "zero"_a.none(), "table"_a.none(),
        "out"_a, "columns"_a, "group"_a, "x"_a, "bits"_a, "bias"_a, "multiplier"_a, "shift"_a, "to"_a, "variant"_a);
  m.def("attention_integer", &op_attention_integer, "q"_a, "keys"_a, "values"_a, "position"_a, "window"_a, "grids"_a,
        "score"_a, "mix"_a, "cap"_a.none(), "hi"_a, "lo"_a, "probability"_a, "share"_a, "variant"_a);
  m.def("norm_integer", &op_norm_integer, "x"_a, "own"_a, "gain"_a, "offset"_a.none(), "layer"_a, "eps"_a, "shift"_a,
        "to"_a, "variant"_a);
  m.def("rotary_integer", &op_rotary_integer, "x"_a, "own"_a, "cos"_a, "sin"_a, "turned"_a, "plain"_a, "to"_a, "variant"_a);
  m.def("multiply_integer", &op_multiply_integer, "a"_a, "of_a"_a, "b"_a, "of_b"_a, "factor"_a, "to"_a, "variant"_a);
  m.def("sum_integer", &op_sum_integer, "x"_a, "own"_a, "multipliers"_a, "shift"_a, "to"_a, "variant"_a);
  m.def("table_integer", &op_table_integer, "x"_a, "bits"_a, "table"_a, "to"_a, "variant"_a);
  m.def("quantize_i8", &op_quantize_i8, "x"_a, "group"_a, "variant"_a);
  m.def("nested_rows", &op_nested_rows, "planes"_a, "widths"_a, "scale"_a, "zero"_a.none(), "table"_a.none(),
        "out"_a, "columns"_a, "group"_a);
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
  nb::class_<Glimpse>(m, "Glimpse")
      .def("logits", &Glimpse::logits)
      .def("keys_values", &Glimpse::keys_values, "layer"_a);
  nb::class_<BoundInteger>(m, "IntegerModel")
      .def(nb::init<const nb::dict&, const nb::dict&, int, const std::string&>(), "spec"_a, "graph"_a, "threads"_a,
           "variant"_a)
      .def("add_constant", &BoundInteger::add_constant, "name"_a, "data"_a)
      .def("add_float", &BoundInteger::add_float, "name"_a, "data"_a, "dtype"_a, "out"_a, "columns"_a)
      .def("add_nested", &BoundInteger::add_nested, "name"_a, "planes"_a, "widths"_a, "scales"_a, "zeros"_a, "tables"_a,
           "out"_a, "columns"_a, "group"_a)
      .def("finish", &BoundInteger::finish)
      .def("cache_bytes", &BoundInteger::cache_bytes, "positions"_a)
      .def_prop_ro("threads", &BoundInteger::threads)
      .def("logits", &BoundInteger::run_logits, "tokens"_a)
      .def("sites", &BoundInteger::sites, "tokens"_a, "chunk"_a)
      .def("generate", &BoundInteger::run_generate, "prompts"_a, "bits"_a, "max_new_tokens"_a, "context"_a, "eos"_a,
           "sampling"_a, "on_token"_a.none(), "on_prefill"_a.none());
  nb::class_<BoundModel>(m, "Model")
      .def(nb::init<const nb::dict&, int, const std::string&, bool>(), "spec"_a, "threads"_a, "variant"_a, "int8"_a)
      .def("add_vector", &BoundModel::add_vector, "name"_a, "values"_a)
      .def("add_float", &BoundModel::add_float, "name"_a, "data"_a, "dtype"_a, "out"_a, "columns"_a, "bias"_a.none())
      .def("add_nested", &BoundModel::add_nested, "name"_a, "planes"_a, "widths"_a, "scales"_a, "zeros"_a, "tables"_a,
           "out"_a, "columns"_a, "group"_a, "bias"_a.none())
      .def("finish", &BoundModel::finish)
      .def("cache_bytes", &BoundModel::cache_bytes, "positions"_a, "kv"_a)
      .def_prop_ro("threads", &BoundModel::threads)
      .def("logits", &BoundModel::run_logits, "tokens"_a, "bits"_a, "kv"_a)
      .def("generate", &BoundModel::run_generate, "prompts"_a, "courses"_a, "max_new_tokens"_a, "context"_a, "eos"_a,
           "sampling"_a, "kv"_a, "drafting"_a.none(), "on_token"_a.none(), "on_prefill"_a.none(), "on_bits"_a.none(),
           "next_bits"_a.none())
      .def("follow", &BoundModel::run_follow, "tokens"_a, "prompt"_a, "course"_a, "kv"_a, "next_bits"_a.none());
}
