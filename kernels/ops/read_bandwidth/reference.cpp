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

typedef uint64_t Pair __attribute__((vector_size(16)));
constexpr int64_t kPage = 4096, kHugePage = 1 << 21;

// A line at a time into four sums, each in a register: vectors as wide as the line would live on the stack where the
// compiler has no registers that wide, and 16 bytes a load are above what memory gives one core anywhere.
uint64_t sum_lines(const Pair* at, int64_t lines) {
  Pair a{}, b{}, c{}, d{};
  for (const Pair* const end = at + 4 * lines; at != end; at += 4) {
    a += at[0];
    b += at[1];
    c += at[2];
    d += at[3];
  }
  a += b + c + d;
  return a[0] + a[1];
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
      sum.fetch_add(sum_lines(reinterpret_cast<const Pair*>(base + first), (last - first) / 64));
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
