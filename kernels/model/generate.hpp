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

// From decode forward `from` on, counted from 0, a sequence runs at `bits`.
struct Step {
  int64_t from;
  int bits;
};

// The widths of one sequence: of its prompt, and of its decode forwards by steps that ascend from 0. Without steps
// Hooks::next_bits is asked before every decode forward.
struct Course {
  int prefill_bits = 0;
  std::vector<Step> steps;
};

// Speculation: `bits`, below the width of the answer, draft up to `most` tokens, which that width then reads in one
// pass. cost: of one forward at `bits`, and row_cost: of one more row of a pass, both as a share of a forward of the
// answer's width; they decide, with what was accepted so far, how many are drafted. most 0: none.
struct Drafting {
  int bits = 0;
  int64_t most = 0;
  double cost = 0.5, row_cost = 0.05;
};

struct GenerateOptions {
  int64_t max_new_tokens = 0, context = 0;
  Kept kept = Kept::float32;
  std::vector<int32_t> eos;
  SamplingOptions sampling;
  std::vector<Course> courses;  // one a prompt; with drafting each of one step
  Drafting drafting;
};

struct Generated {
  std::vector<int32_t> tokens;  // without the end-of-sequence token
  Finish finish = Finish::length;
  double prefill_s = 0, decode_s = 0;
  std::vector<int> widths;  // of every decode forward, those that draft and those that verify included
  int64_t drafted = 0, accepted = 0;
};

struct Hooks {
  std::function<bool(int64_t, int32_t)> on_token;    // sequence, token; false ends that sequence as cancelled
  std::function<void(int64_t, int)> on_bits;         // before on_token: the width that chose the token
  std::function<bool(int64_t, int64_t)> on_prefill;  // tokens of prompts done, in all; false cancels every sequence
  std::function<void()> poll;                        // now and then
  // Sequence, decode forward, logits (vocab,) of the last forward, cache; returns the width of that decode forward.
  std::function<int(int64_t, int64_t, const float*, const Cache&)> next_bits;
};

// Prompts are not empty and shorter than the context. They are worked off in chunks that take from each what is fair,
// and then decoded together, those of one width in one forward. The tokens of a sequence do not depend on the others.
// With drafting they are those of the answer's width alone where the temperature is 0, and distributed as those where
// it is not. Hooks may throw; nothing is kept then. Throws std::bad_alloc when the cache for all of it cannot be had.
std::vector<Generated> generate(Runner& model, const std::vector<std::vector<int32_t>>& prompts,
                                const GenerateOptions& options, const Hooks& hooks);

// Pages that `generate` asks for one sequence.
int64_t pages_of(const CacheShape& shape, int64_t prompt, const GenerateOptions& options);

// Logits of every position of a fresh sequence: (tokens, vocab) float32.
void logits(Runner& model, const std::vector<int32_t>& tokens, int bits, Kept kept, float* to,
            const std::function<void()>& poll);

// Logits along a given text whose first `prompt` tokens are read as a prompt and the others as if they had been chosen
// one by one: (tokens - prompt + 1, vocab) float32. Returns the width of each of those forwards.
std::vector<int> follow(Runner& model, const std::vector<int32_t>& tokens, int64_t prompt, const Course& course,
                        Kept kept, float* to, const Hooks& hooks);

}  // namespace lilliput
