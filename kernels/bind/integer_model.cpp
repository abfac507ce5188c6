// The model that is an integer graph.
#include "bind/bind.hpp"

#include <map>

#include "model/integer.hpp"

namespace lilliput::bind {
namespace {

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
                  int grid_bytes,
                  const Grids& scales, const Grids& zeros, const Grids& tables, const Grids& factors, int64_t out,
                  int64_t columns, int64_t group) {
    add(name, nested_matrix(name, planes, widths, grid_bytes, scales, zeros, tables, factors, out, columns, group));
  }
  void finish() { model_.finish(); }
  int threads() const { return model_.threads(); }
  int64_t cache_bytes(int64_t positions) const { return model_.cache_shape(Kept::codes8).bytes(positions); }

  nb::object run_logits(const std::vector<int32_t>& tokens) { return bind::run_logits(model_, tokens, 0, Kept::codes8); }

  // bits: what its one width is called in the results.
  nb::list run_generate(const std::vector<std::vector<int32_t>>& prompts, int bits, int64_t max_new_tokens,
                        int64_t context, const std::vector<int32_t>& eos, const nb::dict& sampling,
                        const nb::object& on_token, const nb::object& on_prefill) {
    const std::vector<Course> courses(prompts.size(), Course{bits, {{0, bits}}});
    const GenerateOptions options{max_new_tokens, context, Kept::codes8, eos, sampling_of(sampling), courses, {}};
    return bind::run_generate(model_, prompts, options, on_token, on_prefill);
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

}  // namespace

void bind_integer_model(nb::module_& m) {
  nb::class_<BoundInteger>(m, "IntegerModel")
      .def(nb::init<const nb::dict&, const nb::dict&, int, const std::string&>(), "spec"_a, "graph"_a, "threads"_a,
           "variant"_a)
      .def("add_constant", &BoundInteger::add_constant, "name"_a, "data"_a)
      .def("add_float", &BoundInteger::add_float, "name"_a, "data"_a, "dtype"_a, "out"_a, "columns"_a)
      .def("add_nested", &BoundInteger::add_nested, "name"_a, "planes"_a, "widths"_a,
            "grid_bytes"_a, "scales"_a, "zeros"_a, "tables"_a,
           "factors"_a, "out"_a, "columns"_a, "group"_a)
      .def("finish", &BoundInteger::finish)
      .def("cache_bytes", &BoundInteger::cache_bytes, "positions"_a)
      .def_prop_ro("threads", &BoundInteger::threads)
      .def("logits", &BoundInteger::run_logits, "tokens"_a)
      .def("sites", &BoundInteger::sites, "tokens"_a, "chunk"_a)
      .def("generate", &BoundInteger::run_generate, "prompts"_a, "bits"_a, "max_new_tokens"_a, "context"_a, "eos"_a,
           "sampling"_a, "on_token"_a.none(), "on_prefill"_a.none());
}

}  // namespace lilliput::bind
