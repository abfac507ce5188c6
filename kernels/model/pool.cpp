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

Pool::Pool(int threads) : runs_(static_cast<size_t>(std::max(1, threads))) {
  try {
    for (int worker = 1; worker < threads; ++worker) workers_.emplace_back([this, worker] { serve(worker); });
  } catch (...) {  // the system refused a thread: go on with those there are
  }
}

Pool::~Pool() {
  stop_ = true;
  ++round_;
  round_.notify_all();
  for (auto& worker : workers_) worker.join();
}

// Works off what is left of a run; how many tiles that were.
uint32_t Pool::take_from(Run& run, int worker) {
  uint32_t taken = 0;
  uint64_t tiles = run.tiles.load(std::memory_order_acquire);
  while (tiles % kNext < tiles / kNext) {
    if (!run.tiles.compare_exchange_weak(tiles, tiles + 1, std::memory_order_acq_rel, std::memory_order_acquire))
      continue;
    const int64_t begin = static_cast<int64_t>(tiles % kNext) * grain_;
    (*work_)(begin, std::min(items_, begin + grain_), worker);
    ++taken;
    tiles = run.tiles.load(std::memory_order_acquire);
  }
  return taken;
}

// Tiles taken are reported at the end, once: until then no other round can begin.
void Pool::take(int worker) {
  uint32_t taken = 0;
  for (size_t n = 0; n < runs_.size(); ++n)
    taken += take_from(runs_[(static_cast<size_t>(worker) + n) % runs_.size()], worker);
  if (taken && unfinished_.fetch_sub(taken, std::memory_order_acq_rel) == taken) unfinished_.notify_one();
}

void Pool::run(int64_t items, int64_t grain, Work work) {
  if (items <= 0) return;
  if (workers_.empty() || items <= grain) return work(0, items, 0);
  work_ = &work;
  items_ = items;
  grain_ = std::max({int64_t{1}, grain, (items + kMostTiles - 1) / kMostTiles});
  const auto count = static_cast<uint64_t>((items + grain_ - 1) / grain_), share = static_cast<uint64_t>(threads());
  unfinished_.store(static_cast<uint32_t>(count), std::memory_order_relaxed);
  for (uint64_t n = 0; n < share; ++n)
    runs_[n].tiles.store(count * (n + 1) / share * kNext + count * n / share, std::memory_order_release);
  // Sequential consistency with the sleepers' `asleep_`: either we see one, or it sees the round.
  round_.fetch_add(1, std::memory_order_seq_cst);
  if (asleep_.load(std::memory_order_seq_cst) != 0) round_.notify_all();
  take(0);
  while (!linger([this] { return unfinished_.load(std::memory_order_acquire) == 0; })) {
    const uint32_t left = unfinished_.load(std::memory_order_acquire);
    if (left != 0) unfinished_.wait(left, std::memory_order_acquire);
  }
}

void Pool::serve(int worker) {
  uint32_t seen = 0;
  while (!stop_) {
    if (linger([&] { return round_.load(std::memory_order_acquire) != seen; })) {
      seen = round_.load(std::memory_order_acquire);
      take(worker);
      continue;
    }
    asleep_.fetch_add(1, std::memory_order_seq_cst);
    round_.wait(seen, std::memory_order_seq_cst);
    asleep_.fetch_sub(1, std::memory_order_seq_cst);
  }
}

}  // namespace lilliput
