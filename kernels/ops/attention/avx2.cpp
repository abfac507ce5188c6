// The portable body compiled for AVX2.
#include "ops/attention/body.hpp"

namespace lilliput {

void attention_avx2(const AttentionView& kv, const float* q, int64_t first, int64_t last, float* y, float* scratch) {
  attention_body<4>(kv, q, first, last, y, scratch);
}

}  // namespace lilliput
