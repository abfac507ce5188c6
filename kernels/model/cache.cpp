#include "model/cache.hpp"

namespace lilliput {

void Cache::reserve(int64_t positions) {
  while (static_cast<int64_t>(pages_.size()) * kPage < positions) {
    // Zeroed: scores are computed sixteen keys at a time, and the masked ones must not be NaN.
    pages_.push_back(std::make_unique<float[]>(static_cast<size_t>(shape_.page_bytes()) / sizeof(float)));
    views_.push_back(pages_.back().get());
  }
}

void Cache::put(int64_t layer, int64_t head, int64_t position, const float* key, const float* value) {
  const int64_t at = position % kPage, dim = shape_.head_dim;
  float* page = pages_[static_cast<size_t>(position / kPage)].get();
  float* keys = page + shape_.key_offset(layer, head) + at / 16 * dim * 16 + at % 16;
  for (int64_t d = 0; d < dim; ++d) keys[d * 16] = key[d];
  float* values = page + shape_.value_offset(layer, head) + at * head_stride(dim);
  for (int64_t d = 0; d < dim; ++d) values[d] = value[d];
}

}  // namespace lilliput
