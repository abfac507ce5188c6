// The definition of norm_integer: the body as the compiler's own target has it.
#include "ops/norm_integer/body.hpp"

namespace lilliput {

void norm_integer_reference(const IntegerNorm& how, const int32_t* gain, const int64_t* offset, const void* x, int64_t n,
                            void* y, int32_t* scratch) {
  norm_integer_body(how, gain, offset, x, n, y, scratch);
}

}  // namespace lilliput
