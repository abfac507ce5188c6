#include "ops/dispatch.hpp"

#include <stdexcept>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>

#include <asm/hwcap.h>
#endif

namespace lilliput {
namespace {

bool always() { return true; }
#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
#if defined(LILLIPUT_AVXVNNI)
bool has_avxvnni() { return has_avx2() && __builtin_cpu_supports("avxvnni"); }
#endif
#elif defined(__aarch64__)
#if defined(__linux__)
bool has_dotprod() { return getauxval(AT_HWCAP) & HWCAP_ASIMDDP; }
#else
bool has_dotprod() { return true; }  // every Apple chip with our instruction set
#endif
#endif

template <class Run>
struct Variant {
  const char* name;
  Run* run;
  bool (*available)();
};

#define VARIANT(op, isa, when) {#isa, op##_##isa, when},
constexpr Variant<MatmulNested> kMatmulNested[] = {
#include "ops/matmul_nested/variants.inc"
};
constexpr Variant<MatmulNestedI8> kMatmulNestedI8[] = {
#include "ops/matmul_nested_i8/variants.inc"
};
constexpr Variant<QuantizeI8> kQuantizeI8[] = {
#include "ops/quantize_i8/variants.inc"
};
constexpr Variant<MatmulFloat> kMatmulFloat[] = {
#include "ops/matmul_float/variants.inc"
};
constexpr Variant<Attention> kAttention[] = {
#include "ops/attention/variants.inc"
};
constexpr Variant<NormOp> kNorm[] = {
#include "ops/norm/variants.inc"
};
constexpr Variant<RotaryOp> kRotary[] = {
#include "ops/rotary/variants.inc"
};
constexpr Variant<ActivationOp> kActivation[] = {
#include "ops/activation/variants.inc"
};
constexpr Variant<AttentionInteger> kAttentionInteger[] = {
#include "ops/attention_integer/variants.inc"
};
constexpr Variant<MatmulInteger> kMatmulInteger[] = {
#include "ops/matmul_integer/variants.inc"
};
constexpr Variant<MultiplyInteger> kMultiplyInteger[] = {
#include "ops/multiply_integer/variants.inc"
};
constexpr Variant<NormInteger> kNormInteger[] = {
#include "ops/norm_integer/variants.inc"
};
constexpr Variant<RotaryInteger> kRotaryInteger[] = {
#include "ops/rotary_integer/variants.inc"
};
constexpr Variant<SumInteger> kSumInteger[] = {
#include "ops/sum_integer/variants.inc"
};
constexpr Variant<TableInteger> kTableInteger[] = {
#include "ops/table_integer/variants.inc"
};
#undef VARIANT

template <class Run, size_t N>
std::vector<std::string> names(const Variant<Run> (&table)[N]) {
  std::vector<std::string> found;
  for (const auto& v : table)
    if (v.available()) found.emplace_back(v.name);
  return found;
}

template <class Run, size_t N>
Run* pick(const Variant<Run> (&table)[N], const std::string& name) {
  Run* best = nullptr;
  for (const auto& v : table)
    if (v.available() && (name.empty() || name == v.name)) best = v.run;
  if (!best) throw std::invalid_argument("this CPU has no variant " + name);
  return best;
}

}  // namespace

std::vector<std::string> variants(const std::string& op) {
  if (op == "matmul_nested") return names(kMatmulNested);
  if (op == "matmul_nested_i8") return names(kMatmulNestedI8);
  if (op == "quantize_i8") return names(kQuantizeI8);
  if (op == "matmul_float") return names(kMatmulFloat);
  if (op == "attention") return names(kAttention);
  if (op == "norm") return names(kNorm);
  if (op == "rotary") return names(kRotary);
  if (op == "activation") return names(kActivation);
  if (op == "attention_integer") return names(kAttentionInteger);
  if (op == "matmul_integer") return names(kMatmulInteger);
  if (op == "multiply_integer") return names(kMultiplyInteger);
  if (op == "norm_integer") return names(kNormInteger);
  if (op == "rotary_integer") return names(kRotaryInteger);
  if (op == "sum_integer") return names(kSumInteger);
  if (op == "table_integer") return names(kTableInteger);
  throw std::invalid_argument("there is no op " + op);
}

MatmulNested* matmul_nested(const std::string& name) { return pick(kMatmulNested, name); }
MatmulNestedI8* matmul_nested_i8(const std::string& name) { return pick(kMatmulNestedI8, name); }
QuantizeI8* quantize_i8(const std::string& name) { return pick(kQuantizeI8, name); }
MatmulFloat* matmul_float(const std::string& name) { return pick(kMatmulFloat, name); }
Attention* attention(const std::string& name) { return pick(kAttention, name); }
NormOp* norm(const std::string& name) { return pick(kNorm, name); }
RotaryOp* rotary(const std::string& name) { return pick(kRotary, name); }
ActivationOp* activation(const std::string& name) { return pick(kActivation, name); }
AttentionInteger* attention_integer(const std::string& name) { return pick(kAttentionInteger, name); }
MatmulInteger* matmul_integer(const std::string& name) { return pick(kMatmulInteger, name); }
MultiplyInteger* multiply_integer(const std::string& name) { return pick(kMultiplyInteger, name); }
NormInteger* norm_integer(const std::string& name) { return pick(kNormInteger, name); }
RotaryInteger* rotary_integer(const std::string& name) { return pick(kRotaryInteger, name); }
SumInteger* sum_integer(const std::string& name) { return pick(kSumInteger, name); }
TableInteger* table_integer(const std::string& name) { return pick(kTableInteger, name); }

}  // namespace lilliput
