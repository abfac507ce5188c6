// The decode loop for one or more sequences. Knows no Python: hooks carry tokens out and interruptions in.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "model/model.hpp"
#include "model/sampler.hpp"

namespace lilliput {

constexpr int64_t kPrefill = 256;  // tokens of a prompt that run together

enum class Finish : int { stop, length, cancelled };

struct GenerateOptions {
  int bits = 0;
  int64_t max_new_tokens = 0, context = 0;
  std::vector<int32_t> eos;
  SamplingOptions sampling;
};

struct Generated {
  std::vector<int32_t> tokens;  // without the end-of-sequence token
  Finish finish = Finish::length;
  double prefill_s = 0, decode_s = 0;
};

// on_token(sequence, token) returns false to end that sequence as cancelled. Prompts are not empty and shorter than
// the context. The tokens of a sequence do not depend on the others. Hooks may throw; nothing is kept then.
std::vector<Generated> generate(Model& model, const std::vector<std::vector<int32_t>>& prompts,
                                const GenerateOptions& options,
                                const std::function<bool(int64_t, int32_t)>& on_token,
                                const std::function<void()>& poll);

// Logits of every position of a fresh sequence: (tokens, vocab) float32.
void logits(Model& model, const std::vector<int32_t>& tokens, int bits, float* to, const std::function<void()>& poll);

}  // namespace lilliput
