#include "model/sampler.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "ops/activation/activation.hpp"
#include "ops/vec.hpp"

namespace lilliput {
namespace {

// SplitMix64 as a counter-based generator: draw n of a seed needs no draws before it. Uniform in [0, 1), 53 bits.
double uniform(uint64_t seed, uint64_t n) {
  uint64_t z = seed * 0xd1342543de82ef95ull + (n + 1) * 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  z ^= z >> 31;
  return static_cast<double>(z >> 11) * 0x1p-53;
}

// The largest of some floats, and whether one is not a number.
struct Peak {
  float value;
  bool broken;
};

Peak peak_of(const float* from, int64_t count) {
  Floats most = spread(-INFINITY);
  Ints broken{};
  int64_t n = 0;
  for (; n + kLanes <= count; n += kLanes) {
    const Floats v = load(from + n);
    most = select(v > most, v, most);
    broken = broken | (as_ints(as_words(v) & 0x7fffffffu) > 0x7f800000);
  }
  Peak peak{largest(most), largest(-broken) > 0};
  for (; n < count; ++n) {
    peak.value = from[n] > peak.value ? from[n] : peak.value;
    peak.broken = peak.broken || std::isnan(from[n]);
  }
  return peak;
}

// The lowest id of those with the largest logit. Block by block, so that few are looked at twice: other threads wait.
int32_t likeliest(const float* logits, int64_t vocab_size) {
  constexpr int64_t kBlock = 1024;
  float most = -INFINITY;
  int64_t id = 0;
  for (int64_t begin = 0; begin < vocab_size; begin += kBlock) {
    const Peak peak = peak_of(logits + begin, std::min(kBlock, vocab_size - begin));
    if (peak.broken) throw NotANumber("a logit is not a number");
    if (peak.value > most) {
      most = peak.value;
      id = begin;
    }
  }
  while (logits[id] != most) ++id;
  return static_cast<int32_t>(id);
}

}  // namespace

Sampler::Sampler(const SamplingOptions& options, int64_t vocab_size) : options_(options), vocab_size_(vocab_size) {
  if (options.repetition_penalty != 1) seen_.resize(static_cast<size_t>(vocab_size));
}

bool Sampler::see(int32_t token) {
  if (seen_.empty() || seen_[static_cast<size_t>(token)]) return false;
  seen_[static_cast<size_t>(token)] = 1;
  return true;
}

void Sampler::forget(int32_t token) { seen_[static_cast<size_t>(token)] = 0; }

// Applies the penalty.
int32_t Sampler::best_of(float* logits) {
  const auto penalty = static_cast<float>(options_.repetition_penalty);
  for (size_t id = 0; id < seen_.size(); ++id)
    if (seen_[id]) logits[id] = logits[id] > 0 ? logits[id] / penalty : logits[id] * penalty;
  return likeliest(logits, vocab_size_);
}

// Fills weights_ for the first of order_, those that the cuts leave. Returns their sum.
double Sampler::weigh(const float* logits, int32_t best) {
  // Candidates by falling logit, the lower id first among equals; sorted only where a cut needs it.
  order_.resize(static_cast<size_t>(vocab_size_));
  std::iota(order_.begin(), order_.end(), 0);
  const auto before = [logits](int32_t a, int32_t b) {
    return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
  };
  if (options_.top_k > 0 && options_.top_k < vocab_size_) {
    std::partial_sort(order_.begin(), order_.begin() + options_.top_k, order_.end(), before);
    order_.resize(static_cast<size_t>(options_.top_k));
  } else if (options_.top_p < 1) {
    std::sort(order_.begin(), order_.end(), before);
  }
  weights_.resize(order_.size());
  const float peak = logits[best];
  const auto temperature = static_cast<float>(options_.temperature);
  for (size_t i = 0; i < order_.size(); ++i) weights_[i] = (logits[order_[i]] - peak) / temperature;
  exponentials(weights_.data(), static_cast<int64_t>(weights_.size()));

  double sum = std::accumulate(weights_.begin(), weights_.end(), 0.0);
  if (options_.top_p < 1) {  // the shortest head of the order that holds top_p of the mass
    const double target = options_.top_p * sum;
    double held = 0;
    size_t kept = 0;
    while (kept < weights_.size() && (kept == 0 || held < target)) held += weights_[kept++];
    weights_.resize(kept);
    sum = held;
  }
  if (options_.min_p > 0) {  // weights are relative to the likeliest token, which has 1
    sum = 0;
    for (float& w : weights_) {
      if (w < options_.min_p) w = 0;
      sum += w;
    }
  }
  return sum;
}

int32_t Sampler::pick(double left, int32_t otherwise) const {
  int32_t chosen = otherwise;
  for (size_t i = 0; i < weights_.size(); ++i) {
    if (weights_[i] == 0) continue;
    chosen = order_[i];
    if ((left -= weights_[i]) < 0) break;
  }
  return chosen;
}

void Sampler::spread(double sum, std::vector<float>& to) const {
  to.assign(static_cast<size_t>(vocab_size_), 0);
  for (size_t i = 0; i < weights_.size(); ++i)
    to[static_cast<size_t>(order_[i])] = static_cast<float>(weights_[i] / sum);
}

int32_t Sampler::draw(float* logits) {
  const int32_t best = best_of(logits);
  const uint64_t n = draws_++;
  if (options_.temperature == 0) return best;
  const double sum = weigh(logits, best);
  return pick(uniform(options_.seed, n) * sum, best);
}

int32_t Sampler::draft(float* logits, std::vector<float>& likely) {
  const int32_t best = best_of(logits);
  likely.clear();
  if (options_.temperature == 0) return best;
  const double sum = weigh(logits, best);
  spread(sum, likely);
  return pick(uniform(options_.seed, draws_++) * sum, best);
}

bool Sampler::verify(float* logits, const std::vector<float>& likely, int32_t drafted, int32_t& token) {
  if (options_.temperature == 0) {
    token = draw(logits);
    return token == drafted;
  }
  const int32_t best = best_of(logits);
  const double sum = weigh(logits, best);
  spread(sum, wanted_);
  token = drafted;
  const double held = likely[static_cast<size_t>(drafted)], wants = wanted_[static_cast<size_t>(drafted)];
  if (uniform(options_.seed, draws_++) * held < wants) return true;
  double rest = 0;
  for (size_t id = 0; id < wanted_.size(); ++id) rest += std::max(0.0f, wanted_[id] - likely[id]);
  const double left = uniform(options_.seed, draws_++);
  if (rest <= 0) {  // the two agree but for rounding
    token = pick(left * sum, best);
    return false;
  }
  double until = left * rest;
  for (size_t id = 0; id < wanted_.size(); ++id) {
    const float more = wanted_[id] - likely[id];
    if (more <= 0) continue;
    token = static_cast<int32_t>(id);
    if ((until -= more) < 0) break;
  }
  return false;
}

}  // namespace lilliput
