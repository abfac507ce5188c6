// A persistent pool of threads that share out ranges of items.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

namespace lilliput {

class Pool {
 public:
  // work(begin, end, worker), worker in [0, threads). It must not throw. A view: what it was made from has to outlive
  // the round, which is no matter for a lambda written into the call of `run`.
  class Work {
   public:
    template <class F, class = std::enable_if_t<!std::is_same_v<std::remove_cvref_t<F>, Work>>>
    Work(const F& f)  // NOLINT: implicit on purpose
        : self_(&f), call_([](const void* self, int64_t begin, int64_t end, int worker) {
            (*static_cast<const F*>(self))(begin, end, worker);
          }) {}
    void operator()(int64_t begin, int64_t end, int worker) const { call_(self_, begin, end, worker); }

   private:
    const void* self_;
    void (*call_)(const void*, int64_t, int64_t, int);
  };

  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls `work` on disjoint ranges of about `grain` items that cover [0, items), on all threads, and returns when all
  // are done. One caller at a time. The caller works too, and waits at the end only for ranges that a worker has
  // begun: a worker the system does not run costs nothing, one it stops costs the range it holds.
  void run(int64_t items, int64_t grain, Work work);

 private:
  // The tiles of a round are shared out beforehand, a run of neighbours each, so that a thread reads on where it
  // stopped; who is done with its own takes from the others. One word says all that is needed to claim a tile: where
  // the run ends, and which is next. A worker that comes late, even rounds late, claims a tile of the round that is
  // open now or none.
  struct alignas(64) Run {
    std::atomic<uint64_t> tiles{0};  // end in the upper half, next in the lower
  };
  static constexpr uint64_t kNext = uint64_t{1} << 32;
  static constexpr int64_t kMostTiles = int64_t{1} << 30;

  void take(int worker);
  uint32_t take_from(Run& run, int worker);
  void serve(int worker);

  std::vector<Run> runs_;  // one a thread
  std::vector<std::thread> workers_;
  alignas(64) std::atomic<uint32_t> unfinished_{0};  // tiles of this round
  alignas(64) std::atomic<uint32_t> round_{0};
  alignas(64) std::atomic<uint32_t> asleep_{0};
  std::atomic<bool> stop_{false};
  // Written between rounds, read only by who holds a tile.
  const Work* work_ = nullptr;
  int64_t items_ = 0, grain_ = 1;
};

}  // namespace lilliput
