// A persistent pool of threads that share out ranges of items.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace lilliput {

class Pool {
 public:
  // work(begin, end, worker), worker in [0, threads). It must not throw.
  using Work = std::function<void(int64_t, int64_t, int)>;

  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls `work` on disjoint ranges of at most `grain` items that cover [0, items), on all threads, and returns when
  // all are done. One caller at a time.
  void run(int64_t items, int64_t grain, const Work& work);

 private:
  static constexpr uint64_t kNext = uint64_t{1} << 32, kClosed = uint64_t{1} << 31;

  void open_round();
  void serve(int worker);
  void take(int worker);

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  const Work* work_ = nullptr;
  int64_t items_ = 0, grain_ = 1;
  std::atomic<int64_t> next_{0};
  // A round's number in the upper half, then whether it is closed, then how many workers joined it. A worker that the
  // system let run too late finds the round closed and is not waited for.
  std::atomic<uint64_t> round_{kClosed};
  std::atomic<uint64_t> left_{0};
  std::atomic<bool> stop_{false};
};

}  // namespace lilliput
