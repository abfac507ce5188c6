// Keys and values of one sequence, in pages that are added as it grows (layout: ops/attention/attention.hpp).
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "ops/attention/attention.hpp"

namespace lilliput {

struct CacheShape {
  int64_t layers, kv_heads, head_dim;

  int64_t key_offset(int64_t layer, int64_t head) const { return (layer * kv_heads + head) * kPage * per_position(); }
  int64_t value_offset(int64_t layer, int64_t head) const { return key_offset(layer, head) + kPage * head_dim; }
  int64_t per_position() const { return head_dim + head_stride(head_dim); }
  int64_t page_bytes() const { return layers * kv_heads * kPage * per_position() * int64_t{sizeof(float)}; }
  int64_t bytes(int64_t positions) const { return (positions + kPage - 1) / kPage * page_bytes(); }
};

class Cache {
 public:
  explicit Cache(const CacheShape& shape) : shape_(shape) {}

  int64_t length() const { return length_; }
  const float* const* pages() const { return views_.data(); }
  // Makes room for positions below `positions`. Throws std::bad_alloc.
  void reserve(int64_t positions);
  // Writes one position of one layer and head; key and value: (head_dim,).
  void put(int64_t layer, int64_t head, int64_t position, const float* key, const float* value);
  void advance(int64_t count) { length_ += count; }

 private:
  CacheShape shape_;
  int64_t length_ = 0;
  std::vector<std::unique_ptr<float[]>> pages_;
  std::vector<const float*> views_;
};

}  // namespace lilliput
