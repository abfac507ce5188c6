// SDOT by element: four rows x four inputs against one lane of sixteen activations, without broadcasts. Codes of up to
// 7 bits are valid int8; those of 8 go in as c - 128.
#pragma once

#include <arm_neon.h>

#include "ops/matmul_nested_i8/levels.hpp"

namespace lilliput {
namespace {

struct Neon {
  typedef uint8x16_t Bytes;
  typedef int32x4_t Sums;
  typedef float32x4_t Floats;
  static constexpr int kRows = 4, kBlock = 4, kAbreast = 1;
  static constexpr bool kSplit = false, kSigned = true;

  LILLIPUT_INLINE Bytes load(const uint8_t* from) { return vld1q_u8(from); }
  LILLIPUT_INLINE void keep(uint8_t* to, Bytes v) { vst1q_u8(to, v); }
  LILLIPUT_INLINE Bytes splat(int byte) { return vdupq_n_u8(static_cast<uint8_t>(byte)); }
  LILLIPUT_INLINE Bytes both(Bytes a, Bytes b) { return vandq_u8(a, b); }
  LILLIPUT_INLINE Bytes either(Bytes a, Bytes b) { return vorrq_u8(a, b); }
  LILLIPUT_INLINE Bytes differ(Bytes a, Bytes b) { return veorq_u8(a, b); }
  LILLIPUT_INLINE Bytes choose(Bytes m, Bytes yes, Bytes no) { return vbslq_u8(m, yes, no); }
  template <int N>
  LILLIPUT_INLINE Bytes right(Bytes v) { return vshrq_n_u8(v, N); }
  template <int N>
  LILLIPUT_INLINE Bytes left(Bytes v) { return vshlq_n_u8(v, N); }

  template <int Each>
  LILLIPUT_INLINE Bytes look_up(Bytes codes, Bytes rows, const Bytes* table) {
    const Bytes at = vorrq_u8(codes, rows);
    if constexpr (Each == 4) return vqtbl1q_u8(table[0], at);
    if constexpr (Each == 2) return vqtbl2q_u8(uint8x16x2_t{{table[0], table[1]}}, at);
    if constexpr (Each == 1) return vqtbl4q_u8(uint8x16x4_t{{table[0], table[1], table[2], table[3]}}, at);
  }

  LILLIPUT_INLINE Sums none() { return vdupq_n_s32(0); }
  LILLIPUT_INLINE Floats zero() { return vdupq_n_f32(0); }
  LILLIPUT_INLINE Sums spread_sum(int32_t v) { return vdupq_n_s32(v); }
  LILLIPUT_INLINE Floats spread(float v) { return vdupq_n_f32(v); }
  LILLIPUT_INLINE Floats to_floats(Sums v) { return vcvtq_f32_s32(v); }
  LILLIPUT_INLINE Floats halves(const uint16_t* from) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from))); }
  LILLIPUT_INLINE Floats smalls(const uint8_t* from) {
    uint32_t four;
    std::memcpy(&four, from, sizeof four);
    return vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(vshll_n_u8(vcreate_u8(four), 4))));
  }
  LILLIPUT_INLINE Floats wholes(const int8_t* from) {
    uint32_t four;
    std::memcpy(&four, from, sizeof four);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(four)))));
  }
  LILLIPUT_INLINE Floats load_floats(const float* from) { return vld1q_f32(from); }
  LILLIPUT_INLINE void store(float* to, Floats v) { vst1q_f32(to, v); }

  typedef Sums Partial;
  LILLIPUT_INLINE Partial begin() { return none(); }
  template <int T, int, int>
  LILLIPUT_INLINE void steps(Partial p[T], const Bytes codes[8], const int8_t* const x[T], int64_t at) {
    for (int t = 0; t < T; ++t) p[t] = dot(p[t], codes, x[t] + at);
  }
  template <int>
  LILLIPUT_INLINE Sums widen(Sums sums, Partial p) { return sums + p; }

  LILLIPUT_INLINE Sums dot(Sums sums, const Bytes codes[8], const int8_t* x) {
    const int8x16_t x0 = vld1q_s8(x), x1 = vld1q_s8(x + 16);
    const auto c = [codes](int j) { return vreinterpretq_s8_u8(codes[j]); };
    sums = vdotq_laneq_s32(sums, c(0), x0, 0);
    sums = vdotq_laneq_s32(sums, c(1), x0, 1);
    sums = vdotq_laneq_s32(sums, c(2), x0, 2);
    sums = vdotq_laneq_s32(sums, c(3), x0, 3);
    sums = vdotq_laneq_s32(sums, c(4), x1, 0);
    sums = vdotq_laneq_s32(sums, c(5), x1, 1);
    sums = vdotq_laneq_s32(sums, c(6), x1, 2);
    return vdotq_laneq_s32(sums, c(7), x1, 3);
  }
  LILLIPUT_INLINE Sums dot_entries(Sums sums, const Bytes entries[8], const int8_t* x) {
    return dot(sums, entries, x);
  }
};

}  // namespace
}  // namespace lilliput
