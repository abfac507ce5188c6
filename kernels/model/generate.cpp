#include "model/generate.hpp"

#include <algorithm>
#include <chrono>

namespace lilliput {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// How many tokens a sequence drafts: as many as make the most tokens a unit of time, if each is accepted with the rate
// seen lately. It heeds no clock, so that the same seed draws the same tokens.
class Pace {
 public:
  int64_t length(const Drafting& d, int64_t room) {
    const int64_t most = std::min(d.most, room);
    int64_t best = 0;
    double expected = 1, chance = 1, best_gain = 1;
    for (int64_t k = 1; k <= most; ++k) {
      expected += chance *= rate_;
      const double gain = expected / (1 + static_cast<double>(k) * (d.cost + d.row_cost));
      if (gain > best_gain) {
        best_gain = gain;
        best = k;
      }
    }
    if (best > 0) idle_ = 0;
    else if (++idle_ % kProbe == 0) best = std::min<int64_t>(2, most);  // the text may have become easier
    return best;
  }
  void note(bool accepted) { rate_ += ((accepted ? 1.0 : 0.0) - rate_) / kMemory; }

 private:
  static constexpr int kProbe = 16, kMemory = 24;
  double rate_ = 0.9;
  int64_t idle_ = 0;
};

struct Sequence {
  Sequence(const std::vector<int32_t>& text, const Course& widths, Arena& arena, const SamplingOptions& sampling,
           int64_t vocab)
      : prompt(&text), course(&widths), cache(arena), sampler(sampling, vocab) {}

  const std::vector<int32_t>* prompt;
  const Course* course;
  Cache cache;
  Sampler sampler;
  Generated made;
  int64_t forwards = 0;        // of the decode
  size_t step = 0;             // of the course, in force
  const float* row = nullptr;  // logits of the last forward
  // Of drafting: the last token and those drafted after it, and how likely the draft held each of these.
  Pace pace;
  std::vector<int32_t> block;
  std::vector<std::vector<float>> likely;
  int64_t goal = 0;
};

// Tokens of one sequence for the next forward of its width.
struct Request {
  size_t n;
  const int32_t* tokens;
  int64_t count;
  Rows rows;
  int bits;
  float* row = nullptr;  // set by `run`: the first of its rows of logits

  int64_t row_count() const { return rows == Rows::all ? count : rows == Rows::last ? 1 : 0; }
};

class Loop {
 public:
  Loop(Runner& model, const std::vector<std::vector<int32_t>>& prompts, const GenerateOptions& options,
       const Hooks& hooks, Arena& arena)
      : model_(model), options_(options), hooks_(hooks), vocab_(model.spec().vocab_size) {
    for (size_t n = 0; n < prompts.size(); ++n) {
      sequences_.emplace_back(prompts[n], options.courses[n], arena, options.sampling, vocab_);
      active_.push_back(n);
    }
  }

  std::vector<Generated> all() {
    start_ = Clock::now();
    if (prefill()) {
      start_ = Clock::now();
      std::vector<size_t> still;
      for (Sequence& s : sequences_) {
        const auto n = static_cast<size_t>(&s - sequences_.data());
        go_on(n, choose(s, first_.data() + n * static_cast<size_t>(vocab_)), s.course->prefill_bits, still);
      }
      active_ = std::move(still);
      while (!active_.empty()) options_.drafting.most > 0 ? speculate() : decode();
    }
    std::vector<Generated> results;
    for (Sequence& s : sequences_) results.push_back(std::move(s.made));
    return results;
  }

 private:
  // Runs what was asked for, one forward for each width.
  void run(std::vector<Request>& requests) {
    int64_t rows = 0;
    for (const Request& r : requests) rows += r.row_count();
    if (static_cast<int64_t>(made_.size()) < rows * vocab_) made_.resize(static_cast<size_t>(rows * vocab_));
    float* to = made_.data();
    done_.assign(requests.size(), 0);
    for (size_t first = 0; first < requests.size(); ++first) {
      if (done_[first]) continue;
      slices_.clear();
      float* const begin = to;
      for (size_t i = first; i < requests.size(); ++i) {
        Request& r = requests[i];
        if (r.bits != requests[first].bits) continue;
        done_[i] = 1;
        slices_.push_back({&sequences_[r.n].cache, r.tokens, r.count, r.rows});
        r.row = to;
        to += r.row_count() * vocab_;
      }
      model_.forward(slices_, requests[first].bits, begin, hooks_.poll);
    }
  }

  // Reads the prompts; false when a listener gave them up.
  bool prefill() {
    int64_t total = 0;
    for (const Sequence& s : sequences_) total += static_cast<int64_t>(s.prompt->size());
    first_.resize(sequences_.size() * static_cast<size_t>(vocab_));
    for (int64_t done = 0; done < total;) {
      requests_.clear();
      std::vector<size_t> still;
      int64_t room = kPrefill;
      for (size_t i = 0; i < active_.size(); ++i) {
        const size_t n = active_[i];
        const Sequence& s = sequences_[n];
        const int64_t at = s.cache.length(), left = static_cast<int64_t>(s.prompt->size()) - at;
        const auto waiting = static_cast<int64_t>(active_.size() - i);
        const int64_t count = std::min(left, (room + waiting - 1) / waiting);
        if (count > 0)
          requests_.push_back(
              {n, s.prompt->data() + at, count, count == left ? Rows::last : Rows::none, s.course->prefill_bits});
        if (count < left) still.push_back(n);
        room -= count;
        done += count;
      }
      run(requests_);
      for (const Request& r : requests_) {
        if (r.rows == Rows::none) continue;
        Sequence& s = sequences_[r.n];
        std::copy_n(r.row, vocab_, first_.data() + r.n * static_cast<size_t>(vocab_));
        for (const int32_t token : *s.prompt) s.sampler.see(token);  // after forward, which checks their range
        s.made.prefill_s = seconds_since(start_);
      }
      active_ = std::move(still);
      if (hooks_.on_prefill && !hooks_.on_prefill(done, total)) {
        for (Sequence& s : sequences_) {
          s.made.finish = Finish::cancelled;
          if (s.made.prefill_s == 0) s.made.prefill_s = seconds_since(start_);
        }
        return false;
      }
    }
    return true;
  }

  // One decode forward of every sequence, each at its own width.
  void decode() {
    requests_.clear();
    for (const size_t n : active_) {
      Sequence& s = sequences_[n];
      requests_.push_back({n, &s.made.tokens.back(), 1, Rows::last, width(n)});
      s.made.widths.push_back(requests_.back().bits);
      ++s.forwards;
    }
    run(requests_);
    std::vector<size_t> still;
    for (const Request& r : requests_) go_on(r.n, choose(sequences_[r.n], r.row), r.bits, still);
    active_ = std::move(still);
  }

  int width(size_t n) {
    Sequence& s = sequences_[n];
    const std::vector<Step>& steps = s.course->steps;
    if (steps.empty()) return hooks_.next_bits(static_cast<int64_t>(n), s.forwards, s.row, s.cache);
    while (s.step + 1 < steps.size() && steps[s.step + 1].from <= s.forwards) ++s.step;
    return steps[s.step].bits;
  }

  // Drafts for every sequence, then reads what each drafted in one pass of the answer's width.
  void speculate() {
    const Drafting& drafting = options_.drafting;
    for (const size_t n : active_) {
      Sequence& s = sequences_[n];
      const int64_t length = s.cache.length();
      // a pass ends in one token that was not drafted; and see Cache::truncate
      int64_t room = left_of(s) - 1;
      if (options_.kept == Kept::int4) room = std::min(room, length % kGroup == 0 ? 0 : kGroup - 1 - length % kGroup);
      s.goal = s.pace.length(drafting, room);
      s.block.assign(1, s.made.tokens.back());
      if (static_cast<int64_t>(s.likely.size()) < s.goal) s.likely.resize(static_cast<size_t>(s.goal));
    }
    std::vector<std::pair<size_t, int32_t>> marked;
    for (size_t at = 0;; ++at) {
      requests_.clear();
      for (const size_t n : active_) {
        Sequence& s = sequences_[n];
        if (s.goal > static_cast<int64_t>(at)) requests_.push_back({n, &s.block[at], 1, Rows::last, drafting.bits});
      }
      if (requests_.empty()) break;
      run(requests_);
      for (const Request& r : requests_) {
        Sequence& s = sequences_[r.n];
        const int32_t token = s.sampler.draft(r.row, s.likely[at]);
        s.made.widths.push_back(drafting.bits);
        ++s.made.drafted;
        s.block.push_back(token);
        if (s.sampler.see(token)) marked.emplace_back(r.n, token);
        if (is_end(token)) s.goal = static_cast<int64_t>(at) + 1;
      }
    }
    for (const auto& [n, token] : marked) sequences_[n].sampler.forget(token);
    requests_.clear();
    for (const size_t n : active_) {
      Sequence& s = sequences_[n];
      s.cache.truncate(s.cache.length() - s.goal);
      const int bits = s.course->steps[0].bits;
      s.made.widths.push_back(bits);
      requests_.push_back({n, s.block.data(), static_cast<int64_t>(s.block.size()), Rows::all, bits});
    }
    run(requests_);
    std::vector<size_t> still;
    for (const Request& r : requests_) accept(r, still);
    active_ = std::move(still);
  }

  // Takes from a pass over a block what the answer's width agrees with, and one token more.
  void accept(const Request& r, std::vector<size_t>& still) {
    Sequence& s = sequences_[r.n];
    const int64_t before = s.cache.length() - r.count;
    int64_t kept = 1;
    for (size_t i = 0;; ++i, ++kept) {
      float* row = r.row + static_cast<int64_t>(i) * vocab_;
      const bool drafted = i + 1 < s.block.size();
      int32_t token = 0;
      bool agreed = false;
      if (drafted) {
        agreed = s.sampler.verify(row, s.likely[i], s.block[i + 1], token);
        s.pace.note(agreed);
        s.made.accepted += agreed;
      } else {
        token = s.sampler.draw(row);
      }
      const bool more = tell(r.n, token, agreed ? options_.drafting.bits : r.bits);
      if (more && agreed) continue;
      s.cache.truncate(before + kept);
      end_or_keep(r.n, more, still);
      return;
    }
  }

  // The next token of one sequence. The row stays as it is where a schedule wants to see it.
  int32_t choose(Sequence& s, float* row) {
    s.row = row;
    if (!s.course->steps.empty() || options_.sampling.repetition_penalty == 1) return s.sampler.draw(row);
    copy_.assign(row, row + vocab_);
    return s.sampler.draw(copy_.data());
  }

  bool is_end(int32_t token) const {
    return std::find(options_.eos.begin(), options_.eos.end(), token) != options_.eos.end();
  }

  // Tokens that may still be written.
  int64_t left_of(const Sequence& s) const {
    const auto count = static_cast<int64_t>(s.made.tokens.size());
    return std::min(options_.max_new_tokens, options_.context - static_cast<int64_t>(s.prompt->size())) - count;
  }

  // Adds a token to its sequence; true when that goes on.
  bool tell(size_t n, int32_t token, int bits) {
    Sequence& s = sequences_[n];
    if (is_end(token)) {
      s.made.finish = Finish::stop;
      return false;
    }
    s.sampler.see(token);
    s.made.tokens.push_back(token);
    if (hooks_.on_bits) hooks_.on_bits(static_cast<int64_t>(n), bits);
    if (!hooks_.on_token(static_cast<int64_t>(n), token)) {
      s.made.finish = Finish::cancelled;
      return false;
    }
    return left_of(s) > 0;
  }

  void end_or_keep(size_t n, bool more, std::vector<size_t>& still) {
    if (more)
      still.push_back(n);
    else
      sequences_[n].cache.release();
    sequences_[n].made.decode_s = seconds_since(start_);
  }

  void go_on(size_t n, int32_t token, int bits, std::vector<size_t>& still) {
    end_or_keep(n, tell(n, token, bits), still);
  }

  Runner& model_;
  const GenerateOptions& options_;
  const Hooks& hooks_;
  const int64_t vocab_;
  std::vector<Sequence> sequences_;
  std::vector<size_t> active_;
  std::vector<Request> requests_;
  std::vector<uint8_t> done_;
  std::vector<Slice> slices_;
  std::vector<float> first_, made_, copy_;
  Clock::time_point start_;
};

}  // namespace

int64_t pages_of(const CacheShape& shape, int64_t prompt, const GenerateOptions& options) {
  return shape.pages(std::min(options.context, prompt + options.max_new_tokens));
}

std::vector<Generated> generate(Runner& model, const std::vector<std::vector<int32_t>>& prompts,
                                const GenerateOptions& options, const Hooks& hooks) {
  if (options.max_new_tokens <= 0 || prompts.empty()) return std::vector<Generated>(prompts.size());
  const CacheShape shape = model.cache_shape(options.kept);
  int64_t pages = 0;
  for (const auto& prompt : prompts) pages += pages_of(shape, static_cast<int64_t>(prompt.size()), options);
  Arena arena(shape, pages, static_cast<int64_t>(prompts.size()));
  return Loop(model, prompts, options, hooks, arena).all();
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

std::vector<int> follow(Runner& model, const std::vector<int32_t>& tokens, int64_t prompt, const Course& course,
                        Kept kept, float* to, const Hooks& hooks) {
  const auto count = static_cast<int64_t>(tokens.size()), vocab = model.spec().vocab_size;
  const CacheShape shape = model.cache_shape(kept);
  Arena arena(shape, shape.pages(count), 1);
  Cache cache(arena);
  for (int64_t at = 0; at < prompt; at += kPrefill) {
    const int64_t length = std::min(kPrefill, prompt - at);
    model.forward({{&cache, tokens.data() + at, length, at + length == prompt ? Rows::last : Rows::none}},
                  course.prefill_bits, to, hooks.poll);
  }
  std::vector<int> widths;
  size_t step = 0;
  for (int64_t at = prompt; at < count;) {
    // Tokens of one width run together: how they are cut changes no bit.
    int64_t length = 1;
    int bits;
    if (course.steps.empty()) {
      bits = hooks.next_bits(0, at - prompt, to, cache);
    } else {
      while (step + 1 < course.steps.size() && course.steps[step + 1].from <= at - prompt) ++step;
      bits = course.steps[step].bits;
      const int64_t until = step + 1 < course.steps.size() ? prompt + course.steps[step + 1].from : count;
      length = std::min({kPrefill, until - at, count - at});
    }
    model.forward({{&cache, tokens.data() + at, length, Rows::all}}, bits, to + vocab, hooks.poll);
    widths.insert(widths.end(), static_cast<size_t>(length), bits);
    to += length * vocab;
    at += length;
  }
  return widths;
}

}  // namespace lilliput
