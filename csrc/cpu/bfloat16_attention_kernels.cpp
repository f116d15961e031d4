// bfloat16 attention, compiled for AVX512_BF16 and for AMX.
//
// A head's keys and values are packed for the matmuls once; then kPanelRows queries at a time are multiplied
// with all visible keys. Scores stay in the cache in float32; only weights, and in backward dS, are rounded
// to bfloat16 for the next matmul.
#include "cpu/bfloat16_attention_kernels.h"

#ifdef __AMX_BF16__
#include "cpu/amx_products.h"
#else
#include "cpu/bfloat16_products.h"
#endif
#include "cpu/attention_blocks.h"
#include "cpu/rotation.h"

namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE {
namespace {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
constexpr int64_t kBlockPairs = kAttentionBlockRows / 2;

static_assert(kMaxAttentionHeadDim <= 2 * kChunkPairs, "vectors fit into one chunk");
static_assert(kAttentionBlockRows % kPanelRows == 0, "a block consists of panels");
static_assert(kPanelRows % (2 * kPairStep) == 0,
              "a panel's queries, and a causal one's keys, are whole steps");
static_assert(kBlockPairs <= kChunkPairs, "a block's pairs fit into one chunk");

// Padded lengths of a head's matrices, in elements. Matmuls write whole blocks of rows. Pairs beyond head_dim
// are zero.
struct Extents {
  Extents(int64_t tokens, int64_t head_dim)
      : tokens(round_up(tokens, 2 * kPanelRows)),
        channel_vectors(vectors_of(head_dim)),
        channels(channel_vectors * kLanes),
        pairs(round_up(head_dim, 2 * kPairStep) / 2),
        pair_vectors(vectors_of(pairs)) {}
  explicit Extents(const HeadsShape& shape) : Extents(shape.tokens, shape.head_dim) {}

  int64_t tokens;
  int64_t channel_vectors;
  int64_t channels;
  int64_t pairs;  // of channels
  int64_t pair_vectors;
};

uint32_t* take_panel(Arena& arena, int64_t pairs) {
  return arena.take<uint32_t>((pairs + kChunkPairs - 1) / kChunkPairs * kPanelChunk);
}

// --- packing ---

// A tensor of the caller, with the rotation and factor of its copy.
struct Vectors {
  HeadsView view;
  Rotation rotation;
  float factor;
};

Vectors plain(const HeadsView& view) { return {view, Rotation{}, 1.0f}; }

// Copies `count` tokens from `first` on to rows of a panel or slab.
void load_rows(const Vectors& source, const HeadsShape& shape, Position first, int64_t count,
               uint32_t* rows) {
  for (int64_t i = 0; i < count; ++i, ++first.token) {
    const BFloat16* vector = first.in<BFloat16>(source.view);
    rotate_vector(vector, reinterpret_cast<BFloat16*>(rows + i * kChunkPairs), shape, source.rotation,
                  source.factor, first);
  }
}

void clear_row(uint32_t* rows, int64_t row) {
  __builtin_memset(rows + row * kChunkPairs, 0, kChunkPairs * sizeof(uint32_t));
}

void store_rows(const float* rows, const Vectors& target, const HeadsShape& shape, Position first,
                int64_t count) {
  const int64_t stride = Extents(shape).channels;
  for (int64_t i = 0; i < count; ++i, ++first.token) {
    rotate_vector(rows + i * stride, first.in<BFloat16>(target.view), shape, target.rotation, target.factor,
                  first);
  }
}

// Packed keys or values of a head, zero-padded to a whole vector of tokens.
struct HeadMatrix {
  uint32_t* by_channel;  // pairs of channels x tokens; may be null
  uint32_t* by_token;    // pairs of tokens x channels; may be null

  void fill(const Vectors& source, const HeadsShape& shape, Position head, uint32_t* slab) const {
    const Extents extents(shape);
    for (head.token = 0; head.token < shape.tokens; head.token += kLanes) {
      const int64_t count = smaller(kLanes, shape.tokens - head.token);
      load_rows(source, shape, head, count, slab);
      for (int64_t row = count; row < kLanes; ++row) clear_row(slab, row);
      if (by_channel != nullptr) {
        transpose_rows(slab, kChunkPairs, extents.pair_vectors, by_channel + head.token, extents.tokens);
      }
      if (by_token != nullptr) {
        pair_rows(slab, kLanes, extents.channel_vectors, by_token + head.token / 2 * extents.channels,
                  extents.channels);
      }
    }
  }
};

uint32_t* take_by_channel(Arena& arena, const Extents& extents) {
  return arena.take<uint32_t>(extents.pair_vectors * kLanes * extents.tokens);
}

uint32_t* take_by_token(Arena& arena, const Extents& extents) {
  return arena.take<uint32_t>(extents.tokens / 2 * extents.channels);
}

// Prefetches the next head's tokens at the position of the current ones; the hardware doesn't predict this
// stride.
template <int kCount>
void prefetch_next_head(const HeadsView (&views)[kCount], const BFloat16Attention& params, Position at,
                        int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(BFloat16);
  const int64_t next = at.sample * params.shape.heads + at.head + 1;
  if (next == params.count) return;
  at.sample = next / params.shape.heads;
  at.head = next % params.shape.heads;
  for (const HeadsView& view : views) {
    for (int64_t i = 0; i < count; ++i) {
      const BFloat16* vector = Position{at.sample, at.head, at.token + i}.in<BFloat16>(view);
      for (int64_t channel = 0; channel < params.shape.head_dim; channel += kLine) {
        _mm_prefetch(vector + channel, _MM_HINT_T0);
      }
    }
  }
}

// --- matmuls ---

// At most `most` queries of a head from `first` on.
Queries queries_of(const BFloat16Attention& params, int64_t first, int64_t most) {
  return Queries{0, params.shape.tokens, params.shape.tokens, 0, params.causal}.part(first, most);
}

// Queries, zero-padded to whole steps of pairs.
int64_t rows_in_steps(const Queries& tile) { return round_up(tile.rows, 2 * kPairStep); }

// scores = panel * keys^T, or dout * values^T.
void score(const Queries& tile, const Extents& extents, const uint32_t* panel, const uint32_t* by_channel,
           float* scores) {
  multiply_panel({panel, 1, 0, by_channel, extents.tokens, scores, extents.tokens, tile.rows,
                  vectors_of(tile.columns()), extents.pairs, false});
}

// sums = weights * values, or dS * keys. Padding of the last step is zero in both factors.
void combine(const Queries& tile, const Extents& extents, const uint32_t* panel, const uint32_t* by_token,
             float* sums) {
  multiply_panel({panel, 1, kPanelChunk, by_token, extents.channels, sums, extents.channels, tile.rows,
                  extents.channel_vectors, round_up(tile.columns(), 2 * kPairStep) / 2, false});
}

// --- forward ---

// Vector i of a panel's row.
BFloat16* panel_vector(uint32_t* panel, int64_t row, int64_t i) {
  constexpr int64_t kChunkVectors = 2 * kChunkPairs / kLanes;
  return reinterpret_cast<BFloat16*>(panel + i / kChunkVectors * kPanelChunk + row * kChunkPairs) +
         i % kChunkVectors * kLanes;
}

F32 exp2_of(F32 x) { return exp2_of_negative(at_least(x, -200.0f)); }

// Unnormalised softmax of a row. Returns 1 / denominator.
float softmax(const float* scores, int64_t visible, int64_t vectors, uint32_t* panel, int64_t row,
              float* lse) {
  F32 highest = broadcast(-__builtin_inff());
  for_each_vector(visible, [&](int64_t i, auto part) {
    highest = larger(fill_beyond(load(scores + i, Whole{}), -__builtin_inff(), part), highest);
  });
  const float shift = _mm512_reduce_max_ps(__builtin_bit_cast(__m512, highest)) * kLog2E;
  F32 sum = {};
  for_each_vector(visible, [&](int64_t i, auto part) {
    const F32 e = zero_beyond(exp2_of(load(scores + i, Whole{}) * kLog2E - shift), part);
    store_bits(panel_vector(panel, row, i / kLanes), narrow_normal(e));
    sum += e;
  });
  for (int64_t i = vectors_of(visible); i < vectors; ++i) {
    store_bits(panel_vector(panel, row, i), U16{});
  }
  const float total = _mm512_reduce_add_ps(__builtin_bit_cast(__m512, sum));
  *lse = shift * kLn2 + __builtin_logf(total);
  return 1.0f / total;
}

struct ForwardBuffers {
  uint32_t* slab;
  HeadMatrix keys, values;
  uint32_t* queries;
  float* scores;
  uint32_t* weights;
  float* out;

  ForwardBuffers(Arena& arena, const Extents& extents)
      : slab(arena.take<uint32_t>(kLanes * kChunkPairs)),
        keys{take_by_channel(arena, extents), nullptr},
        values{nullptr, take_by_token(arena, extents)},
        queries(take_panel(arena, kChunkPairs)),
        scores(arena.take<float>(kPanelRows * extents.tokens)),
        weights(take_panel(arena, extents.tokens / 2)),
        out(arena.take<float>(kPanelRows * extents.channels)) {}
};

void forward_tile(const BFloat16Attention& params, const ForwardBuffers& buffers, const Queries& tile,
                  Position at, float* lse) {
  const Extents extents(params.shape);
  at.token = tile.first;
  prefetch_next_head({params.q, params.k, params.v}, params, at, tile.rows);
  load_rows({params.q, params.rotation, params.scale}, params.shape, at, tile.rows, buffers.queries);
  score(tile, extents, buffers.queries, buffers.keys.by_channel, buffers.scores);
  const int64_t vectors = vectors_of(tile.columns());
  float factors[kPanelRows];
  for (int64_t row = 0; row < tile.rows; ++row) {
    factors[row] = softmax(buffers.scores + row * extents.tokens, tile.visible(row), vectors, buffers.weights,
                           row, lse + tile.first + row);
  }
  combine(tile, extents, buffers.weights, buffers.values.by_token, buffers.out);
  for (int64_t row = 0; row < tile.rows; ++row, ++at.token) {
    scale_vector(buffers.out + row * extents.channels, at.in<BFloat16>(params.out), params.shape.head_dim,
                 factors[row]);
  }
}

void forward(const BFloat16Attention& params, float* workspace, int64_t begin, int64_t end) {
  Arena arena{workspace};
  const ForwardBuffers buffers(arena, Extents(params.shape));
  const int64_t blocks = (params.shape.tokens + kAttentionBlockRows - 1) / kAttentionBlockRows;
  begin_products();
  for (int64_t block = begin; block < end; ++block) {
    const int64_t head = block / blocks;
    const Position at = position_of(params.shape, head * params.shape.tokens);
    if (block == begin || block % blocks == 0) {
      buffers.keys.fill({params.k, params.rotation, 1.0f}, params.shape, at, buffers.slab);
      buffers.values.fill(plain(params.v), params.shape, at, buffers.slab);
    }
    const int64_t first = block % blocks * kAttentionBlockRows;
    const int64_t last = smaller(first + kAttentionBlockRows, params.shape.tokens);
    for (int64_t row = first; row < last; row += kPanelRows) {
      forward_tile(params, buffers, queries_of(params, row, kPanelRows), at,
                   params.lse + head * params.lse_stride);
    }
  }
  end_products();
}

// --- backward ---

struct BackwardBuffers {
  uint32_t* slab;
  HeadMatrix keys, values;
  // Per panel.
  uint32_t *queries, *dout;
  float *scores, *dweights;
  uint32_t* dscores;
  float* dqueries;
  // Per block, as pairs of queries.
  uint32_t *weight_pairs, *dscore_pairs, *query_pairs, *dout_pairs;
  // Per head.
  float *dkeys, *dvalues;

  BackwardBuffers(Arena& arena, const Extents& extents)
      : slab(arena.take<uint32_t>(kLanes * kChunkPairs)),
        keys{take_by_channel(arena, extents), take_by_token(arena, extents)},
        values{take_by_channel(arena, extents), nullptr},
        queries(take_panel(arena, kChunkPairs)),
        dout(take_panel(arena, kChunkPairs)),
        scores(arena.take<float>(kPanelRows * extents.tokens)),
        dweights(arena.take<float>(kPanelRows * extents.tokens)),
        dscores(take_panel(arena, extents.tokens / 2)),
        dqueries(arena.take<float>(kPanelRows * extents.channels)),
        weight_pairs(arena.take<uint32_t>(kBlockPairs * extents.tokens)),
        dscore_pairs(arena.take<uint32_t>(kBlockPairs * extents.tokens)),
        query_pairs(arena.take<uint32_t>(kBlockPairs * extents.channels)),
        dout_pairs(arena.take<uint32_t>(kBlockPairs * extents.channels)),
        dkeys(arena.take<float>(extents.tokens * extents.channels)),
        dvalues(arena.take<float>(extents.tokens * extents.channels)) {}
};

// A row of scores and dP, with its softmax statistics.
struct SoftmaxRow {
  const float* scores;
  const float* dweights;
  int64_t visible;
  float shift;  // log-sum-exp to base 2
  float mean;   // dPsum

  template <bool kMasked>
  void vector(int64_t i, F32* weight, F32* dscore) const {
    *weight = exp2_of(load(scores + i, Whole{}) * kLog2E - shift);
    *dscore = *weight * (load(dweights + i, Whole{}) - mean);
    if constexpr (kMasked) {
      const Tail part{static_cast<int>(visible <= i ? 0 : smaller(visible - i, kLanes))};
      *weight = zero_beyond(*weight, part);
      *dscore = zero_beyond(*dscore, part);
    }
  }
};

// Writes two rows of P and dS.
struct GradientRows {
  uint32_t* panel;  // of dS
  int64_t row;
  uint32_t *weight_pairs, *dscore_pairs;

  template <bool kMasked>
  void vector(const SoftmaxRow (&rows)[2], int64_t i) const {
    F32 weights[2], dscores[2];
    for (int k = 0; k < 2; ++k) rows[k].vector<kMasked>(i, &weights[k], &dscores[k]);
    const U16 a = narrow(dscores[0], BFloat16{}), b = narrow(dscores[1], BFloat16{});
    __builtin_memcpy(panel_vector(panel, row, i / kLanes), &a, sizeof a);
    __builtin_memcpy(panel_vector(panel, row + 1, i / kLanes), &b, sizeof b);
    store_pairs(dscore_pairs + i, interleave(a, b));
    store_pairs(weight_pairs + i, interleave(narrow(weights[0], BFloat16{}), narrow(weights[1], BFloat16{})));
  }

  // Fills up to column `end` with zeros.
  void fill(const SoftmaxRow (&rows)[2], int64_t columns, int64_t end) const {
    int64_t i = 0;
    for (; i + kLanes <= rows[0].visible; i += kLanes) vector<false>(rows, i);
    for (; i < columns; i += kLanes) vector<true>(rows, i);
    for (; i < end; i += kLanes) {
      store_pairs(weight_pairs + i, U32{});
      store_pairs(dscore_pairs + i, U32{});
    }
  }
};

class HeadBackward {
 public:
  HeadBackward(const BFloat16Attention& params, const BackwardBuffers& buffers, int64_t head)
      : params_(params),
        buffers_(buffers),
        extents_(params.shape),
        at_(position_of(params.shape, head * params.shape.tokens)),
        lse_(params.lse + head * params.lse_stride),
        unrotation_(params.rotation) {
    unrotation_.backwards = !unrotation_.backwards;
  }

  void run() const {
    buffers_.keys.fill({params_.k, params_.rotation, 1.0f}, params_.shape, at_, buffers_.slab);
    buffers_.values.fill(plain(params_.v), params_.shape, at_, buffers_.slab);
    // Backwards: the last block sees all keys and initialises every sum.
    const int64_t tokens = params_.shape.tokens;
    const int64_t last = (tokens - 1) / kAttentionBlockRows * kAttentionBlockRows;
    for (int64_t first = last; first >= 0; first -= kAttentionBlockRows) {
      const Queries block = queries_of(params_, first, kAttentionBlockRows);
      for (int64_t row = 0; row < block.rows; row += kPanelRows) run_tile(block, row);
      add_over_queries(block, buffers_.weight_pairs, buffers_.dout_pairs, buffers_.dvalues, first < last);
      add_over_queries(block, buffers_.dscore_pairs, buffers_.query_pairs, buffers_.dkeys, first < last);
    }
    store_rows(buffers_.dvalues, plain(params_.dv), params_.shape, at_, tokens);
    store_rows(buffers_.dkeys, {params_.dk, unrotation_, 1.0f}, params_.shape, at_,
               tokens);  // q includes the scale
  }

 private:
  void run_tile(const Queries& block, int64_t start) const {
    const Queries tile = block.part(start, kPanelRows);
    Position at = at_;
    at.token = tile.first;
    prefetch_next_head({params_.q, params_.k, params_.v, params_.dout, params_.out}, params_, at, tile.rows);
    load_queries({params_.q, params_.rotation, params_.scale}, tile, buffers_.queries,
                 buffers_.query_pairs + start / 2 * extents_.channels);
    load_queries(plain(params_.dout), tile, buffers_.dout,
                 buffers_.dout_pairs + start / 2 * extents_.channels);
    score(tile, extents_, buffers_.queries, buffers_.keys.by_channel, buffers_.scores);
    score(tile, extents_, buffers_.dout, buffers_.values.by_channel, buffers_.dweights);
    const int64_t end = round_up(block.columns(), 2 * kPanelRows);
    for (int64_t row = 0; row < rows_in_steps(tile); row += 2) {
      const int64_t pair = (start + row) / 2 * extents_.tokens;
      const GradientRows target = {buffers_.dscores, row, buffers_.weight_pairs + pair,
                                   buffers_.dscore_pairs + pair};
      target.fill({softmax_row(tile, row), softmax_row(tile, row + 1)}, tile.columns(), end);
    }
    combine(tile, extents_, buffers_.dscores, buffers_.keys.by_token, buffers_.dqueries);
    store_rows(buffers_.dqueries, {params_.dq, unrotation_, params_.scale}, params_.shape, at, tile.rows);
  }

  // As a panel and as pairs of rows, zero-padded.
  void load_queries(const Vectors& source, const Queries& tile, uint32_t* panel, uint32_t* pairs) const {
    Position at = at_;
    at.token = tile.first;
    load_rows(source, params_.shape, at, tile.rows, panel);
    for (int64_t row = tile.rows; row < rows_in_steps(tile); ++row) clear_row(panel, row);
    pair_rows(panel, rows_in_steps(tile), extents_.channel_vectors, pairs, extents_.channels);
  }

  SoftmaxRow softmax_row(const Queries& tile, int64_t row) const {
    SoftmaxRow result = {buffers_.scores + row * extents_.tokens, buffers_.dweights + row * extents_.tokens,
                         0, 0.0f, 0.0f};
    if (row >= tile.rows) return result;
    Position at = at_;
    at.token = tile.first + row;
    result.visible = tile.visible(row);
    result.shift = lse_[at.token] * kLog2E;
    // dPsum = sum(dout * out) over the channels (Dao et al. 2022).
    result.mean = dot(at.in<BFloat16>(params_.dout), at.in<BFloat16>(params_.out), params_.shape.head_dim);
    return result;
  }

  void add_over_queries(const Queries& block, const uint32_t* over_keys, const uint32_t* over_channels,
                        float* sums, bool add) const {
    multiply_transposed({over_keys, extents_.tokens, kChunkPairs * extents_.tokens, over_channels,
                         extents_.channels, sums, extents_.channels, block.columns(),
                         extents_.channel_vectors, rows_in_steps(block) / 2, add});
  }

  const BFloat16Attention& params_;
  const BackwardBuffers& buffers_;
  Extents extents_;
  Position at_;  // the head's first token
  const float* lse_;
  Rotation unrotation_;
};

void backward(const BFloat16Attention& params, float* workspace, int64_t begin, int64_t end) {
  Arena arena{workspace};
  const BackwardBuffers buffers(arena, Extents(params.shape));
  begin_products();
  for (int64_t head = begin; head < end; ++head) HeadBackward(params, buffers, head).run();
  end_products();
}

}  // namespace

const BFloat16AttentionKernels bfloat16_attention = {workspace<ForwardBuffers>, workspace<BackwardBuffers>,
                                                     forward, backward};

}  // namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE
