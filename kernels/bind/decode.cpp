// What both kinds of model share: the spec, the sampler's options, logits and the loop of tokens.
#include "bind/bind.hpp"

namespace lilliput::bind {
namespace {

NormSpec norm_spec(const nb::dict& d) {
  return {nb::cast<std::string>(d["kind"]) == "layer", nb::cast<float>(d["eps"]), nb::cast<float>(d["offset"])};
}

}  // namespace

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

nb::object run_logits(Runner& model, const std::vector<int32_t>& tokens, int bits, Kept kept) {
  float* data = nullptr;
  nb::object array = new_array({tokens.size(), static_cast<size_t>(model.spec().vocab_size)}, &data);
  {
    nb::gil_scoped_release free;
    logits(model, tokens, bits, kept, data, signal_poll());
  }
  return array;
}

nb::list run_generate(Runner& model, const std::vector<std::vector<int32_t>>& prompts, const GenerateOptions& options,
                      const nb::object& on_token, const nb::object& on_prefill, Hooks hooks) {
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

}  // namespace lilliput::bind
