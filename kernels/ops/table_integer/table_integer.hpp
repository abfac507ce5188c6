// The node `table` of an integer graph (docs/integer.md): y = table[x + 2^(bits_x - 1)].
#pragma once

#include "ops/integer.hpp"

namespace lilliput {

struct IntegerTable {
  CodeGrid x, y;
  const int16_t* table;  // (2^bits of x,)
};

// Codes begin .. end - 1 of x and y, which are int8 or int16 as their grids say. Loads by index: no variant is faster.
typedef void TableInteger(const IntegerTable& how, const void* x, void* y, int64_t begin, int64_t end);
TableInteger table_integer_reference;

}  // namespace lilliput
