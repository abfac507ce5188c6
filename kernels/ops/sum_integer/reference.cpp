// The definition of sum_integer: the body as the compiler's own target has it.
#include "ops/sum_integer/body.hpp"

namespace lilliput {

void sum_integer_reference(const IntegerSum& how, const void* const* x, void* y, int64_t begin, int64_t end) {
  sum_integer_body(how, x, y, begin, end);
}

}  // namespace lilliput
