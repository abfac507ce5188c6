// The definition of matmul_nested_i8, code by code.
#include "ops/matmul_nested_i8/matmul_nested_i8.hpp"
#include "ops/vec.hpp"

namespace lilliput {

void matmul_nested_i8_reference(const NestedView& w, const QuantizedView& x, int64_t tokens, float* y, int64_t ldy,
                                int64_t tile_begin, int64_t tile_end, uint8_t*) {
  const int64_t last = tile_end * kTileRows < w.out ? tile_end * kTileRows : w.out;
  const int32_t middle = w.table ? 127 : (1 << w.bits) - 1;  // doubled
  for (int64_t n = tile_begin * kTileRows; n < last; ++n) {
    for (int64_t t = 0; t < tokens; ++t) y[t * ldy + n] = 0;
    for (int64_t g = 0; g < x.groups; ++g) {
      const int64_t begin = g * w.group, end = w.columns - begin < w.group ? w.columns : begin + w.group;
      const float scale = nested_scale(w, n, x.groups, g), zero = nested_zero(w, n, x.groups, g);
      for (int64_t t = 0; t < tokens; ++t) {
        int32_t dot = 0;
        for (int64_t k = begin; k < end; ++k) dot += nested_level(w, n, k) * x.codes[t * x.stride + k];
        const int32_t sum = x.sum[t * x.groups + g];
        float e = static_cast<float>(static_cast<int32_t>(2u * static_cast<uint32_t>(dot) -
                                                          static_cast<uint32_t>(middle) * static_cast<uint32_t>(sum)));
        if (w.zero) e = e - zero * static_cast<float>(2 * sum);
        y[t * ldy + n] += (scale * (x.scale[t * x.groups + g] * 0.5f)) * e;
      }
    }
  }
}

}  // namespace lilliput
