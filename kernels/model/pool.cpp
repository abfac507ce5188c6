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
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
    ++round_;
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
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
  busy_ = static_cast<int>(workers_.size());
  {
    const std::lock_guard lock(mutex_);  // without it a worker could fall asleep between its last look and our notice
    ++round_;
  }
  wake_.notify_all();
  take(0);
  for (int spin = 0; busy_.load(std::memory_order_acquire) != 0; ++spin)
    spin < kSpins ? relax() : std::this_thread::yield();
}

void Pool::serve(int worker) {
  uint64_t seen = 0;
  for (;;) {
    for (int spin = 0; spin < kSpins && round_.load(std::memory_order_acquire) == seen; ++spin) relax();
    if (round_.load(std::memory_order_acquire) == seen) {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [&] { return round_.load(std::memory_order_acquire) != seen; });
    }
    ++seen;  // the caller waits for every worker, so no round is missed
    if (stop_) return;
    take(worker);
    busy_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace lilliput
