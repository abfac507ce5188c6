// The variants of every op that this machine can run. Each variants.inc is the one list of its op, best last.
#pragma once

#include <string>
#include <vector>

#include "ops/activation/activation.hpp"
#include "ops/attention/attention.hpp"
#include "ops/attention_integer/attention_integer.hpp"
#include "ops/matmul_float/matmul_float.hpp"
#include "ops/matmul_integer/matmul_integer.hpp"
#include "ops/matmul_nested/matmul_nested.hpp"
#include "ops/matmul_nested_i8/matmul_nested_i8.hpp"
#include "ops/multiply_integer/multiply_integer.hpp"
#include "ops/norm/norm.hpp"
#include "ops/norm_integer/norm_integer.hpp"
#include "ops/quantize_i8/quantize_i8.hpp"
#include "ops/rotary/rotary.hpp"
#include "ops/rotary_integer/rotary_integer.hpp"
#include "ops/sum_integer/sum_integer.hpp"
#include "ops/table_integer/table_integer.hpp"

namespace lilliput {

// Names of the variants of `op` this CPU can run, best last. Throws std::invalid_argument for an unknown op.
std::vector<std::string> variants(const std::string& op);

// The variant of that name, or the best one where `name` is empty. Throws std::invalid_argument for a name this CPU
// cannot run.
MatmulNested* matmul_nested(const std::string& name = {});
MatmulNestedI8* matmul_nested_i8(const std::string& name = {});
QuantizeI8* quantize_i8(const std::string& name = {});
MatmulFloat* matmul_float(const std::string& name = {});
Attention* attention(const std::string& name = {});
NormOp* norm(const std::string& name = {});
RotaryOp* rotary(const std::string& name = {});
ActivationOp* activation(const std::string& name = {});
AttentionInteger* attention_integer(const std::string& name = {});
MatmulInteger* matmul_integer(const std::string& name = {});
MultiplyInteger* multiply_integer(const std::string& name = {});
NormInteger* norm_integer(const std::string& name = {});
RotaryInteger* rotary_integer(const std::string& name = {});
SumInteger* sum_integer(const std::string& name = {});
TableInteger* table_integer(const std::string& name = {});

}  // namespace lilliput
