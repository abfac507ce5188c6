#include "model/pool.hpp"

#include <algorithm>

namespace lilliput {
namespace {

// Long enough to bridge the serial stretches between two rounds of one token, short enough not to burn a shared core.
constexpr int kSpins = 4000;

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

Pool::Pool(int threads) {
  try {
    for (int worker = 1; worker < threads; ++worker) workers_.emplace_back([this, worker] { serve(worker); });
  } catch (...) {  // the system refused a thread: go on with those there are
  }
}

Pool::~Pool() {
  stop_ = true;
  open_round();
  for (auto& worker : workers_) worker.join();
}

void Pool::open_round() {
  {
    // without the lock a worker could fall asleep between its last look and our notice
    const std::lock_guard lock(mutex_);
    round_.store((round_.load() / kNext + 1) * kNext, std::memory_order_release);
  }
  wake_.notify_all();
}

void Pool::take(int worker) {
  for (;;) {
    const int64_t begin = next_.fetch_add(grain_, std::memory_order_relaxed);
    if (begin >= items_) return;
    (*work_)(begin, std::min(items_, begin + grain_), worker);
  }
}

void Pool::run(int64_t items, int64_t grain, const Work& work) {
  if (items <= 0) return;
  if (workers_.empty() || items <= grain) return work(0, items, 0);
  work_ = &work;
  items_ = items;
  grain_ = std::max<int64_t>(1, grain);
  next_ = 0;
  left_ = 0;
  open_round();
  take(0);
  const uint64_t joined = round_.fetch_or(kClosed, std::memory_order_acq_rel) % kClosed;
  for (int spin = 0; left_.load(std::memory_order_acquire) != joined; ++spin)
    spin < kSpins ? relax() : std::this_thread::yield();
}

void Pool::serve(int worker) {
  uint64_t seen = 0;  // the last round this worker looked at
  for (;;) {
    const auto fresh = [&] { return round_.load(std::memory_order_acquire) / kNext != seen; };
    for (int spin = 0; spin < kSpins && !fresh(); ++spin) relax();
    if (!fresh()) {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, fresh);
    }
    if (stop_) return;
    uint64_t round = round_.load(std::memory_order_acquire);
    seen = round / kNext;
    while (round / kNext == seen && !(round & kClosed)) {
      if (!round_.compare_exchange_weak(round, round + 1, std::memory_order_acq_rel)) continue;
      take(worker);
      left_.fetch_add(1, std::memory_order_release);
      break;
    }
  }
}

}  // namespace lilliput
