#include "model/generate.hpp"

#include <algorithm>
#include <chrono>

namespace lilliput {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Logits of the last token only. The chunks before the last one still compute a row each: one in kPrefill.
void prefill(Model& model, Cache& cache, const std::vector<int32_t>& prompt, int bits, float* to,
             const std::function<void()>& poll) {
  const auto count = static_cast<int64_t>(prompt.size());
  for (int64_t at = 0; at < count; at += kPrefill)
    model.forward({{&cache, prompt.data() + at, std::min(kPrefill, count - at), false}}, bits, to, poll);
}

}  // namespace

std::vector<Generated> generate(Model& model, const std::vector<std::vector<int32_t>>& prompts,
                                const GenerateOptions& options,
                                const std::function<bool(int64_t, int32_t)>& on_token,
                                const std::function<void()>& poll) {
  const int64_t vocab = model.spec().vocab_size;
  std::vector<Generated> results(prompts.size());
  if (options.max_new_tokens <= 0) return results;
  std::vector<Cache> caches;
  for (size_t n = 0; n < prompts.size(); ++n) caches.emplace_back(model.cache_shape());
  std::vector<Sampler> samplers(prompts.size(), Sampler(options.sampling, vocab));
  std::vector<float> rows(prompts.size() * static_cast<size_t>(vocab));
  std::vector<size_t> active;

  // Draws the next token of one sequence; true when the sequence goes on.
  const auto step = [&](size_t n, float* row) {
    Generated& result = results[n];
    const int32_t token = samplers[n].draw(row);
    if (std::find(options.eos.begin(), options.eos.end(), token) != options.eos.end()) {
      result.finish = Finish::stop;
      return false;
    }
    samplers[n].see(token);
    result.tokens.push_back(token);
    if (!on_token(static_cast<int64_t>(n), token)) {
      result.finish = Finish::cancelled;
      return false;
    }
    const auto made = static_cast<int64_t>(result.tokens.size());
    return made < options.max_new_tokens && static_cast<int64_t>(prompts[n].size()) + made < options.context;
  };

  for (size_t n = 0; n < prompts.size(); ++n) {
    const auto start = Clock::now();
    prefill(model, caches[n], prompts[n], options.bits, rows.data() + n * static_cast<size_t>(vocab), poll);
    for (const int32_t token : prompts[n]) samplers[n].see(token);  // after prefill, which checks their range
    results[n].prefill_s = seconds_since(start);
  }
  const auto start = Clock::now();
  for (size_t n = 0; n < prompts.size(); ++n) {
    if (step(n, rows.data() + n * static_cast<size_t>(vocab))) active.push_back(n);
    results[n].decode_s = seconds_since(start);
  }
  while (!active.empty()) {
    std::vector<Slice> slices;
    for (const size_t n : active) slices.push_back({&caches[n], &results[n].tokens.back(), 1, false});
    model.forward(slices, options.bits, rows.data(), poll);
    std::vector<size_t> still;
    for (size_t i = 0; i < active.size(); ++i) {
      if (step(active[i], rows.data() + i * static_cast<size_t>(vocab))) still.push_back(active[i]);
      results[active[i]].decode_s = seconds_since(start);
    }
    active = std::move(still);
  }
  return results;
}

void logits(Model& model, const std::vector<int32_t>& tokens, int bits, float* to, const std::function<void()>& poll) {
  Cache cache(model.cache_shape());
  const auto count = static_cast<int64_t>(tokens.size());
  for (int64_t at = 0; at < count; at += kPrefill)
    model.forward({{&cache, tokens.data() + at, std::min(kPrefill, count - at), true}}, bits,
                  to + at * model.spec().vocab_size, poll);
}

}  // namespace lilliput
