// Stands in for ops/dispatch.cpp: the variants with VPDPBUSD, here of tests/vnni.hpp, and the references.
#include "ops/dispatch.hpp"

namespace lilliput {

std::vector<std::string> variants(const std::string& op) {
  if (op != "matmul_nested_i8" && op != "matmul_integer") return {"reference"};
  if (__builtin_cpu_supports("avx512bw")) return {"reference", "avxvnni", "avx512vnni"};
  return {"reference", "avxvnni"};
}

QuantizeI8* quantize_i8(const std::string&) { return quantize_i8_reference; }
AttentionInteger* attention_integer(const std::string&) { return attention_integer_reference; }
MatmulNestedI8* matmul_nested_i8(const std::string& name) {
  if (name == "avx512vnni") return matmul_nested_i8_avx512vnni;
  return name == "avxvnni" ? matmul_nested_i8_avxvnni : matmul_nested_i8_reference;
}
MatmulInteger* matmul_integer(const std::string& name) {
  if (name == "avx512vnni") return matmul_integer_avx512vnni;
  return name == "avxvnni" ? matmul_integer_avxvnni : matmul_integer_reference;
}

}  // namespace lilliput
