// From logits to a token. No state but the count of draws, so a sequence draws the same in any company.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

namespace lilliput {

struct SamplingOptions {
  double temperature = 0;  // 0: the largest logit, the lowest id among equals
  int64_t top_k = 0;       // 0: all
  double top_p = 1, min_p = 0, repetition_penalty = 1;
  uint64_t seed = 0;
};

// A logit that no comparison can rank.
struct NotANumber : std::domain_error {
  using std::domain_error::domain_error;
};

class Sampler {
 public:
  Sampler(const SamplingOptions& options, int64_t vocab_size);

  // Marks a token as part of the text so far; false where it was before, or no penalty asks.
  bool see(int32_t token);
  // Takes the mark of a token back.
  void forget(int32_t token);
  // Draws one token; logits: (vocab,) float32, changed in place. Throws NotANumber when one is NaN.
  int32_t draw(float* logits);
  // Draws one token as `draw` does and says how likely each was: (vocab,), empty where temperature is 0.
  int32_t draft(float* logits, std::vector<float>& likely);
  // Draws one token as `draw` would, by way of one that was drawn with probabilities `likely`: it is kept with
  // probability min(1, p / likely), and otherwise another is drawn by max(p - likely, 0), so that the token is
  // distributed as p alone says (Leviathan, Kalman, Matias 2023, theorem 1). True when it was kept.
  bool verify(float* logits, const std::vector<float>& likely, int32_t drafted, int32_t& token);

 private:
  int32_t best_of(float* logits);
  double weigh(const float* logits, int32_t best);
  int32_t pick(double left, int32_t otherwise) const;
  void spread(double sum, std::vector<float>& to) const;

  SamplingOptions options_;
  int64_t vocab_size_;
  uint64_t draws_ = 0;
  std::vector<uint8_t> seen_;  // empty without a penalty
  std::vector<int32_t> order_;
  std::vector<float> weights_, wanted_;
};

}  // namespace lilliput
