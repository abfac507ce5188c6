// The decode loop for one or more sequences. Knows no Python: hooks carry tokens out and interruptions in.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "model/model.hpp"
#include "model/sampler.hpp"

namespace lilliput {

constexpr int64_t kPrefill = 256;  // tokens of prompts that run together

enum class Finish : int { stop, length, cancelled };

struct GenerateOptions {
  int bits = 0;
  int64_t max_new_tokens = 0, context = 0;
  Kept kept = Kept::float32;
  std::vector<int32_t> eos;
  SamplingOptions sampling;
};

struct Generated {
  std::vector<int32_t> tokens;  // without the end-of-sequence token
  Finish finish = Finish::length;
  double prefill_s = 0, decode_s = 0;
};

struct Hooks {
  std::function<bool(int64_t, int32_t)> on_token;     // sequence, token; false ends that sequence as cancelled
  std::function<bool(int64_t, int64_t)> on_prefill;   // tokens of prompts done, in all; false cancels every sequence
  std::function<void()> poll;                         // now and then
};

// Prompts are not empty and shorter than the context. They are worked off in chunks that take from each what is fair,
// and then decoded together. The tokens of a sequence do not depend on the others. Hooks may throw; nothing is kept
// then. Throws std::bad_alloc when the cache for all of it cannot be had.
std::vector<Generated> generate(Runner& model, const std::vector<std::vector<int32_t>>& prompts,
                                const GenerateOptions& options, const Hooks& hooks);

// Pages that `generate` asks for one sequence.
int64_t pages_of(const CacheShape& shape, int64_t prompt, const GenerateOptions& options);

// Logits of every position of a fresh sequence: (tokens, vocab) float32.
void logits(Runner& model, const std::vector<int32_t>& tokens, int bits, Kept kept, float* to,
            const std::function<void()>& poll);

}  // namespace lilliput
