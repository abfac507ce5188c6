// The definition of attention; on Arm also what runs.
#include "ops/attention/body.hpp"

namespace lilliput {

void attention_reference(const AttentionView& kv, const QueryRows& rows, int64_t begin, int64_t end, float* scratch) {
#if defined(__aarch64__)
  attention_body<4, 1>(kv, rows, begin, end, scratch);  // 32 registers
#else
  attention_body<1, 2>(kv, rows, begin, end, scratch);
#endif
}

}  // namespace lilliput
