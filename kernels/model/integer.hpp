// A graph of whole numbers as core/graph.py describes it and docs/integer.md defines it: nodes compiled once into steps
// over buffers of codes. It knows no model families; keys and values in the cache are codes.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <variant>
#include <vector>

#include "model/model.hpp"

namespace lilliput {

struct IntegerEdge {
  std::string name;
  int64_t width;
  CodeGrid grid;
  float scale;

  int64_t stride() const { return quantized_stride(width); }  // codes from one position to the next
};

// What a node does, apart from the edges and constants it reads. Grids inside are filled in by `finish`.
struct EmbedRows {
  std::string matrix, positions;  // positions is empty where there are no learned ones
  float factor;
  int64_t offset;
};
struct LinearRows {
  std::string matrix;
};
struct NormRuns {
  IntegerNorm norm;
  int64_t heads;
  bool biased;
};
struct RotateHeads {
  IntegerRotary rotary;
};
struct AttendHeads {
  IntegerAttention attention;
  int64_t heads, kv_heads;
  bool capped;
};
struct IntegerNode {
  std::variant<EmbedRows, LinearRows, NormRuns, RotateHeads, AttendHeads, IntegerTable, IntegerProduct, IntegerSum> how;
  std::vector<int> x;  // edges; of `AttendHeads` queries, keys, values
  int y;
};

struct IntegerGraph {
  std::vector<IntegerEdge> edges;
  std::vector<IntegerNode> nodes;  // every edge is written before it is read
  int output;
  float logit_softcap;  // 0: none
  int64_t positions;    // of the longest sequence
};

class IntegerModel : public Runner {
 public:
  // Told of an edge when it has been computed: codes of `rows` positions, int8 or int16, `stride` apart.
  using Tap = std::function<void(const IntegerEdge& edge, const void* codes, int64_t rows)>;

  // `variant` names one variant for every op that has it; empty takes the best.
  IntegerModel(Spec spec, IntegerGraph graph, int threads, const std::string& variant);

  void add_matrix(const std::string& name, Matrix matrix) { matrices_[name] = std::move(matrix); }
  // Numbers that stay where they are: `bytes` of them at `data`.
  void add_constant(const std::string& name, const void* data, int64_t bytes) { constants_[name] = {data, bytes}; }
  // Resolves names and checks shapes; that numbers are in their ranges is for artifact/integer.py to see to. Throws
  // std::invalid_argument naming what is missing or wrong.
  void finish();

  const Spec& spec() const override { return spec_; }
  // Codes of 8 bits, or of 16 where a key or value has them; `kept` is passed over.
  CacheShape cache_shape(Kept kept) const override;
  int threads() const { return pool_.threads(); }
  // The matrices of a graph have one width each, so `bits` is passed over.
  void forward(const std::vector<Slice>& slices, int bits, float* logits, const std::function<void()>& poll) override;
  // Tells `tap` of every edge for a fresh sequence, `chunk` positions at a time.
  void sites(const std::vector<int32_t>& tokens, int64_t chunk, const Tap& tap, const std::function<void()>& poll);

 private:
  struct Constant {
    const void* data;
    int64_t bytes;
  };
  struct Linear {
    NestedView w;
    RowFactors rows;
    CodeGrid y;
    std::vector<int16_t> zero;
    std::vector<int64_t> bias;  // with what codes of 16 bits add, see ops/matmul_integer; else empty
  };
  struct Norm {
    const int32_t* gain;
    const int64_t* offset;
  };
  struct Step {
    std::vector<int> nodes;  // linears of one input together, else one
    int64_t layer = -1;      // of an attend
    std::vector<int> alive;  // edges that are read later; of the last attend
  };
  struct Part {  // a slice, and its first token among all
    const Slice* slice;
    int64_t token, position;
  };
  struct Share {
    const Part* part;
    int64_t begin, end;  // rows, as ops/attention counts them
  };

  template <class T>
  const T* constant(const std::string& name, int64_t count) const;
  const Matrix& matrix_at(const std::string& name, int64_t out, int64_t columns) const;
  void resolve(IntegerNode& node, int index);
  void resolve_linear(const IntegerNode& node, int index);
  std::vector<int64_t> row_sums(const NestedView& w, const std::vector<int16_t>& zero);
  void order();
  void place();

  void run(const std::vector<Slice>& slices, float* logits, const Tap& tap, const std::function<void()>& poll);
  uint8_t* codes(int edge) { return slots_[static_cast<size_t>(slot_[static_cast<size_t>(edge)])].data(); }
  void room(int edge, int64_t rows);
  void embed(const EmbedRows& how, int y, const std::vector<Slice>& slices);
  void multiply(const Step& step, int64_t rows);
  void attend(const Step& step, const std::vector<Slice>& slices, bool wanted);

  Spec spec_;
  IntegerGraph graph_;
  MatmulInteger* matmul_;
  AttentionInteger* attention_;
  NormInteger* norm_;
  RotaryInteger* rotary_;
  TableInteger* table_;
  MultiplyInteger* multiply_;
  SumInteger* sum_;
  std::unordered_map<std::string, Matrix> matrices_;
  std::unordered_map<std::string, Constant> constants_;
  std::unordered_map<int, Linear> linears_;  // by node
  std::unordered_map<int, Norm> norms_;
  const int16_t *cos_ = nullptr, *sin_ = nullptr;
  std::vector<Step> steps_;
  size_t last_attend_ = 0;  // step
  std::vector<int> slot_;   // of each edge
  CacheShape shape_{};

  std::mutex turn_;  // guards everything below
  Pool pool_;
  std::vector<std::vector<uint8_t>> slots_;
  std::vector<int8_t> split_;     // codes of 16 bits as two rows of 8
  std::vector<int32_t> sums_;     // of the inputs of a linear
  std::vector<float> row_, place_row_;
  std::vector<Part> parts_;
  std::vector<Share> shares_;
  std::vector<int64_t> positions_;  // of each token
  std::vector<std::vector<uint8_t>> scratch_;  // one a thread
};

}  // namespace lilliput
