// SMULL of both halves and a pairwise add.
#include <arm_neon.h>

#include "ops/attention_integer/body.hpp"

namespace lilliput {
namespace {

struct NeonPairs {
  typedef int32x4_t Sums;
  typedef int16x8_t Pairs;
  static constexpr int kSums = 4;

  LILLIPUT_INLINE Sums none() { return vdupq_n_s32(0); }
  LILLIPUT_INLINE Pairs widen(const int8_t* from) { return vmovl_s8(vld1_s8(from)); }
  LILLIPUT_INLINE Pairs spread(int32_t two) { return vreinterpretq_s16_s32(vdupq_n_s32(two)); }
  LILLIPUT_INLINE Sums madd(Sums sums, Pairs a, Pairs b) {
    const int32x4_t low = vmull_s16(vget_low_s16(a), vget_low_s16(b)), high = vmull_high_s16(a, b);
    return vaddq_s32(sums, vpaddq_s32(low, high));
  }
};

}  // namespace

void attention_integer_neon(const IntegerAttention& how, const CodePages& kv, const CodeRows& rows, int64_t begin,
                            int64_t end, uint8_t* scratch) {
  attention_integer_body<NeonPairs>(how, kv, rows, begin, end, scratch);
}

}  // namespace lilliput
