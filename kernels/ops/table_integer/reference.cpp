// The definition of table_integer.
#include "ops/table_integer/table_integer.hpp"

namespace lilliput {
namespace {

template <class X, class Y>
void look_up(const int16_t* middle, const void* x, void* y, int64_t begin, int64_t end) {
  const X* from = static_cast<const X*>(x);
  Y* to = static_cast<Y*>(y);
  for (int64_t i = begin; i < end; ++i) to[i] = static_cast<Y>(middle[from[i]]);
}

}  // namespace

void table_integer_reference(const IntegerTable& how, const void* x, void* y, int64_t begin, int64_t end) {
  const int16_t* middle = how.table - how.x.low();
  if (how.x.bits == 8)
    return how.y.bits == 8 ? look_up<int8_t, int8_t>(middle, x, y, begin, end)
                           : look_up<int8_t, int16_t>(middle, x, y, begin, end);
  how.y.bits == 8 ? look_up<int16_t, int8_t>(middle, x, y, begin, end)
                  : look_up<int16_t, int16_t>(middle, x, y, begin, end);
}

}  // namespace lilliput
