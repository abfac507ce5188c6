// Sixteen lanes of float32 in the compiler's own vector type: one zmm, two ymm, four xmm or four Neon registers.
//
// What is wider than a register is made of two halves here. The compiler has types that wide too, but gcc keeps them in
// memory and not in registers, which took attention in AVX2 four times and more as long. Lanes are added in the same
// order either way.
//
// Everything here has internal linkage and stays inline on purpose. Kernels are compiled once per instruction set; an
// inline function with external linkage could be merged by the linker into its AVX-512 copy and then run on a machine
// that has none. For the same reason kernels use no inline functions of the standard library.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define LILLIPUT_INLINE static inline __attribute__((always_inline, unused))
#define LILLIPUT_LAMBDA __attribute__((always_inline))

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "tiles are read as little-endian words");

namespace lilliput {

constexpr int kLanes = 16;

namespace {

#if defined(__AVX512F__)
constexpr int kRegister = 64;  // bytes
#elif defined(__AVX2__)
constexpr int kRegister = 32;
#else
constexpr int kRegister = 16;
#endif

template <class Element, int Bytes>
struct VectorOf {
  typedef Element Type __attribute__((vector_size(Bytes)));
};
// As many elements as a register has lanes of 32 bits.
template <class Element>
using Register = typename VectorOf<Element, kRegister / 4 * static_cast<int>(sizeof(Element))>::Type;

template <class Half>
struct Two {
  Half low, high;
};

template <class Part, int Registers = 64 / kRegister>
struct Whole {
  typedef Two<typename Whole<Part, Registers / 2>::Type> Type;
};
template <class Part>
struct Whole<Part, 1> {
  typedef Part Type;
};

typedef Whole<Register<float>>::Type Floats;
typedef Whole<Register<int32_t>>::Type Ints;
typedef Whole<Register<uint32_t>>::Type Words;

template <class Half>
LILLIPUT_INLINE Two<Half> two(Half low, Half high) {
  return {low, high};
}

// f of every register of one, two or three vectors.
template <class F, class A, class... More>
LILLIPUT_INLINE auto by_register(F f, A a, More... more) {
  return f(a, more...);
}
template <class F, class A, class... More>
LILLIPUT_INLINE auto by_register(F f, Two<A> a, More... more) {
  return two(by_register(f, a.low, more.low...), by_register(f, a.high, more.high...));
}

// make(first) of every register, `first` being the lane it begins with.
template <class Make, int Registers = 64 / kRegister>
LILLIPUT_INLINE auto make_registers(Make make, int first = 0) {
  if constexpr (Registers == 1)
    return make(first);
  else
    return two(make_registers<Make, Registers / 2>(make, first),
               make_registers<Make, Registers / 2>(make, first + kLanes * Registers / 2 * kRegister / 64));
}

#define LILLIPUT_OPERATOR(op)                                                            \
  template <class A, class B>                                                            \
  LILLIPUT_INLINE auto operator op(Two<A> a, Two<B> b) {                                 \
    return two(a.low op b.low, a.high op b.high);                                        \
  }                                                                                      \
  template <class A, class Scalar>                                                       \
  LILLIPUT_INLINE auto operator op(Two<A> a, Scalar b) {                                 \
    return two(a.low op b, a.high op b);                                                 \
  }                                                                                      \
  template <class Scalar, class B>                                                       \
  LILLIPUT_INLINE auto operator op(Scalar a, Two<B> b) {                                 \
    return two(a op b.low, a op b.high);                                                 \
  }
LILLIPUT_OPERATOR(+)
LILLIPUT_OPERATOR(-)
LILLIPUT_OPERATOR(*)
LILLIPUT_OPERATOR(/)
LILLIPUT_OPERATOR(<)
LILLIPUT_OPERATOR(>)
LILLIPUT_OPERATOR(<=)
LILLIPUT_OPERATOR(>=)
LILLIPUT_OPERATOR(&)
LILLIPUT_OPERATOR(|)
LILLIPUT_OPERATOR(<<)
LILLIPUT_OPERATOR(>>)
#undef LILLIPUT_OPERATOR
template <class A>
LILLIPUT_INLINE Two<A> operator~(Two<A> a) {
  return {~a.low, ~a.high};
}
template <class A>
LILLIPUT_INLINE Two<A> operator-(Two<A> a) {
  return {-a.low, -a.high};
}
template <class A, class B>
LILLIPUT_INLINE Two<A>& operator+=(Two<A>& a, B b) {
  return a = a + b;
}
template <class A, class B>
LILLIPUT_INLINE Two<A>& operator*=(Two<A>& a, B b) {
  return a = a * b;
}

// From and to memory, a register at a time: copies as long as the whole would not stay in registers either.
template <class Element>
LILLIPUT_INLINE auto load_registers(const Element* from) {
  return make_registers([from](int first) LILLIPUT_LAMBDA {
    Register<Element> v;
    std::memcpy(&v, from + first, sizeof v);
    return v;
  });
}
template <class Element, class Part>
LILLIPUT_INLINE void store_registers(Element* to, Part v) {
  std::memcpy(to, &v, sizeof v);
}
template <class Element, class Half>
LILLIPUT_INLINE void store_registers(Element* to, Two<Half> v) {
  store_registers(to, v.low);
  store_registers(to + sizeof(Half) / sizeof(Element), v.high);
}

LILLIPUT_INLINE Floats load(const float* from) { return load_registers(from); }
LILLIPUT_INLINE void store(float* to, Floats v) { store_registers(to, v); }
LILLIPUT_INLINE Words load_words(const void* from) { return load_registers((const uint32_t*)from); }

LILLIPUT_INLINE Floats spread(float value) { return value - Floats{}; }

// a * b + c, rounded once. The C library's fmaf where the instruction set has none.
LILLIPUT_INLINE Floats fused(Floats a, Floats b, Floats c) {
  const auto one = [](Register<float> x, Register<float> y, Register<float> z) LILLIPUT_LAMBDA -> Register<float> {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(x, y, z);
#elif defined(__AVX2__)
    return _mm256_fmadd_ps(x, y, z);
#elif defined(__ARM_NEON)
    return vfmaq_f32(z, x, y);
#else
    for (int l = 0; l < kRegister / 4; ++l) z[l] = __builtin_fmaf(x[l], y[l], z[l]);
    return z;
#endif
  };
  return by_register(one, a, b, c);
}

LILLIPUT_INLINE Floats as_floats(Words bits) {
  return by_register([](auto v) LILLIPUT_LAMBDA { return (Register<float>)v; }, bits);
}
LILLIPUT_INLINE Words as_words(Floats value) {
  return by_register([](auto v) LILLIPUT_LAMBDA { return (Register<uint32_t>)v; }, value);
}
LILLIPUT_INLINE Words as_words(Ints value) {
  return by_register([](auto v) LILLIPUT_LAMBDA { return (Register<uint32_t>)v; }, value);
}
LILLIPUT_INLINE Ints as_ints(Words value) {
  return by_register([](auto v) LILLIPUT_LAMBDA { return (Register<int32_t>)v; }, value);
}
LILLIPUT_INLINE Floats to_floats(Ints value) {
  return by_register([](auto v) LILLIPUT_LAMBDA { return __builtin_convertvector(v, Register<float>); }, value);
}
LILLIPUT_INLINE Ints to_ints(Floats value) {
  return by_register([](auto v) LILLIPUT_LAMBDA { return __builtin_convertvector(v, Register<int32_t>); }, value);
}

// Narrow integers widened. By the instruction where there is one: gcc 12 makes half a dozen of a conversion by two steps.
LILLIPUT_INLINE Words load_wide(const uint16_t* from) {
  const auto wide = [](auto v) LILLIPUT_LAMBDA { return __builtin_convertvector(v, Register<uint32_t>); };
  return by_register(wide, load_registers(from));
}
LILLIPUT_INLINE Register<int32_t> wide_bytes(const int8_t* from) {
#if defined(__AVX512F__)
  return (Register<int32_t>)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif defined(__AVX2__)
  return (Register<int32_t>)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
  Register<int8_t> v;
  std::memcpy(&v, from, sizeof v);
  return __builtin_convertvector(__builtin_convertvector(v, Register<int16_t>), Register<int32_t>);
#endif
}
LILLIPUT_INLINE Register<int32_t> wide_bytes(const uint8_t* from) {
#if defined(__AVX512F__)
  return (Register<int32_t>)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif defined(__AVX2__)
  return (Register<int32_t>)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
  Register<uint8_t> v;
  std::memcpy(&v, from, sizeof v);
  return __builtin_convertvector(__builtin_convertvector(v, Register<int16_t>), Register<int32_t>);
#endif
}
template <class Byte>
LILLIPUT_INLINE Ints load_wide_bytes(const Byte* from) {
  return make_registers([from](int first) LILLIPUT_LAMBDA { return wide_bytes(from + first); });
}

// The low bytes.
LILLIPUT_INLINE void store_bytes(int8_t* to, Ints v) {
  const auto narrow = [](auto part) LILLIPUT_LAMBDA {
    return __builtin_convertvector(__builtin_convertvector(part, Register<int16_t>), Register<int8_t>);
  };
  store_registers(to, by_register(narrow, v));
}

// float16 to float32, exact for every input. Shifting the fields in place leaves the exponent 112 too low; the
// multiplication puts it right and renormalises subnormals on the way.
LILLIPUT_INLINE Floats widen_half(const uint16_t* from) {
  const Words h = load_wide(from), magnitude = (h & 0x7fffu) << 13;
  const Words value = as_words(as_floats(magnitude) * 0x1p112f);
  const Words top = as_words(magnitude >= 0x0f800000u) & 0x7f800000u;  // infinities and NaNs keep the top exponent
  return as_floats(value | top | ((h & 0x8000u) << 16));
}

// Bytes times 16 as the bits of float16: none is negative, infinite or no number.
LILLIPUT_INLINE Floats widen_small(const uint8_t* from) {
  return as_floats(as_words(load_wide_bytes(from)) << 17) * 0x1p112f;
}

LILLIPUT_INLINE Floats widen_bfloat(const uint16_t* from) { return as_floats(load_wide(from) << 16); }

LILLIPUT_INLINE float widen_half_1(uint16_t h) {
  const uint32_t magnitude = (h & 0x7fffu) << 13;
  float value;
  std::memcpy(&value, &magnitude, sizeof value);
  value *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits |= (magnitude >= 0x0f800000u ? 0x7f800000u : 0u) | ((h & 0x8000u) << 16);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

LILLIPUT_INLINE float widen_bfloat_1(uint16_t h) {
  const uint32_t bits = uint32_t{h} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Sixteen lanes to one by f(a, b) of halves onto halves: 8 + 4 + 2 + 1.
template <class F, class Part>
LILLIPUT_INLINE auto folded(F f, Part v) {
  typedef decltype(v[0] + v[0]) Element;
  if constexpr (sizeof(Part) == 16) {
    Element lane[4];
    std::memcpy(lane, &v, sizeof v);
    return f(f(lane[0], lane[2]), f(lane[1], lane[3]));
  } else {
    typename VectorOf<Element, sizeof(Part) / 2>::Type half[2];
    std::memcpy(half, &v, sizeof v);
    return folded(f, f(half[0], half[1]));
  }
}
template <class F, class Half>
LILLIPUT_INLINE auto folded(F f, Two<Half> v) {
  return folded(f, by_register(f, v.low, v.high));
}

// The one order in which sixteen partial sums become one.
LILLIPUT_INLINE float total(Floats v) {
  return folded([](auto a, auto b) LILLIPUT_LAMBDA { return a + b; }, v);
}
LILLIPUT_INLINE int32_t total(Ints v) {
  return folded([](auto a, auto b) LILLIPUT_LAMBDA { return a + b; }, v);
}
LILLIPUT_INLINE float largest(Floats v) {
  return folded([](auto a, auto b) LILLIPUT_LAMBDA { return a > b ? a : b; }, v);
}
LILLIPUT_INLINE int32_t largest(Ints v) {
  return folded([](auto a, auto b) LILLIPUT_LAMBDA { return a > b ? a : b; }, v);
}

LILLIPUT_INLINE Floats select(Ints where, Floats yes, Floats no) {
  return by_register([](auto w, auto y, auto n) LILLIPUT_LAMBDA { return w ? y : n; }, where, yes, no);
}
LILLIPUT_INLINE Ints select(Ints where, Ints yes, Ints no) {
  return by_register([](auto w, auto y, auto n) LILLIPUT_LAMBDA { return w ? y : n; }, where, yes, no);
}

// 0 .. 15.
LILLIPUT_INLINE Ints numbered() {
  static const int32_t kNumbers[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load_registers(kNumbers);
}

// `count` of sixteen floats, zeros behind.
LILLIPUT_INLINE Floats load_some(const float* from, int64_t count) {
  if (count >= kLanes) return load(from);
  float lane[kLanes] = {};
  for (int64_t l = 0; l < count; ++l) lane[l] = from[l];
  return load(lane);
}

// exp by Cephes' expf: reduction by ln 2 in two parts, then a polynomial; about 2 ulp. Below -87 it is 0 and above 88
// it stays at exp(88), so that no lane meets a subnormal or an infinity; NaN stays NaN. Written out because the C
// libraries do not agree in the last bit, and that bit can decide a token.
LILLIPUT_INLINE Floats exponential(Floats x) {
  const Ints vanishes = x < -87.0f;
  Floats c = select(vanishes, spread(-87.0f), x);
  c = select(c > 88.0f, spread(88.0f), c);
  const auto step = [](Floats a, Floats b, float add) LILLIPUT_LAMBDA { return fused(a, b, spread(add)); };
  const Floats shifted = step(c, spread(1.44269504088896341f), 12582912.0f);  // 1.5 * 2^23: the integer in the low bits
  const Floats n = shifted - 12582912.0f;
  const Floats r = fused(n, spread(2.12194440e-4f), fused(n, spread(-0.693359375f), c));
  Floats p = step(r, spread(1.9875691500e-4f), 1.3981999507e-3f);
  p = step(p, r, 8.3334519073e-3f);
  p = step(p, r, 4.1665795894e-2f);
  p = step(p, r, 1.6666665459e-1f);
  p = step(p, r, 5.0000001201e-1f);
  const Floats y = fused(p, r * r, r) + 1.0f;
  const Words exponent = (as_words(shifted) - 0x4b400000u + 127u) << 23;
  return select(vanishes, Floats{}, y * as_floats(exponent));
}

// tanh by Cephes' tanhf: an odd polynomial near 0, where 1 - 2 / (exp(2x) + 1) would cancel.
LILLIPUT_INLINE Floats hyperbolic_tangent(Floats x) {
  const Words sign = as_words(x) & 0x80000000u;
  const Floats size = as_floats(as_words(x) & 0x7fffffffu);
  const Floats far = 1.0f - 2.0f / (exponential(size + size) + 1.0f);
  const Floats z = x * x;
  Floats p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const Floats near = p * z * x + x;
  return select(size < 0.625f, near, as_floats(as_words(far) | sign));
}

}  // namespace
}  // namespace lilliput
