// The definition of multiply_integer: the body as the compiler's own target has it.
#include "ops/multiply_integer/body.hpp"

namespace lilliput {

void multiply_integer_reference(const IntegerProduct& how, const void* a, const void* b, void* y, int64_t begin,
                                int64_t end) {
  multiply_integer_body(how, a, b, y, begin, end);
}

}  // namespace lilliput
