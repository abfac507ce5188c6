// The portable body compiled for AVX2: four queries against 16 keys fill half the registers with sums.
#include "ops/attention/body.hpp"

namespace lilliput {

void attention_avx2(const AttentionView& kv, const QueryRows& rows, int64_t begin, int64_t end, float* scratch) {
  attention_body<4, 1>(kv, rows, begin, end, scratch);
}

}  // namespace lilliput
