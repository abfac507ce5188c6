#include "ops/read_bandwidth/read_bandwidth.hpp"

#include <algorithm>
#include <atomic>
#include <barrier>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace lilliput {
namespace {

typedef uint64_t Line __attribute__((vector_size(64)));
constexpr int64_t kPage = 4096, kHugePage = 1 << 21;

// Two lines at a time: enough adds in flight that the loads, not the adds, are what it waits for.
uint64_t sum_lines(const Line* line, int64_t count) {
  Line even{}, odd{};
  for (int64_t i = 0; i + 1 < count; i += 2) {
    even += line[i];
    odd += line[i + 1];
  }
  even += odd;
  uint64_t sum = 0;
  for (int l = 0; l < 8; ++l) sum += even[l];
  return sum;
}

}  // namespace

double read_bandwidth(int64_t bytes, int threads, int rounds) {
  if (threads < 1 || rounds < 1 || bytes < threads * kPage)
    throw std::invalid_argument("read_bandwidth needs a page of memory for every thread, and a round");
  const int64_t pages = bytes / kPage, huge = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  const std::unique_ptr<void, decltype(&std::free)> memory(std::aligned_alloc(kHugePage, huge), &std::free);
  if (!memory) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  madvise(memory.get(), huge, MADV_HUGEPAGE);
#endif
  auto* const base = static_cast<uint8_t*>(memory.get());
  std::barrier together(threads);
  std::atomic<uint64_t> sum{0};
  double best = 0;
  const auto work = [&](int thread) {
    const int64_t first = pages * thread / threads * kPage, last = pages * (thread + 1) / threads * kPage;
    std::memset(base + first, 1, last - first);  // by its reader: in the memory nearest to it
    for (int round = 0; round <= rounds; ++round) {
      together.arrive_and_wait();
      const auto start = std::chrono::steady_clock::now();
      // the sum is kept, or the compiler would drop the reads
      sum.fetch_add(sum_lines(reinterpret_cast<const Line*>(base + first), (last - first) / 64));
      together.arrive_and_wait();
      const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start;
      if (thread == 0 && round > 0) best = std::max(best, static_cast<double>(pages * kPage) / spent.count());
    }
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(work, thread);
  work(0);
  for (auto& other : others) other.join();
  const uint64_t expected = static_cast<uint64_t>(pages * kPage / 8) * 0x0101010101010101u * (rounds + 1);
  if (sum != expected) throw std::runtime_error("read_bandwidth read something other than it wrote");
  return best;
}

}  // namespace lilliput
