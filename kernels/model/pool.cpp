#include "model/pool.hpp"

#include <algorithm>
#include <chrono>

namespace lilliput {
namespace {

// A spin bridges the serial stretches between two rounds of one token; longer, it would burn a core that others want.
constexpr auto kSpin = std::chrono::microseconds(40);
constexpr int kYields = 4;

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits a while for `ready`; false when it is time to sleep.
template <class Ready>
bool linger(Ready ready) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int n = 0; n < 16; ++n) {
      if (ready()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < end);
  for (int n = 0; n < kYields; ++n) {
    if (ready()) return true;
    std::this_thread::yield();
  }
  return ready();
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
  ++epoch_;
  epoch_.notify_all();
  for (auto& worker : workers_) worker.join();
}

bool Pool::open() const {
  const uint64_t tiles = tiles_.load(std::memory_order_acquire);
  return tiles % kNext < tiles / kNext;
}

void Pool::take(int worker) {
  uint64_t tiles = tiles_.load(std::memory_order_acquire);
  while (tiles % kNext < tiles / kNext) {
    if (!tiles_.compare_exchange_weak(tiles, tiles + 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
    const int64_t begin = static_cast<int64_t>(tiles % kNext) * grain_;
    (*work_)(begin, std::min(items_, begin + grain_), worker);
    if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) unfinished_.notify_one();
    tiles = tiles_.load(std::memory_order_acquire);
  }
}

void Pool::run(int64_t items, int64_t grain, Work work) {
  if (items <= 0) return;
  if (workers_.empty() || items <= grain) return work(0, items, 0);
  work_ = &work;
  items_ = items;
  grain_ = std::max({int64_t{1}, grain, (items + kMostTiles - 1) / kMostTiles});
  const auto count = static_cast<uint64_t>((items + grain_ - 1) / grain_);
  unfinished_.store(static_cast<uint32_t>(count), std::memory_order_relaxed);
  // Sequential consistency with the sleepers' `asleep_`: either we see one, or it sees the tiles.
  tiles_.store(count * kNext, std::memory_order_seq_cst);
  if (asleep_.load(std::memory_order_seq_cst) != 0) {
    ++epoch_;
    epoch_.notify_all();
  }
  take(0);
  while (!linger([this] { return unfinished_.load(std::memory_order_acquire) == 0; })) {
    const uint32_t left = unfinished_.load(std::memory_order_acquire);
    if (left != 0) unfinished_.wait(left, std::memory_order_acquire);
  }
}

void Pool::serve(int worker) {
  while (!stop_) {
    if (linger([this] { return open() || stop_.load(std::memory_order_relaxed); })) {
      take(worker);
      continue;
    }
    const uint32_t epoch = epoch_.load(std::memory_order_seq_cst);
    asleep_.fetch_add(1, std::memory_order_seq_cst);
    const uint64_t tiles = tiles_.load(std::memory_order_seq_cst);
    if (tiles % kNext >= tiles / kNext && !stop_) epoch_.wait(epoch, std::memory_order_seq_cst);
    asleep_.fetch_sub(1, std::memory_order_seq_cst);
  }
}

}  // namespace lilliput
