// A decoder as core/spec.py describes it, over weights that stay where they are stored.
#pragma once

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "model/cache.hpp"
#include "model/pool.hpp"
#include "ops/dispatch.hpp"

namespace lilliput {

struct NormSpec {
  bool layer = false;
  float eps = 1e-5f, offset = 0;
};

// The fields of ModelSpec that the arithmetic needs, under the same names; 0 stands for None in the caps.
struct Spec {
  int64_t vocab_size = 0, hidden_size = 0, num_layers = 0, num_heads = 0, num_kv_heads = 0, head_dim = 0;
  int64_t intermediate_size = 0;
  NormSpec norm;
  Activation activation = Activation::silu;
  bool gated_mlp = true;
  int64_t rotary_dim = 0;  // 0: none
  std::vector<float> inv_freq;
  float rotary_scale = 1;
  std::optional<int64_t> position_offset;
  std::optional<NormSpec> qk_norm;
  bool qk_per_head = false;
  bool parallel_block = false, shared_block_norm = false, post_norms = false, tied_head = false;
  float attn_scale = 1, attn_softcap = 0, logit_softcap = 0, embed_scale = 1;
  std::vector<int64_t> windows;
};

// Numbers that a product adds to what codes mean, whatever the width:
//
//     y[t, n] += ((0 + v[0] x[t, c[0]]) + v[1] x[t, c[1]]) + ..,     the outliers of row n in order, in float32
//
// x is what comes in, also where the codes are multiplied with it rounded to int8. Kept tile by tile, in each the first
// outlier of every row, then the second, and so on: neighbours then add to different rows, and no row needs a loop.
struct Outliers {
  std::vector<uint32_t> first;  // (row tiles + 1,): of each tile among all; empty for none
  std::vector<uint8_t> row;     // in the tile
  std::vector<uint16_t> column;
  std::vector<float> value;

  // starts: (rows + 1,), of each row among all; columns, values: row after row. Throws std::invalid_argument where they
  // do not stand in a matrix (rows, inputs).
  static Outliers of(const std::vector<uint32_t>& starts, const std::vector<uint16_t>& columns,
                     const std::vector<float>& values, int64_t rows, int64_t inputs);

  // Tiles begin .. end - 1 of y, which has `rows` rows of outputs. x: (tokens, ldx); y: (tokens, rows).
  void add(const float* x, int64_t tokens, int64_t ldx, float* y, int64_t rows, int64_t begin, int64_t end) const;
};

// A matrix and, where there is one, the bias of its outputs. Pointers belong to the caller.
struct Matrix {
  bool nested = false;
  FloatView plain{};
  NestedView fields{};  // all fields stored; `at` cuts it to a width
  const uint8_t* scale[9] = {};
  const uint8_t* zero[9] = {};
  const uint8_t* table[9] = {};
  const float* factor[9] = {};
  Outliers outliers;
  std::vector<float> bias;

  int64_t out() const { return nested ? fields.out : plain.out; }
  int64_t columns() const { return nested ? fields.columns : plain.columns; }
  // The narrowest width stored of at least `bits`, or the widest, as StoredLinear.width_at says: a matrix may have a
  // ladder of its own. Throws std::invalid_argument when there is none.
  NestedView at(int bits) const;
};

// Which tokens of a slice logits are wanted for.
enum class Rows { none, last, all };

// Tokens that follow what `cache` holds.
struct Slice {
  Cache* cache;
  const int32_t* tokens;
  int64_t count;
  Rows rows;
};

// What the decode loop runs.
class Runner {
 public:
  virtual ~Runner() = default;
  virtual const Spec& spec() const = 0;
  virtual CacheShape cache_shape(Kept kept) const = 0;

  // Runs the slices at one width and appends to their caches, which are all of one arena. logits: (rows, vocab)
  // float32, the rows the slices want one after the other. `poll` is called now and then and may throw. Tokens in
  // [0, vocab), counts >= 1; caches grow as needed. Calls from several threads take turns.
  virtual void forward(const std::vector<Slice>& slices, int bits, float* logits, const std::function<void()>& poll) = 0;
};

class Model : public Runner {
 public:
  // `variant` names one variant for every op that has it; empty takes the best. `int8` rounds the inputs of nested
  // matrices to int8 wherever their groups allow it.
  Model(Spec spec, int threads, const std::string& variant, bool int8);

  void add_matrix(const std::string& name, Matrix matrix) { matrices_[name] = std::move(matrix); }
  void add_vector(const std::string& name, std::vector<float> values) { vectors_[name] = std::move(values); }
  // Of a matrix that was added; as `Outliers::of`, and throws as that does.
  void add_outliers(const std::string& name, const std::vector<uint32_t>& starts, const std::vector<uint16_t>& columns,
                    const std::vector<float>& values);
  // Resolves names to layers and checks every shape. Throws std::invalid_argument naming what is missing or wrong.
  void finish();

  const Spec& spec() const override { return spec_; }
  CacheShape cache_shape(Kept kept) const override { return {spec_.num_layers, spec_.num_kv_heads, spec_.head_dim, kept}; }
  int threads() const { return pool_.threads(); }

  void forward(const std::vector<Slice>& slices, int bits, float* logits, const std::function<void()>& poll) override;

 private:
  struct Norm {
    NormSpec spec;
    const std::vector<float>* weight = nullptr;
    const std::vector<float>* bias = nullptr;
    NormView view(int64_t at = 0) const {
      return {weight->data() + at, bias ? bias->data() + at : nullptr, spec.eps, spec.offset, spec.layer};
    }
  };
  struct Block {
    Norm attn_norm, attn_post_norm, mlp_norm, mlp_post_norm, q_norm, k_norm;
    const Matrix *q, *k, *v, *o, *gate, *up, *down;
  };
  struct Job {
    const Matrix* matrix;
    float* to;  // (tokens, matrix.out())
  };
  static constexpr size_t kJobs = 3;

  struct Part {  // consecutive tokens of a slice
    const Slice* slice;
    int64_t token;     // the first, among all
    int64_t position;  // of it in the sequence
    int64_t count;
  };
  struct Share {
    const Part* part;
    int64_t begin, end;  // its rows, as ops/attention counts them
  };

  // The inputs of one product in int8, for one size of groups.
  struct Inputs {
    int64_t group;
    std::vector<int8_t> codes;
    std::vector<float> scale;
    std::vector<int32_t> sum;
    QuantizedView view;
  };

  Norm norm_at(const std::string& name, const NormSpec& spec, int64_t size) const;
  const Matrix* matrix_at(const std::string& name, int64_t out, int64_t columns) const;
  void reserve(int64_t tokens);
  void embed(const std::vector<Slice>& slices, int bits);
  void attend(const std::vector<Slice>& slices, int64_t layer);
  void attend(const std::vector<Part>& parts, int64_t layer);
  void feed(int64_t layer, const float* from, float* to, int64_t tokens, int bits);
  // At most kJobs products of the same inputs x. fill: makes elements begin .. end - 1 of x, (tokens, columns), just
  // before they are needed; null when x is made already.
  void multiply(std::initializer_list<Job> jobs, const float* x, int64_t tokens, int bits,
                const Pool::Work* fill = nullptr);
  bool takes_i8(const Matrix& m) const { return int8_ && m.nested && fits_i8(m.columns(), m.fields.group); }
  const QuantizedView& quantize(int64_t group, int64_t columns, const float* x, int64_t tokens, const Pool::Work* fill);
  void normalize(const Norm& norm, const float* x, int64_t tokens, float* y);
  void add(const float* from, int64_t count, float* to);

  Spec spec_;
  MatmulNested* matmul_nested_;
  MatmulNestedI8* matmul_nested_i8_;
  QuantizeI8* quantize_i8_;
  MatmulFloat* matmul_float_;
  Attention* attention_;
  NormOp* norm_;
  RotaryOp* rotary_;
  ActivationOp* activation_;
  bool int8_;
  std::unordered_map<std::string, Matrix> matrices_;
  std::unordered_map<std::string, std::vector<float>> vectors_;
  std::vector<Block> blocks_;
  const Matrix *embedding_ = nullptr, *positions_ = nullptr, *head_ = nullptr;
  Norm final_norm_;

  std::mutex turn_;  // guards everything below
  Pool pool_;
  int64_t scratch_i8_ = 0;  // bytes
  int64_t room_tokens_ = 0;
  std::vector<Part> parts_;
  std::vector<std::pair<const Part*, int64_t>> owner_;  // of each token: its part and its place there
  std::vector<Share> shares_;
  std::vector<float> hidden_, normed_, q_, k_, v_, mixed_, delta_, delta2_, gate_, up_, last_, cos_, sin_;
  std::vector<Inputs> inputs_;               // one for each size of groups met
  std::vector<std::vector<float>> scratch_;  // one a thread
};

}  // namespace lilliput
