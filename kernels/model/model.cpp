#include "model/model.hpp"

#include <algorithm>
#include <array>
#include <stdexcept>

namespace lilliput {
namespace {

constexpr int64_t kElements = 4096;  // elements of a pointwise step that are worth a thread's while
constexpr int64_t kActivated = 512;  // elements of an activation that are
constexpr int64_t kWeights = 49152;  // products of a matrix that are; times tokens
constexpr int64_t kFewRows = 16;  // queries of one head that are not parted for balance alone

std::string shape_text(int64_t out, int64_t columns) {
  return "(" + std::to_string(out) + ", " + std::to_string(columns) + ")";
}

// The variant asked for where this op has it; other ops run their best.
std::string pick_name(const char* op, const std::string& name) {
  const auto known = variants(op);
  return std::find(known.begin(), known.end(), name) == known.end() ? std::string() : name;
}

}  // namespace

NestedView Matrix::at(int bits) const {
  int own = 0;
  for (int width = 1; width <= 8; ++width)
    if (scale[width] && own < bits) own = width;  // ends at the first width of at least `bits`, or at the widest
  NestedView view = fields;
  view.fields = 0;
  view.bits = 0;
  while (view.bits < own && view.fields < fields.fields) view.bits += fields.widths[view.fields++];
  if (own == 0 || view.bits != own)
    throw std::invalid_argument("a matrix is not stored at " + std::to_string(bits) + " bits");
  view.scale = scale[own];
  view.zero = zero[own];
  view.table = table[own];
  view.factor = factor[own];
  return view;
}

Outliers Outliers::of(const std::vector<uint32_t>& starts, const std::vector<uint16_t>& columns,
                      const std::vector<float>& values, int64_t rows, int64_t inputs) {
  bool fits = static_cast<int64_t>(starts.size()) == rows + 1 && starts[0] == 0 &&
              std::is_sorted(starts.begin(), starts.end()) && starts.back() == values.size() &&
              columns.size() == values.size();
  for (const uint16_t column : columns) fits = fits && column < inputs;
  if (!fits) throw std::invalid_argument("its outliers do not fit it");
  Outliers made;
  made.first.push_back(0);
  for (int64_t base = 0; base < rows; base += kTileRows) {
    const int64_t count = std::min(kTileRows, rows - base);
    bool more = true;
    for (uint32_t nth = 0; more; ++nth) {
      more = false;
      for (int64_t r = 0; r < count; ++r) {
        const size_t at = starts[static_cast<size_t>(base + r)] + static_cast<size_t>(nth);
        if (at >= starts[static_cast<size_t>(base + r + 1)]) continue;
        more = true;
        made.row.push_back(static_cast<uint8_t>(r));
        made.column.push_back(columns[at]);
        made.value.push_back(values[at]);
      }
    }
    made.first.push_back(static_cast<uint32_t>(made.row.size()));
  }
  return made;
}

// `count` tokens, which share what an outlier takes to read.
template <int64_t count>
static void add_outliers(const Outliers& o, const float* x, int64_t ldx, float* y, int64_t rows, int64_t begin,
                         int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile) {
    float sum[kTileRows][count] = {};
    const size_t stop = o.first[static_cast<size_t>(tile) + 1];
    for (size_t i = o.first[static_cast<size_t>(tile)]; i < stop; ++i) {
      const float value = o.value[i], *from = x + o.column[i];
      float* to = sum[o.row[i]];
      for (int64_t t = 0; t < count; ++t) to[t] += value * from[t * ldx];
    }
    const int64_t last = std::min(kTileRows, rows - tile * kTileRows);
    for (int64_t t = 0; t < count; ++t)
      for (int64_t r = 0; r < last; ++r) y[t * rows + tile * kTileRows + r] += sum[r][t];
  }
}

void Outliers::add(const float* x, int64_t tokens, int64_t ldx, float* y, int64_t rows, int64_t begin,
                   int64_t end) const {
  constexpr int64_t kTokens = 8;
  int64_t t = 0;  // outside: what a share of rows keeps is less than all inputs
  for (; t + kTokens <= tokens; t += kTokens)
    add_outliers<kTokens>(*this, x + t * ldx, ldx, y + t * rows, rows, begin, end);
  for (; t < tokens; ++t) add_outliers<1>(*this, x + t * ldx, ldx, y + t * rows, rows, begin, end);
}

Model::Model(Spec spec, int threads, const std::string& variant, bool int8)
    : spec_(std::move(spec)),
      matmul_nested_(lilliput::matmul_nested(variant)),
      matmul_nested_i8_(lilliput::matmul_nested_i8(pick_name("matmul_nested_i8", variant))),
      quantize_i8_(lilliput::quantize_i8(pick_name("quantize_i8", variant))),
      matmul_float_(lilliput::matmul_float(variant)),
      attention_(lilliput::attention(variant)),
      norm_(lilliput::norm(pick_name("norm", variant))),
      rotary_(lilliput::rotary(pick_name("rotary", variant))),
      activation_(lilliput::activation(pick_name("activation", variant))),
      int8_(int8),
      pool_(threads) {}

void Model::add_outliers(const std::string& name, const std::vector<uint32_t>& starts,
                         const std::vector<uint16_t>& columns, const std::vector<float>& values) {
  const auto found = matrices_.find(name);
  if (found == matrices_.end()) throw std::invalid_argument(name + " is missing");
  try {
    found->second.outliers = Outliers::of(starts, columns, values, found->second.out(), found->second.columns());
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(name + ": " + error.what());
  }
}

Model::Norm Model::norm_at(const std::string& name, const NormSpec& spec, int64_t size) const {
  const auto weight = vectors_.find(name + ".weight");
  if (weight == vectors_.end()) throw std::invalid_argument(name + ".weight is missing");
  const auto bias = vectors_.find(name + ".bias");
  Norm norm{spec, &weight->second, bias == vectors_.end() ? nullptr : &bias->second};
  if (static_cast<int64_t>(norm.weight->size()) != size || (norm.bias && norm.bias->size() != norm.weight->size()))
    throw std::invalid_argument(name + " has " + std::to_string(norm.weight->size()) + " elements instead of " +
                                std::to_string(size));
  return norm;
}

const Matrix* Model::matrix_at(const std::string& name, int64_t out, int64_t columns) const {
  const auto found = matrices_.find(name);
  if (found == matrices_.end()) throw std::invalid_argument(name + " is missing");
  const Matrix& m = found->second;
  if (m.columns() != columns || (out >= 0 && m.out() != out))
    throw std::invalid_argument(name + " is " + shape_text(m.out(), m.columns()) + " instead of " +
                                shape_text(out, columns));
  if (!m.bias.empty() && static_cast<int64_t>(m.bias.size()) != m.out())
    throw std::invalid_argument(name + ".bias has " + std::to_string(m.bias.size()) + " elements instead of " +
                                std::to_string(m.out()));
  return &m;
}

void Model::finish() {
  const Spec& s = spec_;
  const int64_t queries = s.num_heads * s.head_dim, keys = s.num_kv_heads * s.head_dim;
  if (s.num_kv_heads < 1 || s.num_heads % s.num_kv_heads != 0)
    throw std::invalid_argument("num_heads is not a multiple of num_kv_heads");
  if (s.rotary_dim > s.head_dim || static_cast<int64_t>(s.inv_freq.size()) * 2 != s.rotary_dim)
    throw std::invalid_argument("the rotary dimension fits neither head_dim nor inv_freq");
  if (static_cast<int64_t>(s.windows.size()) != s.num_layers)
    throw std::invalid_argument("windows has not one entry a layer");
  embedding_ = matrix_at("embed_tokens", s.vocab_size, s.hidden_size);
  if (s.position_offset) positions_ = matrix_at("embed_positions", -1, s.hidden_size);
  head_ = s.tied_head ? embedding_ : matrix_at("lm_head", s.vocab_size, s.hidden_size);
  final_norm_ = norm_at("final_norm", s.norm, s.hidden_size);
  for (int64_t n = 0; n < s.num_layers; ++n) {
    const std::string base = "layers." + std::to_string(n) + ".";
    Block b{};
    b.attn_norm = norm_at(base + "attn_norm", s.norm, s.hidden_size);
    if (!(s.parallel_block && s.shared_block_norm)) b.mlp_norm = norm_at(base + "mlp_norm", s.norm, s.hidden_size);
    if (s.post_norms) {
      b.attn_post_norm = norm_at(base + "attn_post_norm", s.norm, s.hidden_size);
      b.mlp_post_norm = norm_at(base + "mlp_post_norm", s.norm, s.hidden_size);
    }
    if (s.qk_norm) {
      b.q_norm = norm_at(base + "attn.q_norm", *s.qk_norm, s.qk_per_head ? queries : s.head_dim);
      b.k_norm = norm_at(base + "attn.k_norm", *s.qk_norm, s.qk_per_head ? keys : s.head_dim);
    }
    b.q = matrix_at(base + "attn.q_proj", queries, s.hidden_size);
    b.k = matrix_at(base + "attn.k_proj", keys, s.hidden_size);
    b.v = matrix_at(base + "attn.v_proj", keys, s.hidden_size);
    b.o = matrix_at(base + "attn.o_proj", s.hidden_size, queries);
    if (s.gated_mlp) b.gate = matrix_at(base + "mlp.gate_proj", s.intermediate_size, s.hidden_size);
    b.up = matrix_at(base + "mlp.up_proj", s.intermediate_size, s.hidden_size);
    b.down = matrix_at(base + "mlp.down_proj", s.hidden_size, s.intermediate_size);
    blocks_.push_back(b);
  }
  for (const auto& [name, m] : matrices_)
    if (takes_i8(m)) scratch_i8_ = std::max(scratch_i8_, matmul_nested_i8_scratch(m.columns()));
  const int64_t scratch = std::max({kPanelFloats, attention_scratch(s.head_dim), scratch_i8_ / 4});
  scratch_.assign(static_cast<size_t>(pool_.threads()), std::vector<float>(static_cast<size_t>(scratch)));
}

void Model::reserve(int64_t tokens) {
  if (tokens > room_tokens_) {
    const auto room = [tokens](std::vector<float>& v, int64_t width) { v.resize(static_cast<size_t>(tokens * width)); };
    const int64_t queries = spec_.num_heads * spec_.head_dim, keys = spec_.num_kv_heads * spec_.head_dim;
    for (auto* v : {&hidden_, &normed_, &delta_, &last_}) room(*v, spec_.hidden_size);
    if (spec_.parallel_block) room(delta2_, spec_.hidden_size);
    for (auto* v : {&q_, &mixed_}) room(*v, queries);
    for (auto* v : {&k_, &v_}) room(*v, keys);
    room(up_, spec_.intermediate_size);
    if (spec_.gated_mlp) room(gate_, spec_.intermediate_size);
    for (auto* v : {&cos_, &sin_}) room(*v, spec_.rotary_dim / 2);
    room_tokens_ = tokens;
  }
}

const QuantizedView& Model::quantize(int64_t group, int64_t columns, const float* x, int64_t tokens,
                                     const Pool::Work* fill) {
  group = std::min(group, columns);
  auto found = std::find_if(inputs_.begin(), inputs_.end(), [group](const Inputs& i) { return i.group == group; });
  if (found == inputs_.end()) found = inputs_.insert(inputs_.end(), Inputs{group, {}, {}, {}, {}});
  const int64_t stride = quantized_stride(columns), groups = (columns + group - 1) / group;
  const auto room = [](auto& v, int64_t count) {
    if (static_cast<int64_t>(v.size()) < count) v.resize(static_cast<size_t>(count));
  };
  room(found->codes, tokens * stride);
  room(found->scale, tokens * groups);
  room(found->sum, tokens * groups);
  found->view = {found->codes.data(), found->scale.data(), found->sum.data(), stride, groups};
  const auto work = [&](int64_t begin, int64_t end, int worker) {  // groups of all tokens; a token's at once
    while (begin < end) {
      const int64_t t = begin / groups, first = begin % groups, count = std::min(end - begin, groups - first);
      const int64_t at = first * group, size = std::min(columns, at + count * group) - at;
      if (fill) (*fill)(t * columns + at, t * columns + at + size, worker);
      quantize_i8_(x + t * columns + at, size, group, found->codes.data() + t * stride + at,
                   found->scale.data() + begin, found->sum.data() + begin);
      begin += count;
    }
  };
  pool_.run(tokens * groups, std::max<int64_t>(1, (fill ? kActivated : kElements) / group), work);
  return found->view;
}

void Model::multiply(std::initializer_list<Job> jobs, const float* x, int64_t tokens, int bits,
                     const Pool::Work* fill) {
  struct Product {
    const Matrix* matrix;
    float* to;
    int64_t begin, end;  // its tiles among those of all
    NestedView weights;
    QuantizedView inputs;  // jobs share x, so those with groups of one size share what it is rounded to
  };
  std::array<Product, kJobs> products{};
  const auto last = products.begin() + static_cast<std::ptrdiff_t>(jobs.size());
  const int64_t columns = jobs.begin()->matrix->columns();
  int64_t tiles = 0;
  auto next = products.begin();
  for (const Job& job : jobs) {
    const Matrix& m = *job.matrix;
    const int64_t begin = tiles;
    tiles += (m.out() + kTileRows - 1) / kTileRows;
    *next = {&m, job.to, begin, tiles, m.nested ? m.at(bits) : NestedView{}, {}};
    if (takes_i8(m)) {
      const auto same = [&](const Product& p) { return p.inputs.codes && p.weights.group == next->weights.group; };
      const auto found = std::find_if(products.begin(), next, same);
      next->inputs = found == next ? quantize(m.fields.group, columns, x, tokens, fill) : found->inputs;
      fill = nullptr;
    }
    ++next;
  }
  if (fill) pool_.run(tokens * columns, kActivated, *fill);
  const auto work = [&](int64_t begin, int64_t end, int worker) {
    float* scratch = scratch_[static_cast<size_t>(worker)].data();
    for (auto p = products.begin(); p != last; ++p) {
      const int64_t from = std::max(begin, p->begin) - p->begin, to = std::min(end, p->end) - p->begin;
      if (from >= to) continue;
      const Matrix& m = *p->matrix;
      const int64_t out = m.out(), first = from * kTileRows, stop = std::min(to * kTileRows, out);
      if (p->inputs.codes)
        matmul_nested_i8_(p->weights, p->inputs, tokens, p->to, out, from, to, reinterpret_cast<uint8_t*>(scratch));
      else if (m.nested)
        matmul_nested_(p->weights, x, tokens, columns, p->to, out, from, to, scratch);
      else
        matmul_float_(m.plain, x, tokens, columns, p->to, out, first, stop);
      if (!m.outliers.first.empty()) m.outliers.add(x, tokens, columns, p->to, out, from, to);
      if (m.bias.empty()) continue;
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t r = first; r < stop; ++r) p->to[t * out + r] += m.bias[static_cast<size_t>(r)];
    }
  };
  // Small shares, so that a thread that is stopped holds little, but worth the claiming; of many tokens whole panels.
  const int64_t least = kWeights / (kTileRows * columns * tokens);
  const int64_t panel = tokens > kMostI8Tokens ? std::min(kPanelTiles, tiles / (4 * pool_.threads())) : 1;
  pool_.run(tiles, std::max({int64_t{1}, least, panel}), work);
}

void Model::normalize(const Norm& norm, const float* x, int64_t tokens, float* y) {
  const int64_t n = spec_.hidden_size;
  pool_.run(tokens, std::max<int64_t>(1, kElements / n), [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) norm_(norm.view(), x + t * n, n, y + t * n);
  });
}

void Model::add(const float* from, int64_t count, float* to) {
  pool_.run(count, 4 * kElements, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) to[i] += from[i];
  });
}

void Model::embed(const std::vector<Slice>& slices, int bits) {
  const auto row_of = [bits](const Matrix& m, int64_t row, float* to) {
    m.nested ? nested_row(m.at(bits), row, to) : float_row(m.plain, row, to);
  };
  const int64_t n = spec_.hidden_size, half = spec_.rotary_dim / 2;
  std::vector<float> place(positions_ ? static_cast<size_t>(n) : 0);
  int64_t t = 0;
  for (const Slice& slice : slices) {
    for (int64_t i = 0; i < slice.count; ++i, ++t) {
      float* x = hidden_.data() + t * n;
      const int64_t position = slice.cache->length() + i;
      row_of(*embedding_, slice.tokens[i], x);
      for (int64_t k = 0; k < n; ++k) x[k] *= spec_.embed_scale;
      if (positions_) {
        row_of(*positions_, position + *spec_.position_offset, place.data());
        for (int64_t k = 0; k < n; ++k) x[k] += place[static_cast<size_t>(k)];
      }
      if (half) rotary_angles(spec_.inv_freq.data(), half, position, spec_.rotary_scale, &cos_[t * half], &sin_[t * half]);
    }
  }
}

// From q_, k_ and v_ to mixed_. An int4 cache holds only the newest group of positions in float32, where its queries
// look for it: what a slice has in one group is one part, and parts go one after the other.
void Model::attend(const std::vector<Slice>& slices, int64_t layer) {
  const bool apart = slices[0].cache->shape().kept == Kept::int4;
  for (int64_t round = 0;; ++round) {
    parts_.clear();
    int64_t token = 0;
    for (const Slice& slice : slices) {
      const int64_t start = slice.cache->length(), stop = start + slice.count, group = start / kGroup + round;
      const int64_t first = apart ? std::max(start, group * kGroup) : start + round * slice.count;
      const int64_t last = apart ? std::min(stop, (group + 1) * kGroup) : stop;
      if (first < last) parts_.push_back({&slice, token + first - start, first, last - first});
      token += slice.count;
    }
    if (parts_.empty()) return;
    attend(parts_, layer);
  }
}

// Head norms, rotation, caches, attention.
void Model::attend(const std::vector<Part>& parts, int64_t layer) {
  const Spec& s = spec_;
  const Block& block = blocks_[static_cast<size_t>(layer)];
  const int64_t dim = s.head_dim, half = s.rotary_dim / 2, heads = s.num_heads, kv_heads = s.num_kv_heads;

  const auto prepare = [&](float* head, const Norm& norm, int64_t index, int64_t t) {
    if (s.qk_norm) norm_(norm.view(s.qk_per_head ? index * dim : 0), head, dim, head);
    if (half) rotary_(&cos_[static_cast<size_t>(t * half)], &sin_[static_cast<size_t>(t * half)], half, head);
  };
  const int64_t group = heads / kv_heads, ld = heads * dim;
  const auto prepare_kv = [&](const Part& part, int64_t i, int64_t kv) {  // a kv head and the queries that share it
    const int64_t t = part.token + i;
    for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
      prepare(q_.data() + (t * heads + h) * dim, block.q_norm, h, t);
    float* key = k_.data() + (t * kv_heads + kv) * dim;
    prepare(key, block.k_norm, kv, t);
    part.slice->cache->put(layer, kv, part.position + i, key, v_.data() + (t * kv_heads + kv) * dim);
  };

  // An item is a run of rows, rows being the queries of one part that share a key-value head.
  int64_t most = kQueryRows;
  const auto runs = [&] {
    int64_t sum = 0;
    for (const Part& part : parts) sum += (part.count * group + most - 1) / most;
    return sum;
  };
  // Of many rows enough runs that threads end together; of few, reading keys twice is better than idling.
  while (most > kFewRows && runs() * kv_heads < 4 * pool_.threads()) most /= 2;
  while (most > 1 && runs() * kv_heads < pool_.threads()) most /= 2;
  shares_.clear();
  for (const Part& part : parts)
    for (int64_t row = 0; row < part.count * group; row += most)
      shares_.push_back({&part, row, std::min(row + most, part.count * group)});
  // Where an item is alone with its head and part it prepares them itself, which saves a round.
  const bool alone = shares_.size() == parts.size();
  const CacheShape shape = parts[0].slice->cache->shape();
  if (!alone && shape.kept == Kept::int4) {  // one thread a head writes in order
    pool_.run(static_cast<int64_t>(parts.size()) * kv_heads, 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t n = begin; n < end; ++n) {
        const Part& part = parts[static_cast<size_t>(n / kv_heads)];
        for (int64_t i = 0; i < part.count; ++i) prepare_kv(part, i, n % kv_heads);
      }
    });
  } else if (!alone) {
    owner_.clear();
    for (const Part& part : parts)
      for (int64_t i = 0; i < part.count; ++i) owner_.emplace_back(&part, i);
    const auto tokens = static_cast<int64_t>(owner_.size());
    pool_.run(tokens * kv_heads, std::max<int64_t>(1, kElements / (group * dim)), [&](int64_t begin, int64_t end, int) {
      for (int64_t n = begin; n < end; ++n) {
        const auto [part, i] = owner_[static_cast<size_t>(n / kv_heads)];
        prepare_kv(*part, i, n % kv_heads);
      }
    });
  }
  const auto count = static_cast<int64_t>(shares_.size());
  pool_.run(kv_heads * count, 1, [&](int64_t begin, int64_t end, int worker) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t kv = item / count;
      const Share& share = shares_[static_cast<size_t>(item % count)];
      const Part& part = *share.part;
      const Cache& cache = *part.slice->cache;
      const AttentionView view = cache.view(layer, kv, s.attn_scale, s.attn_softcap, s.windows[static_cast<size_t>(layer)]);
      if (alone)
        for (int64_t i = 0; i < part.count; ++i) prepare_kv(part, i, kv);
      const int64_t at = part.token * ld + kv * group * dim;
      attention_(view, {q_.data() + at, mixed_.data() + at, ld, group, part.position}, share.begin, share.end,
                 scratch_[static_cast<size_t>(worker)].data());
    }
  });
}

void Model::feed(int64_t layer, const float* from, float* to, int64_t tokens, int bits) {
  const Block& block = blocks_[static_cast<size_t>(layer)];
  if (spec_.gated_mlp)
    multiply({{block.gate, gate_.data()}, {block.up, up_.data()}}, from, tokens, bits);
  else
    multiply({{block.up, up_.data()}}, from, tokens, bits);
  const auto activate = [this](int64_t begin, int64_t end, int) {
    const float *gate = gate_.data() + begin, *up = up_.data() + begin;
    activation_(spec_.activation, spec_.gated_mlp ? gate : up, spec_.gated_mlp ? up : nullptr, end - begin,
                up_.data() + begin);
  };
  const Pool::Work fill = activate;
  multiply({{block.down, to}}, up_.data(), tokens, bits, &fill);
}

void Model::forward(const std::vector<Slice>& slices, int bits, float* logits, const std::function<void()>& poll) {
  const std::lock_guard lock(turn_);
  const int64_t n = spec_.hidden_size;
  int64_t tokens = 0, positions = 0;
  for (const Slice& slice : slices) {
    for (int64_t i = 0; i < slice.count; ++i)
      if (slice.tokens[i] < 0 || slice.tokens[i] >= spec_.vocab_size)
        throw std::invalid_argument("token " + std::to_string(slice.tokens[i]) + " is outside the vocabulary of " +
                                    std::to_string(spec_.vocab_size));
    tokens += slice.count;
    positions = std::max(positions, slice.cache->length() + slice.count);
    slice.cache->reserve(slice.cache->length() + slice.count);
  }
  if (positions_ && positions + *spec_.position_offset > positions_->out())
    throw std::invalid_argument("position " + std::to_string(positions - 1) + " has no row in embed_positions");
  reserve(tokens);
  embed(slices, bits);

  for (int64_t layer = 0; layer < spec_.num_layers; ++layer) {
    if (poll) poll();
    const Block& block = blocks_[static_cast<size_t>(layer)];
    normalize(block.attn_norm, hidden_.data(), tokens, normed_.data());
    multiply({{block.q, q_.data()}, {block.k, k_.data()}, {block.v, v_.data()}}, normed_.data(), tokens, bits);
    attend(slices, layer);
    multiply({{block.o, delta_.data()}}, mixed_.data(), tokens, bits);
    if (spec_.parallel_block) {
      if (!spec_.shared_block_norm) normalize(block.mlp_norm, hidden_.data(), tokens, normed_.data());
      feed(layer, normed_.data(), delta2_.data(), tokens, bits);
      if (spec_.post_norms) {
        normalize(block.attn_post_norm, delta_.data(), tokens, delta_.data());
        normalize(block.mlp_post_norm, delta2_.data(), tokens, delta2_.data());
      }
      add(delta_.data(), tokens * n, hidden_.data());
      add(delta2_.data(), tokens * n, hidden_.data());
      continue;
    }
    if (spec_.post_norms) normalize(block.attn_post_norm, delta_.data(), tokens, delta_.data());
    add(delta_.data(), tokens * n, hidden_.data());
    normalize(block.mlp_norm, hidden_.data(), tokens, normed_.data());
    feed(layer, normed_.data(), delta_.data(), tokens, bits);
    if (spec_.post_norms) normalize(block.mlp_post_norm, delta_.data(), tokens, delta_.data());
    add(delta_.data(), tokens * n, hidden_.data());
  }

  int64_t rows = 0, at = 0;
  for (const Slice& slice : slices) {
    slice.cache->advance(slice.count);
    const int64_t first = slice.rows == Rows::all ? 0 : slice.rows == Rows::last ? slice.count - 1 : slice.count;
    std::copy_n(hidden_.data() + (at + first) * n, (slice.count - first) * n, last_.data() + rows * n);
    rows += slice.count - first;
    at += slice.count;
  }
  if (rows == 0) return;
  normalize(final_norm_, last_.data(), rows, last_.data());
  multiply({{head_, logits}}, last_.data(), rows, bits);
  if (spec_.logit_softcap > 0) {
    pool_.run(rows * spec_.vocab_size, kElements, [&](int64_t begin, int64_t end, int) {
      softcap(spec_.logit_softcap, logits + begin, end - begin);
    });
  }
}

}  // namespace lilliput
