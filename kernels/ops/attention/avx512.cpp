// The portable body compiled for AVX512: four queries against 64 keys fill half the registers with sums.
#include "ops/attention/body.hpp"

namespace lilliput {

void attention_avx512(const AttentionView& kv, const QueryRows& rows, int64_t begin, int64_t end, float* scratch) {
  attention_body<4, 4>(kv, rows, begin, end, scratch);
}

}  // namespace lilliput
