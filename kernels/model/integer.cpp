#include "model/integer.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "model/sampler.hpp"

namespace lilliput {
namespace {

constexpr int64_t kElements = 4096;  // codes of a pointwise step that are worth a thread's while
constexpr int64_t kWeights = 65536;  // products of a matrix that are; times rows
constexpr int64_t kMostSum = 128;    // weights of 8 bits, -255 .. 255, whose sum fits in 16

std::string pick_name(const char* op, const std::string& name) {
  const auto known = variants(op);
  return std::find(known.begin(), known.end(), name) == known.end() ? std::string() : name;
}

void require(bool holds, const std::string& what) {
  if (!holds) throw std::invalid_argument(what);
}

}  // namespace

IntegerModel::IntegerModel(Spec spec, IntegerGraph graph, int threads, const std::string& variant)
    : spec_(std::move(spec)),
      graph_(std::move(graph)),
      matmul_(matmul_integer(pick_name("matmul_integer", variant))),
      attention_(attention_integer(pick_name("attention_integer", variant))),
      norm_(norm_integer(pick_name("norm_integer", variant))),
      rotary_(rotary_integer(pick_name("rotary_integer", variant))),
      table_(table_integer()),
      multiply_(multiply_integer(pick_name("multiply_integer", variant))),
      sum_(sum_integer(pick_name("sum_integer", variant))),
      pool_(threads) {}

template <class T>
const T* IntegerModel::constant(const std::string& name, int64_t count) const {
  const auto found = constants_.find(name);
  require(found != constants_.end(), name + " is missing");
  const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
  require(found->second.bytes == bytes, name + " has " + std::to_string(found->second.bytes) + " bytes instead of " +
                                            std::to_string(bytes));
  return static_cast<const T*>(found->second.data);
}

const Matrix& IntegerModel::matrix_at(const std::string& name, int64_t out, int64_t columns) const {
  const auto found = matrices_.find(name);
  require(found != matrices_.end(), name + " is missing");
  const Matrix& m = found->second;
  require(m.columns() == columns && (out < 0 || m.out() == out),
          name + " is (" + std::to_string(m.out()) + ", " + std::to_string(m.columns()) + ") instead of (" +
              std::to_string(out) + ", " + std::to_string(columns) + ")");
  return m;
}

// The sum of each row's weights, by the kernel itself: inputs of 1 for as many columns as a code of 16 bits has room for.
std::vector<int64_t> IntegerModel::row_sums(const NestedView& w, const std::vector<int16_t>& zero) {
  const int64_t stride = quantized_stride(w.columns), tokens = (w.columns + kMostSum - 1) / kMostSum;
  std::vector<int8_t> ones(static_cast<size_t>(tokens * stride));
  std::vector<int32_t> sum(static_cast<size_t>(tokens));
  for (int64_t k = 0; k < w.columns; ++k) {
    ones[static_cast<size_t>(k / kMostSum * stride + k)] = 1;
    ++sum[static_cast<size_t>(k / kMostSum)];
  }
  const auto out = static_cast<size_t>(w.out);
  const std::vector<int64_t> bias(out);
  const std::vector<int32_t> multiplier(out, 1 << 22);
  const std::vector<int8_t> shift(out, 22);
  std::vector<int16_t> made(static_cast<size_t>(tokens) * out);
  const int64_t tiles = (w.out + kTileRows - 1) / kTileRows;
  pool_.run(tiles, std::max<int64_t>(1, tiles / (4 * pool_.threads())), [&](int64_t begin, int64_t end, int worker) {
    matmul_(w, {ones.data(), sum.data(), stride, 1}, tokens, {bias.data(), multiplier.data(), shift.data(), zero.data()},
            {16, 0}, made.data(), w.out, begin, end, scratch_[static_cast<size_t>(worker)].data());
  });
  std::vector<int64_t> total(out);
  for (size_t n = 0; n < made.size(); ++n) total[n % out] += made[n];
  return total;
}

void IntegerModel::resolve_linear(const IntegerNode& node, int index) {
  const IntegerEdge &x = graph_.edges[static_cast<size_t>(node.x[0])], &y = graph_.edges[static_cast<size_t>(node.y)];
  const Matrix& m = matrix_at(std::get<LinearRows>(node.how).matrix, y.width, x.width);
  Linear linear{};
  require(m.nested, y.name + ": its matrix is not stored in codes");
  linear.w = m.at(8);
  require((linear.w.bits == 8 || linear.w.bits == 4) && !linear.w.table && linear.w.group >= linear.w.columns,
          y.name + ": its matrix is not one of 8 or 4 bits with one group a row");
  require(x.width <= kWidestIntegerRow, y.name + ": rows are too wide for sums of 32 bits");
  const auto* bias = constant<int64_t>(y.name + ".bias", y.width);
  linear.zero.resize(static_cast<size_t>(y.width));
  require(linear.w.zero != nullptr, y.name + ": its matrix has no zeros");
  const float middle = static_cast<float>((1 << linear.w.bits) - 1) / 2;
  for (int64_t n = 0; n < y.width; ++n)
    linear.zero[static_cast<size_t>(n)] = static_cast<int16_t>(std::lround(nested_zero(linear.w, n, 1, 0) + middle));
  linear.rows = {bias, constant<int32_t>(y.name + ".multiplier", y.width), constant<int8_t>(y.name + ".shift", y.width),
                 nullptr};
  linear.y = y.grid;
  scratch_[0].resize(std::max(scratch_[0].size(), static_cast<size_t>(matmul_nested_i8_scratch(x.width))));
  if (x.grid.bits == 16) {
    for (auto& s : scratch_) s.resize(scratch_[0].size());
    linear.bias = row_sums(linear.w, linear.zero);
    for (int64_t n = 0; n < y.width; ++n) {
      int64_t& b = linear.bias[static_cast<size_t>(n)];
      b = bias[n] + 128 * b;
    }
  }
  Linear& kept = linears_[index] = std::move(linear);
  kept.rows.zero = kept.zero.data();
  if (!kept.bias.empty()) kept.rows.bias = kept.bias.data();
}

void IntegerModel::resolve(IntegerNode& node, int index) {
  const IntegerEdge& y = graph_.edges[static_cast<size_t>(node.y)];
  const auto in = [&](size_t n) -> const IntegerEdge& { return graph_.edges[static_cast<size_t>(node.x[n])]; };
  const auto same_width = [&] {
    for (size_t n = 0; n < node.x.size(); ++n)
      require(in(n).width == y.width, y.name + ": " + in(n).name + " has another width");
  };
  if (auto* embed = std::get_if<EmbedRows>(&node.how)) {
    matrix_at(embed->matrix, spec_.vocab_size, y.width);
    if (!embed->positions.empty()) {
      const Matrix& m = matrix_at(embed->positions, -1, y.width);
      require(graph_.positions + embed->offset <= m.out(), y.name + ": positions have no rows in " + embed->positions);
    }
  } else if (std::holds_alternative<LinearRows>(node.how)) {
    resolve_linear(node, index);
  } else if (auto* norm = std::get_if<NormRuns>(&node.how)) {
    same_width();
    require(norm->heads >= 1 && y.width % norm->heads == 0, y.name + ": heads do not divide the width");
    norm->norm.x = in(0).grid;
    norm->norm.y = y.grid;
    norms_[index] = {constant<int32_t>(y.name + ".gain", y.width),
                     norm->biased ? constant<int64_t>(y.name + ".offset", y.width) : nullptr};
  } else if (auto* rotate = std::get_if<RotateHeads>(&node.how)) {
    same_width();
    IntegerRotary& r = rotate->rotary;
    require(r.head_dim >= 1 && y.width % r.head_dim == 0 && r.dim % 2 == 0 && r.dim <= r.head_dim,
            y.name + ": the rotary dimension does not fit");
    r.x = in(0).grid;
    r.y = y.grid;
    cos_ = constant<int16_t>("rotary.cos", graph_.positions * (r.dim / 2));
    sin_ = constant<int16_t>("rotary.sin", graph_.positions * (r.dim / 2));
  } else if (auto* attend = std::get_if<AttendHeads>(&node.how)) {
    IntegerAttention& a = attend->attention;
    const int64_t dim = a.head_dim, kv = attend->kv_heads;
    require(node.x.size() == 3 && dim >= 1 && kv >= 1 && attend->heads % kv == 0 && in(0).width == attend->heads * dim &&
                y.width == attend->heads * dim && in(1).width == kv * dim && in(2).width == kv * dim,
            y.name + ": heads do not fit the edges");
    a.q = in(0).grid;
    a.zero_k = in(1).grid.zero;
    a.zero_v = in(2).grid.zero;
    a.y = y.grid;
    a.hi = constant<int32_t>(y.name + ".hi", 256);
    a.lo = constant<int32_t>(y.name + ".lo", 256);
    a.cap = attend->capped ? constant<int16_t>(y.name + ".cap", 65536) : nullptr;
    const bool wide = in(1).grid.bits == 16 || in(2).grid.bits == 16 || shape_.kept == Kept::codes16;
    require(shape_.layers == 0 || (shape_.kv_heads == kv && shape_.head_dim == dim),
            y.name + ": its heads differ from those before");
    shape_ = {shape_.layers + 1, kv, dim, wide ? Kept::codes16 : Kept::codes8};
  } else if (auto* table = std::get_if<IntegerTable>(&node.how)) {
    same_width();
    table->x = in(0).grid;
    table->y = y.grid;
    table->table = constant<int16_t>(y.name + ".table", int64_t{1} << in(0).grid.bits);
  } else if (auto* product = std::get_if<IntegerProduct>(&node.how)) {
    same_width();
    product->a = in(0).grid;
    product->b = in(1).grid;
    product->y = y.grid;
  } else {
    auto& sum = std::get<IntegerSum>(node.how);
    same_width();
    for (size_t n = 0; n < node.x.size(); ++n) sum.x[n] = in(n).grid;
    sum.y = y.grid;
  }
}

// Linears of one input become one step, which is right at the first of them, since their input is there.
void IntegerModel::order() {
  std::vector<bool> done(graph_.nodes.size());
  int64_t layer = 0;
  for (size_t n = 0; n < graph_.nodes.size(); ++n) {
    if (done[n]) continue;
    Step step{{static_cast<int>(n)}, -1, {}};
    const IntegerNode& node = graph_.nodes[n];
    if (std::holds_alternative<LinearRows>(node.how)) {
      for (size_t m = n + 1; m < graph_.nodes.size(); ++m)
        if (std::holds_alternative<LinearRows>(graph_.nodes[m].how) && graph_.nodes[m].x == node.x) {
          step.nodes.push_back(static_cast<int>(m));
          done[m] = true;
        }
    } else if (std::holds_alternative<AttendHeads>(node.how)) {
      step.layer = layer++;
      last_attend_ = steps_.size();
    }
    steps_.push_back(std::move(step));
  }
  require(layer > 0, "the graph has no attention");
}

// Edges share buffers: one is free again when its edge has been read for the last time.
void IntegerModel::place() {
  const size_t count = graph_.edges.size();
  std::vector<size_t> written(count, SIZE_MAX), read(count, 0);
  for (size_t s = 0; s < steps_.size(); ++s)
    for (const int n : steps_[s].nodes) {
      const IntegerNode& node = graph_.nodes[static_cast<size_t>(n)];
      for (const int x : node.x) {
        require(written[static_cast<size_t>(x)] < s, graph_.edges[static_cast<size_t>(x)].name + " is read before it is written");
        read[static_cast<size_t>(x)] = s;
      }
      require(written[static_cast<size_t>(node.y)] == SIZE_MAX, graph_.edges[static_cast<size_t>(node.y)].name + " is written twice");
      written[static_cast<size_t>(node.y)] = s;
      read[static_cast<size_t>(node.y)] = s;
    }
  const auto output = static_cast<size_t>(graph_.output);
  require(written[output] != SIZE_MAX, "nothing writes " + graph_.edges[output].name);
  read[output] = steps_.size();
  slot_.assign(count, -1);
  std::vector<int> free;
  for (size_t s = 0; s < steps_.size(); ++s) {
    for (const int n : steps_[s].nodes) {
      const auto y = static_cast<size_t>(graph_.nodes[static_cast<size_t>(n)].y);
      if (free.empty()) {
        free.push_back(static_cast<int>(slots_.size()));
        slots_.emplace_back();
      }
      slot_[y] = free.back();
      free.pop_back();
    }
    for (size_t e = 0; e < count; ++e)
      if (slot_[e] >= 0 && written[e] <= s && read[e] == s) free.push_back(slot_[e]);
  }
  for (size_t e = 0; e < count; ++e)
    if (written[e] <= last_attend_ && read[e] > last_attend_) steps_[last_attend_].alive.push_back(static_cast<int>(e));
}

void IntegerModel::finish() {
  scratch_.resize(static_cast<size_t>(pool_.threads()));
  int64_t channels = 0;
  for (const IntegerEdge& edge : graph_.edges) {
    require(edge.width > 0 && (edge.grid.bits == 8 || edge.grid.bits == 16) && edge.scale > 0, edge.name + " has no grid");
    channels = std::max(channels, edge.width);
  }
  scratch_[0].resize(static_cast<size_t>(4 * channels));
  for (size_t n = 0; n < graph_.nodes.size(); ++n) resolve(graph_.nodes[n], static_cast<int>(n));
  order();
  place();
  require(graph_.edges[static_cast<size_t>(graph_.output)].width == spec_.vocab_size,
          "the graph ends in " + graph_.edges[static_cast<size_t>(graph_.output)].name + ", which is not of the vocabulary");
  for (auto& s : scratch_) s.resize(scratch_[0].size());
}

CacheShape IntegerModel::cache_shape(Kept) const { return shape_; }

void IntegerModel::room(int edge, int64_t rows) {
  const IntegerEdge& e = graph_.edges[static_cast<size_t>(edge)];
  auto& slot = slots_[static_cast<size_t>(slot_[static_cast<size_t>(edge)])];
  const auto need = static_cast<size_t>(rows * e.stride() * (e.grid.bits / 8));
  if (slot.size() < need) slot.resize(need);
}

void IntegerModel::embed(const EmbedRows& how, int y, const std::vector<Slice>& slices) {
  const auto row_of = [](const Matrix& m, int64_t row, float* to) {
    m.nested ? nested_row(m.at(8), row, to) : float_row(m.plain, row, to);
  };
  const IntegerEdge& edge = graph_.edges[static_cast<size_t>(y)];
  const Matrix& table = matrices_.at(how.matrix);
  const Matrix* places = how.positions.empty() ? nullptr : &matrices_.at(how.positions);
  const auto n = static_cast<size_t>(edge.width);
  row_.resize(n);
  place_row_.resize(n);
  const auto low = static_cast<float>(edge.grid.low() - edge.grid.zero);
  const auto high = static_cast<float>(edge.grid.high() - edge.grid.zero);
  int64_t t = 0;
  for (const Slice& slice : slices)
    for (int64_t i = 0; i < slice.count; ++i, ++t) {
      row_of(table, slice.tokens[i], row_.data());
      for (size_t k = 0; k < n; ++k) row_[k] *= how.factor;
      if (places) {
        row_of(*places, positions_[static_cast<size_t>(t)] + how.offset, place_row_.data());
        for (size_t k = 0; k < n; ++k) row_[k] += place_row_[k];
      }
      for (size_t k = 0; k < n; ++k) {
        if (!std::isfinite(row_[k])) throw NotANumber("an embedding is not finite");
        float v = std::nearbyint(row_[k] / edge.scale);
        v = v > high ? high : v >= low ? v : low;
        const int32_t code = static_cast<int32_t>(v) + edge.grid.zero;
        const size_t at = static_cast<size_t>(t * edge.stride()) + k;
        if (edge.grid.bits == 8)
          reinterpret_cast<int8_t*>(codes(y))[at] = static_cast<int8_t>(code);
        else
          reinterpret_cast<int16_t*>(codes(y))[at] = static_cast<int16_t>(code);
      }
    }
}

void IntegerModel::multiply(const Step& step, int64_t rows) {
  const int input = graph_.nodes[static_cast<size_t>(step.nodes[0])].x[0];
  const IntegerEdge& x = graph_.edges[static_cast<size_t>(input)];
  const int64_t stride = x.stride();
  const int parts = x.grid.bits / 8;
  if (static_cast<int64_t>(sums_.size()) < rows * parts) sums_.resize(static_cast<size_t>(rows * parts));
  if (parts == 2 && static_cast<int64_t>(split_.size()) < 2 * rows * stride)
    split_.resize(static_cast<size_t>(2 * rows * stride));
  pool_.run(rows, std::max<int64_t>(1, 4 * kElements / stride), [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      if (parts == 2) {
        split_codes(reinterpret_cast<const int16_t*>(codes(input)) + t * stride, x.width, stride,
                    split_.data() + 2 * t * stride, sums_.data() + 2 * t);
      } else {
        auto* row = reinterpret_cast<int8_t*>(codes(input)) + t * stride;
        for (int64_t k = x.width; k < stride; ++k) row[k] = 0;
        sums_[static_cast<size_t>(t)] = sum_codes(row, x.width);
      }
    }
  });
  const CodesView view{parts == 2 ? split_.data() : reinterpret_cast<const int8_t*>(codes(input)), sums_.data(), stride,
                       parts};
  std::vector<int64_t> ends;
  int64_t tiles = 0;
  for (const int n : step.nodes) {
    const int y = graph_.nodes[static_cast<size_t>(n)].y;
    room(y, rows);
    tiles += (graph_.edges[static_cast<size_t>(y)].width + kTileRows - 1) / kTileRows;
    ends.push_back(tiles);
  }
  const auto work = [&](int64_t begin, int64_t end, int worker) {
    for (size_t n = 0; n < ends.size(); ++n) {
      const int64_t base = n ? ends[n - 1] : 0;
      const int64_t from = std::max(begin, base) - base, to = std::min(end, ends[n]) - base;
      if (from >= to) continue;
      const Linear& linear = linears_.at(step.nodes[n]);
      const int y = graph_.nodes[static_cast<size_t>(step.nodes[n])].y;
      matmul_(linear.w, view, rows, linear.rows, linear.y, codes(y), graph_.edges[static_cast<size_t>(y)].stride(), from, to,
              scratch_[static_cast<size_t>(worker)].data());
    }
  };
  // Small shares, so that a thread that is stopped holds little, but worth the claiming; of many rows whole panels.
  const int64_t least = kWeights / (kTileRows * stride * rows * parts), threads = pool_.threads();
  const int64_t panel = rows * parts > kMostI8Tokens ? std::min(kPanelTiles, tiles / (4 * threads)) : 1;
  pool_.run(tiles, std::max({int64_t{1}, least, panel, tiles / (16 * threads)}), work);
}

void IntegerModel::attend(const Step& step, const std::vector<Slice>& slices, bool wanted) {
  const IntegerNode& node = graph_.nodes[static_cast<size_t>(step.nodes[0])];
  const auto& how = std::get<AttendHeads>(node.how);
  const int64_t dim = how.attention.head_dim, kv_heads = how.kv_heads, group = how.heads / kv_heads;
  const auto edge = [&](size_t n) -> const IntegerEdge& { return graph_.edges[static_cast<size_t>(node.x[n])]; };
  parts_.clear();
  int64_t tokens = 0;
  for (const Slice& slice : slices) {
    parts_.push_back({&slice, tokens, slice.cache->length()});
    tokens += slice.count;
  }
  const int64_t key_bytes = edge(1).grid.bits / 8, value_bytes = edge(2).grid.bits / 8;
  for (const Part& part : parts_)
    pool_.run(part.slice->count * kv_heads, std::max<int64_t>(1, kElements / dim), [&](int64_t begin, int64_t end, int) {
      for (int64_t n = begin; n < end; ++n) {
        const int64_t i = n / kv_heads, head = n % kv_heads, t = part.token + i;
        part.slice->cache->put_codes(step.layer, head, part.position + i,
                                     codes(node.x[1]) + (t * edge(1).stride() + head * dim) * key_bytes, edge(1).grid.bits,
                                     codes(node.x[2]) + (t * edge(2).stride() + head * dim) * value_bytes,
                                     edge(2).grid.bits);
      }
    });
  if (!wanted) return;
  room(node.y, tokens);

  // An item is a run of rows, rows being the queries of one slice that share a key-value head.
  int64_t most = kShareRows;
  const auto runs = [&] {
    int64_t sum = 0;
    for (const Part& part : parts_) sum += (part.slice->count * group + most - 1) / most;
    return sum;
  };
  while (most > 1 && runs() * kv_heads < pool_.threads()) most /= 2;  // reading keys twice is better than idling
  shares_.clear();
  for (const Part& part : parts_)
    for (int64_t row = 0; row < part.slice->count * group; row += most)
      shares_.push_back({&part, row, std::min(row + most, part.slice->count * group)});
  const int64_t ld = edge(0).stride();  // of the output too, which is as wide
  const int64_t q_bytes = edge(0).grid.bits / 8, y_bytes = how.attention.y.bits / 8;
  const auto count = static_cast<int64_t>(shares_.size());
  pool_.run(kv_heads * count, 1, [&](int64_t begin, int64_t end, int worker) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t kv = item / count;
      const Share& share = shares_[static_cast<size_t>(item % count)];
      const Part& part = *share.part;
      const int64_t at = part.token * ld + kv * group * dim;
      attention_(how.attention, part.slice->cache->codes(step.layer, kv),
                 {codes(node.x[0]) + at * q_bytes, codes(node.y) + at * y_bytes, ld, group, part.position}, share.begin,
                 share.end, scratch_[static_cast<size_t>(worker)].data());
    }
  });
}

void IntegerModel::run(const std::vector<Slice>& slices, float* logits, const Tap& tap,
                       const std::function<void()>& poll) {
  int64_t tokens = 0, longest = 0;
  positions_.clear();
  for (const Slice& slice : slices) {
    for (int64_t i = 0; i < slice.count; ++i) {
      require(slice.tokens[i] >= 0 && slice.tokens[i] < spec_.vocab_size,
              "token " + std::to_string(slice.tokens[i]) + " is outside the vocabulary of " +
                  std::to_string(spec_.vocab_size));
      positions_.push_back(slice.cache->length() + i);
    }
    tokens += slice.count;
    longest = std::max(longest, slice.cache->length() + slice.count);
  }
  require(longest <= graph_.positions, "position " + std::to_string(longest - 1) + " is beyond the " +
                                           std::to_string(graph_.positions) + " of the graph");
  for (const Slice& slice : slices) slice.cache->reserve(slice.cache->length() + slice.count);
  const auto need = static_cast<size_t>(attention_integer_scratch(shape_.head_dim, longest));
  for (auto& s : scratch_)
    if (s.size() < need) s.resize(need + need / 4);

  int64_t rows = tokens, wanted = 0;
  for (const Slice& slice : slices) wanted += slice.rows == Rows::all ? slice.count : slice.rows == Rows::last ? 1 : 0;
  for (size_t s = 0; s < steps_.size(); ++s) {
    const Step& step = steps_[s];
    const IntegerNode& node = graph_.nodes[static_cast<size_t>(step.nodes[0])];
    const IntegerEdge& y = graph_.edges[static_cast<size_t>(node.y)];
    if (step.layer >= 0 && poll) poll();
    const auto pointwise = [&](const auto& work) { pool_.run(rows * y.stride(), 4 * kElements, work); };
    const auto per_row = [&](const auto& work) { pool_.run(rows, std::max<int64_t>(1, kElements / y.width), work); };
    if (!std::holds_alternative<LinearRows>(node.how) && step.layer < 0) room(node.y, rows);
    if (const auto* embedding = std::get_if<EmbedRows>(&node.how)) {
      embed(*embedding, node.y, slices);
    } else if (std::holds_alternative<LinearRows>(node.how)) {
      multiply(step, rows);
    } else if (const auto* norm = std::get_if<NormRuns>(&node.how)) {
      const Norm& own = norms_.at(step.nodes[0]);
      const int64_t n = y.width / norm->heads;
      per_row([&](int64_t begin, int64_t end, int worker) {
        for (int64_t t = begin; t < end; ++t)
          for (int64_t at = 0; at < y.width; at += n) {
            const int64_t from = t * y.stride() + at;
            norm_(norm->norm, own.gain + at, own.offset ? own.offset + at : nullptr,
                  codes(node.x[0]) + from * (norm->norm.x.bits / 8), n, codes(node.y) + from * (y.grid.bits / 8),
                  reinterpret_cast<int32_t*>(scratch_[static_cast<size_t>(worker)].data()));
          }
      });
    } else if (const auto* rotate = std::get_if<RotateHeads>(&node.how)) {
      const IntegerRotary& r = rotate->rotary;
      per_row([&](int64_t begin, int64_t end, int) {
        for (int64_t t = begin; t < end; ++t) {
          const int64_t from = t * y.stride(), at = positions_[static_cast<size_t>(t)] * (r.dim / 2);
          rotary_(r, cos_ + at, sin_ + at, codes(node.x[0]) + from * (r.x.bits / 8), y.width / r.head_dim,
                  codes(node.y) + from * (r.y.bits / 8));
        }
      });
    } else if (step.layer >= 0) {
      attend(step, slices, s != last_attend_ || wanted > 0);
      if (s == last_attend_) {
        // From here on nothing looks at other positions: only what logits are wanted for goes on.
        if (tap) tap(y, codes(node.y), rows);
        if (wanted == 0) break;
        for (const int e : step.alive) {
          const IntegerEdge& kept = graph_.edges[static_cast<size_t>(e)];
          const int64_t bytes = kept.stride() * (kept.grid.bits / 8);
          int64_t to = 0, at = 0;
          for (const Slice& slice : slices) {
            const int64_t count = slice.rows == Rows::all ? slice.count : slice.rows == Rows::last ? 1 : 0;
            std::copy_n(codes(e) + (at + slice.count - count) * bytes, count * bytes, codes(e) + to * bytes);
            to += count;
            at += slice.count;
          }
        }
        rows = wanted;
        continue;
      }
    } else if (const auto* table = std::get_if<IntegerTable>(&node.how)) {
      pointwise([&](int64_t begin, int64_t end, int) { table_(*table, codes(node.x[0]), codes(node.y), begin, end); });
    } else if (const auto* product = std::get_if<IntegerProduct>(&node.how)) {
      pointwise([&](int64_t begin, int64_t end, int) {
        multiply_(*product, codes(node.x[0]), codes(node.x[1]), codes(node.y), begin, end);
      });
    } else {
      const auto& sum = std::get<IntegerSum>(node.how);
      const void* x[kMostTerms] = {};
      for (size_t n = 0; n < node.x.size(); ++n) x[n] = codes(node.x[n]);
      pointwise([&](int64_t begin, int64_t end, int) { sum_(sum, x, codes(node.y), begin, end); });
    }
    if (tap)
      for (const int n : step.nodes) {
        const int made = graph_.nodes[static_cast<size_t>(n)].y;
        tap(graph_.edges[static_cast<size_t>(made)], codes(made), rows);
      }
  }
  for (const Slice& slice : slices) slice.cache->advance(slice.count);
  if (wanted == 0 || !logits) return;
  const IntegerEdge& out = graph_.edges[static_cast<size_t>(graph_.output)];
  pool_.run(wanted, std::max<int64_t>(1, kElements / out.width), [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      float* to = logits + t * out.width;
      const int64_t at = t * out.stride();
      for (int64_t k = 0; k < out.width; ++k) {
        const int32_t code = out.grid.bits == 8 ? reinterpret_cast<const int8_t*>(codes(graph_.output))[at + k]
                                                : reinterpret_cast<const int16_t*>(codes(graph_.output))[at + k];
        to[k] = out.scale * static_cast<float>(code - out.grid.zero);
      }
      if (graph_.logit_softcap > 0) softcap(graph_.logit_softcap, to, out.width);
    }
  });
}

void IntegerModel::forward(const std::vector<Slice>& slices, int, float* logits, const std::function<void()>& poll) {
  const std::lock_guard lock(turn_);
  run(slices, logits, nullptr, poll);
}

void IntegerModel::sites(const std::vector<int32_t>& tokens, int64_t chunk, const Tap& tap,
                         const std::function<void()>& poll) {
  const std::lock_guard lock(turn_);
  const auto count = static_cast<int64_t>(tokens.size());
  Arena arena(shape_, shape_.pages(count), 1);
  Cache cache(arena);
  for (int64_t at = 0; at < count; at += chunk)
    run({{&cache, tokens.data() + at, std::min(chunk, count - at), Rows::all}}, nullptr, tap, poll);
}

}  // namespace lilliput
