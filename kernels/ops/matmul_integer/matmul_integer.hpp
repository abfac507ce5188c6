// The node `linear` of an integer graph (docs/integer.md): codes times a matrix of whole numbers, and straight to the
// codes of the edge that is written.
//
//     w[n, k] = c[n, k] - zero[n]
//     a[t, n] = sum over k of x[t, k] w[n, k] + bias[n]
//     y[t, n] = clamp(((a multiplier[n] + 2^(shift[n] - 1)) >> shift[n]) + zero)
//
// What is multiplied are the codes c; the zeros come in once a token, by the sum of its codes, which is made beforehand.
// Codes of 8 bits are multiplied as they are. A code of 16 bits is 256 h + l + 128 with h and l of 8 bits, and each is a
// row of its own; the 128 times the sum of the row's weights is the caller's to add to the bias.
#pragma once

#include "ops/integer.hpp"
#include "ops/matmul_nested_i8/matmul_nested_i8.hpp"

namespace lilliput {

// The products of the widest row and a row of x fit in int32.
constexpr int64_t kWidestIntegerRow = 65536;

struct CodesView {
  const int8_t* codes;  // (tokens * parts, stride), 0 beyond the columns
  const int32_t* sum;   // (tokens * parts,) over the columns
  int64_t stride;       // quantized_stride(columns)
  int parts;            // 1 for codes of 8 bits; 2 for 16: h of a token, then l
};

// |a| is below 2^31, or up to 2^39 where x has 16 bits; the same holds without the bias.
struct RowFactors {
  const int64_t* bias;        // (out,)
  const int32_t* multiplier;  // (out,), below 2^23
  const int8_t* shift;        // (out,), 1 .. 62
  const int16_t* zero;        // (out,), 0 .. 2^bits - 1
};

// Rows [16 * tile_begin, min(16 * tile_end, out)) of y, (tokens, ldy) of int8 or int16 as `grid` says. w: one group a
// row, its scale and zero are not read. scratch: matmul_nested_i8_scratch(columns) bytes of the calling thread.
typedef void MatmulInteger(const NestedView& w, const CodesView& x, int64_t tokens, const RowFactors& rows,
                           const CodeGrid& grid, void* y, int64_t ldy, int64_t tile_begin, int64_t tile_end,
                           uint8_t* scratch);
MatmulInteger matmul_integer_reference, matmul_integer_avx2, matmul_integer_avxvnni, matmul_integer_avx512bw,
    matmul_integer_avx512vnni, matmul_integer_neon;

// x: (columns,) codes of 16 bits. codes: two rows of `stride`, as CodesView has them; sum: two.
void split_codes(const int16_t* x, int64_t columns, int64_t stride, int8_t* codes, int32_t* sum);

// The sum of a row of codes.
int32_t sum_codes(const int8_t* x, int64_t columns);

}  // namespace lilliput
