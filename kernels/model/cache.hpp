// Keys and values of sequences, in pages from one arena (layout: ops/attention/attention.hpp).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "ops/attention/attention.hpp"
#include "ops/attention_integer/attention_integer.hpp"

namespace lilliput {

// An int4 cache of a sequence has pages of rounded groups, and apart from them one page of float32: the first group,
// which stays there because the first tokens draw a large share of every head's weight, and the newest.
struct CacheShape {
  int64_t layers, kv_heads, head_dim;
  Kept kept = Kept::float32;  // loses nothing

  int64_t code_bytes() const { return kept == Kept::codes8 ? 1 : kept == Kept::codes16 ? 2 : 0; }  // of one code
  // Bytes of one layer and head: its keys, then its values.
  int64_t key_bytes() const {
    if (code_bytes() > 0) return code_bytes() * kPage * 2 * channel_pairs(head_dim);
    if (kept == Kept::int4) return kPage / kGroup * key_group_bytes(head_dim);
    return kPage * (kept == Kept::int8 ? head_dim + 4 : 4 * head_dim);
  }
  int64_t value_bytes() const {
    if (code_bytes() > 0) return code_bytes() * kPage * head_stride(head_dim);
    if (kept == Kept::int4) return kPage / kGroup * value_group_bytes(head_dim);
    return kPage * (kept == Kept::int8 ? head_stride(head_dim) + 4 : 4 * head_stride(head_dim));
  }
  int64_t key_offset(int64_t layer, int64_t head) const {
    return (layer * kv_heads + head) * (key_bytes() + value_bytes());
  }
  int64_t value_offset(int64_t layer, int64_t head) const { return key_offset(layer, head) + key_bytes(); }
  int64_t page_bytes() const { return layers * kv_heads * (key_bytes() + value_bytes()); }
  // The page of float32 of an int4 cache; in other caches there is none.
  int64_t near_floats() const { return kPage * (head_dim + head_stride(head_dim)); }  // of one layer and head
  int64_t near_bytes() const { return kept == Kept::int4 ? 4 * layers * kv_heads * near_floats() : 0; }
  int64_t pages(int64_t positions) const {
    if (kept != Kept::int4) return (positions + kPage - 1) / kPage;
    if (positions <= 2 * kGroup) return 0;  // the first group and the newest
    const int64_t groups = (positions - 1) / kGroup;  // before that of the last position
    return (groups * kGroup + kPage - 1) / kPage;
  }
  int64_t bytes(int64_t positions) const {
    return pages(positions) * page_bytes() + (positions > 0 ? near_bytes() : 0);
  }
};

// A fixed number of pages, and of pages of float32 for as many sequences. The system provides each when it is first
// written, so an arena for the whole of a long context costs no more than the positions that are reached.
class Arena {
 public:
  // Throws std::bad_alloc.
  Arena(const CacheShape& shape, int64_t pages, int64_t sequences);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  const CacheShape& shape() const { return shape_; }
  // Throws std::bad_alloc when all are taken.
  uint8_t* take() { return take(free_); }
  float* take_near() { return reinterpret_cast<float*>(take(free_near_)); }
  void give_back(const std::vector<uint8_t*>& pages) { free_.insert(free_.end(), pages.rbegin(), pages.rend()); }
  void give_back_near(float* near) { free_near_.push_back(reinterpret_cast<uint8_t*>(near)); }

 private:
  CacheShape shape_;
  size_t bytes_;
  uint8_t* memory_;
  static uint8_t* take(std::vector<uint8_t*>& free);
  std::vector<uint8_t*> free_, free_near_;  // taken from the back
};

class Cache {
 public:
  explicit Cache(Arena& arena) : arena_(&arena) {}

  const CacheShape& shape() const { return arena_->shape(); }
  int64_t length() const { return length_; }
  // What attention reads of one layer and head; until more room is made.
  AttentionView view(int64_t layer, int64_t head, float scale, float softcap, int64_t window) const {
    const CacheShape& s = shape();
    const float* keys = near(layer, head);
    return {pages_.data(), s.key_offset(layer, head), s.value_offset(layer, head), s.head_dim, s.kept, scale, softcap,
            window,        keys,                      keys ? keys + kPage * s.head_dim : nullptr};
  }
  CodePages codes(int64_t layer, int64_t head) const {
    return {pages_.data(), shape().key_offset(layer, head), shape().value_offset(layer, head), shape().kept};
  }
  // Makes room for positions below `positions`. Throws std::bad_alloc.
  void reserve(int64_t positions);
  // Writes one position of one layer and head; key and value: (head_dim,). An int4 cache is written in ascending order
  // and rounds a group when the position after it is written, so one thread at a time writes a layer and head.
  void put(int64_t layer, int64_t head, int64_t position, const float* key, const float* value);
  // The same of codes of 8 or 16 bits; a cache of 8 takes no codes of 16.
  void put_codes(int64_t layer, int64_t head, int64_t position, const void* key, int key_bits, const void* value,
                 int value_bits);
  void advance(int64_t count) { length_ += count; }
  // Forgets the positions from `length` on, which are then written again. Exact for float32 and int8. An int4 cache has
  // to be at the same group of positions still: what was rounded has no floats to go back to.
  void truncate(int64_t length) { length_ = length; }
  // Reads all positions of one layer and head as float32, as attention sees them; keys, values: (length, head_dim).
  void read(int64_t layer, int64_t head, float* keys, float* values) const;
  // Gives its pages to other sequences of the arena.
  void release();

 private:
  // This layer and head in the page of float32, keys and then values; null where there is none.
  float* near(int64_t layer, int64_t head) const {
    return near_ ? near_ + (layer * shape().kv_heads + head) * shape().near_floats() : nullptr;
  }
  void round_group(int64_t layer, int64_t head, int64_t group);

  Arena* arena_;
  int64_t length_ = 0;
  float* near_ = nullptr;
  std::vector<uint8_t*> pages_;
};

}  // namespace lilliput
