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

  // Marks a token as part of the text so far.
  void see(int32_t token);
  // Draws one token; logits: (vocab,) float32, changed in place. Throws NotANumber when one is NaN.
  int32_t draw(float* logits);

 private:
  SamplingOptions options_;
  int64_t vocab_size_;
  uint64_t draws_ = 0;
  std::vector<uint8_t> seen_;  // empty without a penalty
  std::vector<int32_t> order_;
  std::vector<float> weights_;
};

}  // namespace lilliput
