// Keys and values of sequences, in pages from one arena (layout: ops/attention/attention.hpp).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "ops/attention/attention.hpp"

namespace lilliput {

struct CacheShape {
  int64_t layers, kv_heads, head_dim;
  bool int8 = false;  // else float32, which loses nothing

  // Bytes of one layer and head: its keys, then its values.
  int64_t key_bytes() const { return kPage * (int8 ? head_dim + 4 : 4 * head_dim); }
  int64_t value_bytes() const { return kPage * (int8 ? head_stride(head_dim) + 4 : 4 * head_stride(head_dim)); }
  int64_t key_offset(int64_t layer, int64_t head) const {
    return (layer * kv_heads + head) * (key_bytes() + value_bytes());
  }
  int64_t value_offset(int64_t layer, int64_t head) const { return key_offset(layer, head) + key_bytes(); }
  int64_t page_bytes() const { return layers * kv_heads * (key_bytes() + value_bytes()); }
  int64_t pages(int64_t positions) const { return (positions + kPage - 1) / kPage; }
  int64_t bytes(int64_t positions) const { return pages(positions) * page_bytes(); }
};

// A fixed number of pages. The system provides each when it is first written, so an arena for the whole of a long
// context costs no more than the positions that are reached.
class Arena {
 public:
  // Throws std::bad_alloc.
  Arena(const CacheShape& shape, int64_t pages);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  const CacheShape& shape() const { return shape_; }
  // Throws std::bad_alloc when all are taken.
  uint8_t* take();
  void give_back(const std::vector<uint8_t*>& pages) { free_.insert(free_.end(), pages.rbegin(), pages.rend()); }

 private:
  CacheShape shape_;
  size_t bytes_;
  uint8_t* memory_;
  std::vector<uint8_t*> free_;  // taken from the back
};

class Cache {
 public:
  explicit Cache(Arena& arena) : arena_(&arena) {}

  const CacheShape& shape() const { return arena_->shape(); }
  int64_t length() const { return length_; }
  const uint8_t* const* pages() const { return pages_.data(); }
  // Makes room for positions below `positions`. Throws std::bad_alloc.
  void reserve(int64_t positions);
  // Writes one position of one layer and head; key and value: (head_dim,).
  void put(int64_t layer, int64_t head, int64_t position, const float* key, const float* value);
  void advance(int64_t count) { length_ += count; }
  // Gives its pages to other sequences of the arena.
  void release();

 private:
  Arena* arena_;
  int64_t length_ = 0;
  std::vector<uint8_t*> pages_;
};

}  // namespace lilliput
