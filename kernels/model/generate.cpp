#include "model/generate.hpp"

#include <algorithm>
#include <chrono>

namespace lilliput {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

}  // namespace

int64_t pages_of(const CacheShape& shape, int64_t prompt, const GenerateOptions& options) {
  return shape.pages(std::min(options.context, prompt + options.max_new_tokens));
}

std::vector<Generated> generate(Runner& model, const std::vector<std::vector<int32_t>>& prompts,
                                const GenerateOptions& options, const Hooks& hooks) {
  const auto vocab = static_cast<size_t>(model.spec().vocab_size);
  std::vector<Generated> results(prompts.size());
  if (options.max_new_tokens <= 0 || prompts.empty()) return results;
  const CacheShape shape = model.cache_shape(options.kept);
  int64_t pages = 0, total = 0;
  for (const auto& prompt : prompts) {
    pages += pages_of(shape, static_cast<int64_t>(prompt.size()), options);
    total += static_cast<int64_t>(prompt.size());
  }
  Arena arena(shape, pages, static_cast<int64_t>(prompts.size()));
  std::vector<Cache> caches(prompts.size(), Cache(arena));
  std::vector<Sampler> samplers(prompts.size(), Sampler(options.sampling, model.spec().vocab_size));
  std::vector<float> rows(prompts.size() * vocab), made(rows.size());
  std::vector<size_t> active;
  std::vector<Slice> slices;

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
    if (!hooks.on_token(static_cast<int64_t>(n), token)) {
      result.finish = Finish::cancelled;
      return false;
    }
    const auto count = static_cast<int64_t>(result.tokens.size());
    return count < options.max_new_tokens && static_cast<int64_t>(prompts[n].size()) + count < options.context;
  };

  auto start = Clock::now();
  for (size_t n = 0; n < prompts.size(); ++n) active.push_back(n);
  for (int64_t done = 0; done < total;) {
    slices.clear();
    std::vector<size_t> still, ended;
    int64_t room = kPrefill;
    for (size_t i = 0; i < active.size(); ++i) {
      const size_t n = active[i];
      const int64_t at = caches[n].length(), left = static_cast<int64_t>(prompts[n].size()) - at;
      const int64_t fair = (room + static_cast<int64_t>(active.size() - i) - 1) / static_cast<int64_t>(active.size() - i);
      const int64_t count = std::min(left, fair);
      if (count > 0)
        slices.push_back({&caches[n], prompts[n].data() + at, count, count == left ? Rows::last : Rows::none});
      (count == left ? ended : still).push_back(n);
      room -= count;
      done += count;
    }
    model.forward(slices, options.bits, made.data(), hooks.poll);
    for (size_t i = 0; i < ended.size(); ++i) {
      const size_t n = ended[i];
      std::copy_n(made.data() + i * vocab, vocab, rows.data() + n * vocab);
      for (const int32_t token : prompts[n]) samplers[n].see(token);  // after forward, which checks their range
      results[n].prefill_s = seconds_since(start);
    }
    active = std::move(still);
    if (hooks.on_prefill && !hooks.on_prefill(done, total)) {
      for (Generated& result : results) {
        result.finish = Finish::cancelled;
        if (result.prefill_s == 0) result.prefill_s = seconds_since(start);
      }
      return results;
    }
  }
  start = Clock::now();
  active.clear();
  const auto go_on = [&](size_t n, float* row, std::vector<size_t>& to) {
    if (step(n, row))
      to.push_back(n);
    else
      caches[n].release();
    results[n].decode_s = seconds_since(start);
  };
  for (size_t n = 0; n < prompts.size(); ++n) go_on(n, rows.data() + n * vocab, active);
  while (!active.empty()) {
    slices.clear();
    for (const size_t n : active) slices.push_back({&caches[n], &results[n].tokens.back(), 1, Rows::last});
    model.forward(slices, options.bits, rows.data(), hooks.poll);
    std::vector<size_t> still;
    for (size_t i = 0; i < active.size(); ++i) go_on(active[i], rows.data() + i * vocab, still);
    active = std::move(still);
  }
  return results;
}

void logits(Runner& model, const std::vector<int32_t>& tokens, int bits, Kept kept, float* to,
            const std::function<void()>& poll) {
  const auto count = static_cast<int64_t>(tokens.size());
  const CacheShape shape = model.cache_shape(kept);
  Arena arena(shape, shape.pages(count), 1);
  Cache cache(arena);
  for (int64_t at = 0; at < count; at += kPrefill)
    model.forward({{&cache, tokens.data() + at, std::min(kPrefill, count - at), Rows::all}}, bits,
                  to + at * model.spec().vocab_size, poll);
}

}  // namespace lilliput
