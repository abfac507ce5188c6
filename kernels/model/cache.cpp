#include "model/cache.hpp"

#include <cfloat>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace lilliput {
namespace {

// The largest magnitude becomes 127; whole numbers by rounding half to even. NaN and infinity make the scale NaN, so
// that they are not lost. to[i * step]: (head_dim,); returns the scale.
float quantize(const float* from, int64_t dim, int8_t* to, int64_t step) {
  float most = 0;
  bool finite = true;
  for (int64_t d = 0; d < dim; ++d) {
    const float size = std::fabs(from[d]);
    finite = finite && size <= FLT_MAX;
    most = size > most ? size : most;
  }
  // below this the inverse would overflow
  const float inverse = finite && most > 1e-30f ? 127.0f / most : 0.0f;
  for (int64_t d = 0; d < dim; ++d)
    to[d * step] = inverse == 0.0f ? int8_t{0} : static_cast<int8_t>((from[d] * inverse + 12582912.0f) - 12582912.0f);
  return finite ? most / 127.0f : NAN;
}

}  // namespace

Arena::Arena(const CacheShape& shape, int64_t pages)
    : shape_(shape), bytes_(static_cast<size_t>(pages * shape.page_bytes())), memory_(nullptr) {
  if (bytes_ == 0) return;
#if defined(__linux__)
  void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  if (bytes_ >= size_t{1} << 25) madvise(memory, bytes_, MADV_HUGEPAGE);  // fewer faults; refused, it costs nothing
#else
  void* memory = std::calloc(bytes_, 1);
  if (!memory) throw std::bad_alloc();
#endif
  memory_ = static_cast<uint8_t*>(memory);
  for (int64_t page = pages - 1; page >= 0; --page) free_.push_back(memory_ + page * shape.page_bytes());
}

Arena::~Arena() {
#if defined(__linux__)
  if (memory_) munmap(memory_, bytes_);
#else
  std::free(memory_);
#endif
}

uint8_t* Arena::take() {
  if (free_.empty()) throw std::bad_alloc();
  uint8_t* page = free_.back();
  free_.pop_back();
  return page;
}

void Cache::reserve(int64_t positions) {
  while (static_cast<int64_t>(pages_.size()) * kPage < positions) pages_.push_back(arena_->take());
}

void Cache::release() {
  arena_->give_back(pages_);
  pages_.clear();
  length_ = 0;
}

void Cache::put(int64_t layer, int64_t head, int64_t position, const float* key, const float* value) {
  const CacheShape& s = shape();
  const int64_t at = position % kPage, dim = s.head_dim, stride = head_stride(dim);
  const int64_t key_at = at / 16 * dim * 16 + at % 16, value_at = at * stride;
  uint8_t* page = pages_[static_cast<size_t>(position / kPage)];
  uint8_t *keys = page + s.key_offset(layer, head), *values = page + s.value_offset(layer, head);
  if (s.int8) {
    auto *k = reinterpret_cast<int8_t*>(keys), *v = reinterpret_cast<int8_t*>(values);
    reinterpret_cast<float*>(k + kPage * dim)[at] = quantize(key, dim, k + key_at, 16);
    reinterpret_cast<float*>(v + kPage * stride)[at] = quantize(value, dim, v + value_at, 1);
    return;
  }
  auto *k = reinterpret_cast<float*>(keys) + key_at, *v = reinterpret_cast<float*>(values) + value_at;
  for (int64_t d = 0; d < dim; ++d) k[d * 16] = key[d];
  std::memcpy(v, value, static_cast<size_t>(dim) * sizeof(float));
}

}  // namespace lilliput
