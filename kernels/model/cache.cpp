#include "model/cache.hpp"

#include <cfloat>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>

#include "ops/vec.hpp"

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

// To float16 by rounding half to even; NaN for what is too large for it, so that it is not lost. No compiler's own half
// type, because not all of them have one.
uint16_t narrow_half(float value) {
  const float size = std::fabs(value);
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (!(size < 65520.0f)) return 0x7e00;
  if (size < 0x1p-14f) return static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(size * 0x1p24f)));
  uint32_t bits;
  std::memcpy(&bits, &size, sizeof bits);
  bits += 0xfff + (bits >> 13 & 1);
  return static_cast<uint16_t>(sign | ((bits - (112u << 23)) >> 13));
}

// Scale and minimum of values from `least` to `most`, and how to get their codes.
struct Grid {
  uint16_t scale, least;
  float zero, inverse;  // code = (x - zero) * inverse
};

Grid grid_of(float least, float most, bool finite) {
  if (!finite) return {0x7e00, 0x7e00, 0, 0};
  Grid g{narrow_half((most - least) / 15), narrow_half(least), 0, 0};
  const float scale = widen_half_1(g.scale);
  g.zero = widen_half_1(g.least);
  g.inverse = scale > 0 ? 1 / scale : 0.0f;  // of values that are all equal the code is 0; NaN too
  return g;
}

// Whole numbers 0 .. 15 by rounding half to even.
LILLIPUT_INLINE Ints codes_of(Floats x, Floats zero, Floats inverse) {
  Floats code = (x - zero) * inverse;
  code = select(code > 0.0f, code, Floats{});
  code = select(code < 15.0f, code, spread(15));
  return to_ints((code + 12582912.0f) - 12582912.0f);
}

LILLIPUT_INLINE Ints finite_lanes(Floats x) { return as_floats(as_words(x) & 0x7fffffffu) <= FLT_MAX; }

// low and high in the nibbles of to[0] .. to[15].
LILLIPUT_INLINE void pack(Ints low, Ints high, uint8_t* to) {
  store_bytes(reinterpret_cast<int8_t*>(to), low | high << 4);
}

// keys: (2, dim, 16) as they stand in a page of float32.
void round_keys(const float* keys, int64_t dim, uint8_t* codes) {
  auto *scale = reinterpret_cast<uint16_t*>(codes + 16 * dim), *minimum = scale + head_stride(dim);
  for (int64_t d = 0; d < dim; ++d) {
    const Floats a = load(keys + d * kLanes), b = load(keys + (dim + d) * kLanes);
    const bool all = largest(finite_lanes(a) & finite_lanes(b)) < 0;
    const Grid g = grid_of(-largest(select(a < b, -a, -b)), largest(select(a > b, a, b)), all);
    scale[d] = g.scale;
    minimum[d] = g.least;
    const Floats zero = spread(g.zero), inverse = spread(g.inverse);
    pack(codes_of(a, zero, inverse), codes_of(b, zero, inverse), codes + d * 16);
  }
}

// values: (kGroup, stride).
void round_values(const float* values, int64_t dim, uint8_t* codes) {
  const int64_t stride = head_stride(dim), blocks = head_blocks(dim);
  auto *scale = reinterpret_cast<uint16_t*>(codes + blocks * kGroup * 16), *minimum = scale + blocks * kGroup;
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t j = 0; j < kGroup; ++j) {
      const float* from = values + j * stride + block * kGroup;
      const int64_t count = dim - block * kGroup < kGroup ? dim - block * kGroup : kGroup;
      float padded[kGroup], least = from[0], most = from[0];
      bool finite = true;
      for (int64_t c = 0; c < kGroup; ++c) {
        const float x = from[c < count ? c : 0];
        padded[c] = x;
        finite = finite && std::fabs(x) <= FLT_MAX;
        least = x < least ? x : least;
        most = x > most ? x : most;
      }
      const Grid g = grid_of(least, most, finite);
      const int64_t at = block * kGroup + j;
      scale[at] = g.scale;
      minimum[at] = g.least;
      const Floats zero = spread(g.zero), inverse = spread(g.inverse);
      pack(codes_of(load(padded), zero, inverse), codes_of(load(padded + kLanes), zero, inverse), codes + at * 16);
    }
}

// Codes of one position to where `place` says; each is as wide as what it goes to, or narrower.
template <class Place>
void place_codes(const void* from, int bits, int64_t dim, Kept kept, uint8_t* to, const Place& place) {
  for (int64_t d = 0; d < dim; ++d) {
    const int16_t code = bits == 8 ? static_cast<const int8_t*>(from)[d] : static_cast<const int16_t*>(from)[d];
    if (kept == Kept::codes8)
      reinterpret_cast<int8_t*>(to)[place(d)] = static_cast<int8_t>(code);
    else
      reinterpret_cast<int16_t*>(to)[place(d)] = code;
  }
}

}  // namespace

Arena::Arena(const CacheShape& shape, int64_t pages, int64_t sequences)
    : shape_(shape),
      bytes_(static_cast<size_t>(pages * shape.page_bytes() + sequences * shape.near_bytes())),
      memory_(nullptr) {
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
  for (int64_t n = sequences - 1; n >= 0; --n) free_near_.push_back(memory_ + n * shape.near_bytes());
  uint8_t* first = memory_ + sequences * shape.near_bytes();
  for (int64_t page = pages - 1; page >= 0; --page) free_.push_back(first + page * shape.page_bytes());
}

Arena::~Arena() {
#if defined(__linux__)
  if (memory_) munmap(memory_, bytes_);
#else
  std::free(memory_);
#endif
}

uint8_t* Arena::take(std::vector<uint8_t*>& free) {
  if (free.empty()) throw std::bad_alloc();
  uint8_t* page = free.back();
  free.pop_back();
  return page;
}

void Cache::reserve(int64_t positions) {
  if (shape().kept == Kept::int4 && !near_) near_ = arena_->take_near();
  while (static_cast<int64_t>(pages_.size()) < shape().pages(positions)) pages_.push_back(arena_->take());
}

void Cache::release() {
  arena_->give_back(pages_);
  if (near_) arena_->give_back_near(near_);
  near_ = nullptr;
  pages_.clear();
  length_ = 0;
}

void Cache::read(int64_t layer, int64_t head, float* keys, float* values) const {
  const CacheShape& s = shape();
  const int64_t dim = s.head_dim, stride = head_stride(dim), blocks = head_blocks(dim);
  const int64_t newest = length_ > 0 ? (length_ - 1) / kGroup : 0;  // of the groups of an int4 cache
  for (int64_t position = 0; position < length_; ++position, keys += dim, values += dim) {
    const int64_t group = position / kGroup, place = position % kGroup;
    if (s.kept == Kept::int4 && group > 0 && group < newest) {
      const uint8_t* page = pages_[static_cast<size_t>(position / kPage)];
      const int64_t half = group % (kPage / kGroup);
      const uint8_t* k = page + s.key_offset(layer, head) + half * key_group_bytes(dim);
      const uint8_t* v = page + s.value_offset(layer, head) + half * value_group_bytes(dim);
      auto *scale = reinterpret_cast<const uint16_t*>(k + 16 * dim), *least = scale + stride;
      for (int64_t d = 0; d < dim; ++d) {
        const int code = k[d * 16 + place % 16] >> (place < 16 ? 0 : 4) & 15;
        keys[d] = static_cast<float>(code) * widen_half_1(scale[d]) + widen_half_1(least[d]);
      }
      scale = reinterpret_cast<const uint16_t*>(v + blocks * kGroup * 16);
      least = scale + blocks * kGroup;
      for (int64_t d = 0; d < dim; ++d) {
        const int64_t at = d / kGroup * kGroup + place, channel = d % kGroup;
        const int code = v[at * 16 + channel % 16] >> (channel < 16 ? 0 : 4) & 15;
        values[d] = static_cast<float>(code) * widen_half_1(scale[at]) + widen_half_1(least[at]);
      }
      continue;
    }
    const bool apart = s.kept == Kept::int4;
    const int64_t at = !apart ? position % kPage : group == 0 ? place : kGroup + place;
    const int64_t key_at = at / 16 * dim * 16 + at % 16, value_at = at * stride;
    const uint8_t* page = apart ? nullptr : pages_[static_cast<size_t>(position / kPage)];
    if (s.kept == Kept::int8) {
      auto* k = reinterpret_cast<const int8_t*>(page + s.key_offset(layer, head));
      auto* v = reinterpret_cast<const int8_t*>(page + s.value_offset(layer, head));
      const float key_scale = reinterpret_cast<const float*>(k + kPage * dim)[at];
      const float value_scale = reinterpret_cast<const float*>(v + kPage * stride)[at];
      for (int64_t d = 0; d < dim; ++d) {
        keys[d] = static_cast<float>(k[key_at + d * 16]) * key_scale;
        values[d] = static_cast<float>(v[value_at + d]) * value_scale;
      }
      continue;
    }
    const float* k = apart ? near(layer, head) : reinterpret_cast<const float*>(page + s.key_offset(layer, head));
    for (int64_t d = 0; d < dim; ++d) keys[d] = k[key_at + d * 16];
    std::memcpy(values, k + kPage * dim + value_at, static_cast<size_t>(dim) * sizeof(float));
  }
}

void Cache::round_group(int64_t layer, int64_t head, int64_t group) {
  const CacheShape& s = shape();
  const int64_t dim = s.head_dim, place = group % (kPage / kGroup);
  const float *keys = near(layer, head) + kGroup * dim, *values = near(layer, head) + kPage * dim;
  uint8_t* page = pages_[static_cast<size_t>(group * kGroup / kPage)];
  round_keys(keys, dim, page + s.key_offset(layer, head) + place * key_group_bytes(dim));
  round_values(values + kGroup * head_stride(dim), dim,
               page + s.value_offset(layer, head) + place * value_group_bytes(dim));
}

void Cache::put(int64_t layer, int64_t head, int64_t position, const float* key, const float* value) {
  const CacheShape& s = shape();
  const bool apart = s.kept == Kept::int4;
  if (apart && position % kGroup == 0 && position >= 2 * kGroup) round_group(layer, head, position / kGroup - 1);
  const int64_t at = !apart ? position % kPage : position < kGroup ? position : kGroup + position % kGroup;
  const int64_t dim = s.head_dim, stride = head_stride(dim);
  const int64_t key_at = at / 16 * dim * 16 + at % 16, value_at = at * stride;
  uint8_t* page = apart ? nullptr : pages_[static_cast<size_t>(position / kPage)];
  if (s.kept == Kept::int8) {
    uint8_t *keys = page + s.key_offset(layer, head), *values = page + s.value_offset(layer, head);
    auto *k = reinterpret_cast<int8_t*>(keys), *v = reinterpret_cast<int8_t*>(values);
    reinterpret_cast<float*>(k + kPage * dim)[at] = quantize(key, dim, k + key_at, 16);
    reinterpret_cast<float*>(v + kPage * stride)[at] = quantize(value, dim, v + value_at, 1);
    return;
  }
  float* k = apart ? near(layer, head) : reinterpret_cast<float*>(page + s.key_offset(layer, head));
  float* v = k + kPage * dim + value_at;  // values stand behind keys
  for (int64_t d = 0; d < dim; ++d) k[key_at + d * 16] = key[d];
  std::memcpy(v, value, static_cast<size_t>(dim) * sizeof(float));
}

void Cache::put_codes(int64_t layer, int64_t head, int64_t position, const void* key, int key_bits, const void* value,
                      int value_bits) {
  const CacheShape& s = shape();
  uint8_t* page = pages_[static_cast<size_t>(position / kPage)];
  uint8_t *keys = page + s.key_offset(layer, head), *values = page + s.value_offset(layer, head);
  const int64_t at = position % kPage, dim = s.head_dim;
  place_codes(key, key_bits, dim, s.kept, keys, [&](int64_t d) { return key_place(dim, at, d); });
  place_codes(value, value_bits, dim, s.kept, values, [&](int64_t d) { return value_place(dim, at, d); });
}

}  // namespace lilliput
