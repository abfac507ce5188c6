// The definition of attention.
#include "ops/attention/body.hpp"

namespace lilliput {

void attention_reference(const AttentionView& kv, const float* q, int64_t first, int64_t last, float* y, float* scratch) {
  attention_body<2>(kv, q, first, last, y, scratch);
}

}  // namespace lilliput
