// Compiled once for each instruction set.
//
// A head's keys and values are laid out in float32 once; then a tile of queries at a time meets the keys that
// it sees. What is beyond the last query, key or channel of a whole tile is whatever the workspace held, and
// only makes more of that.
#include "cpu/packed_attention_kernels.h"

#include "cpu/dtype_dispatch.h"
#include "cpu/float32_products.h"
#include "cpu/rotation.h"
#include "cpu/softmax_rows.h"
#include "cpu/transpose.h"

namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE {
namespace {

// Queries that backward takes at a time, whose weights and gradients it then adds up over.
constexpr int64_t kBlockRows = 48;

static_assert(kBlockRows % kTileRows == 0, "a block consists of tiles");
static_assert(kLanes % kTileRows == 0, "vectors of keys are tiles of them, too");

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t vectors_of(int64_t elements) { return (elements + kLanes - 1) / kLanes; }

// Lengths of what is kept of a head, in whole vectors.
struct Extents {
  Extents(int64_t tokens, int64_t head_dim)
      : columns(vectors_of(tokens) * kLanes),
        channel_vectors(vectors_of(head_dim)),
        channels(channel_vectors * kLanes) {}

  int64_t columns;  // tokens
  int64_t channel_vectors;
  int64_t channels;
};

const Rotation kUnrotated = {};

// A tensor of the caller's, of which one head is asked for, and how that is rotated on the way.
struct Vectors {
  HeadsView view;
  int64_t head;
  const Rotation& rotation;
};

// A head of a sequence, and its vectors in the caller's tensors of T.
template <class T>
struct Head {
  const AttentionShape& shape;
  const Rotation& rotation;  // of queries and keys
  int64_t first;
  int64_t tokens;
  int64_t number;

  T* vector(const HeadsView& view, int64_t head, int64_t token) const {
    return Position{0, head, first + token}.in<T>(view);
  }

  Vectors queries(const HeadsView& view) const { return {view, number, rotation}; }
  Vectors keys(const HeadsView& view) const { return {view, shared_number(), rotation}; }
  Vectors values(const HeadsView& view) const { return {view, shared_number(), kUnrotated}; }
  int64_t shared_number() const { return number / (shape.heads / shape.kv_heads); }

  // target = factor * rotate(source). Apart from the loops of what isn't rotated, which it would slow down.
  template <class From, class To>
  [[gnu::noinline]] void rotate(const From* source, To* target, const Rotation& by, float factor,
                                int64_t token) const {
    const Position at = {0, number, by.token_index == nullptr ? token : first + token};
    rotate_vector(source, target, {tokens, shape.heads, shape.head_dim}, by, factor, at);
  }

  // Tokens [begin, begin + count), one behind the other.
  void load_rows(const Vectors& from, int64_t begin, int64_t count, float factor, float* rows) const {
    const int64_t stride = Extents(tokens, shape.head_dim).channels;
    if (from.rotation.cos == nullptr) {
      for (int64_t i = 0; i < count; ++i) {
        scale_vector(vector(from.view, from.head, begin + i), rows + i * stride, shape.head_dim, factor);
      }
      return;
    }
    for (int64_t i = 0; i < count; ++i) {
      const T* source = vector(from.view, from.head, begin + i);
      rotate(source, rows + i * stride, from.rotation, factor, begin + i);
    }
  }

  void store_rows(const float* rows, const Vectors& to, int64_t begin, int64_t count, float factor) const {
    const int64_t stride = Extents(tokens, shape.head_dim).channels;
    if (to.rotation.cos == nullptr) {
      for (int64_t i = 0; i < count; ++i) {
        scale_vector(rows + i * stride, vector(to.view, to.head, begin + i), shape.head_dim, factor);
      }
      return;
    }
    for (int64_t i = 0; i < count; ++i) {
      rotate(rows + i * stride, vector(to.view, to.head, begin + i), to.rotation, factor, begin + i);
    }
  }

  // All tokens as columns: [channels][columns]. row_of: where a token's channels begin.
  template <class RowOf>
  void transpose_rows(const RowOf& row_of, float* columns) const {
    const int64_t stride = Extents(tokens, shape.head_dim).columns;
    for (int64_t token = 0; token < tokens; token += kLanes) {
      for_each_vector(shape.head_dim, [&](int64_t channel, auto part) {
        U32 square[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          // Beyond the last token stands that one again.
          const auto* source = row_of(smaller(token + i, tokens - 1));
          square[i] = __builtin_bit_cast(U32, load(source + channel, part));
        }
        transpose_square(square);
        for (int i = 0; i < kLanes; ++i) {
          store(columns + (channel + i) * stride + token, __builtin_bit_cast(F32, square[i]), Whole{});
        }
      });
    }
  }

  void load_columns(const Vectors& from, float* columns) const {
    transpose_rows([&](int64_t token) -> const T* { return vector(from.view, from.head, token); }, columns);
  }

  void load_columns(const float* rows, float* columns) const {
    const int64_t stride = Extents(tokens, shape.head_dim).channels;
    transpose_rows([&](int64_t token) { return rows + token * stride; }, columns);
  }
};

// A tile of queries, and the keys that it sees.
struct Tile {
  int64_t first;    // query
  int64_t rows;     // queries
  int64_t columns;  // keys
  bool causal;

  Tile(int64_t first, int64_t tokens, bool causal)
      : first(first),
        rows(smaller(kTileRows, tokens - first)),
        columns(causal ? first + rows : tokens),
        causal(causal) {}

  int64_t visible(int64_t row) const { return causal ? first + row + 1 : columns; }
};

// Parts of a workspace; without one, their total size.
struct Arena {
  float* data;
  int64_t used = 0;

  float* take(int64_t count) {
    float* part = data == nullptr ? nullptr : data + used;
    used += count;
    return part;
  }
};

// Dot products of a tile's vectors with all keys or values that it sees.
void score(const Tile& tile, const Extents& extents, int64_t head_dim, const float* rows,
           const float* columns, float* scores) {
  multiply_tile({rows, extents.channels, 1, columns, extents.columns, scores, extents.columns,
                 vectors_of(tile.columns), head_dim, false});
}

// Sums of the keys or values that a tile sees, by its weights.
void combine(const Tile& tile, const Extents& extents, const float* weights, const float* rows, float* sums) {
  multiply_tile({weights, extents.columns, 1, rows, extents.channels, sums, extents.channels,
                 extents.channel_vectors, tile.columns, false});
}

// --- forward -----------------------------------------------------------------------------------------------

struct ForwardBuffers {
  float *keys, *values, *queries, *scores, *out;

  ForwardBuffers(Arena& arena, const Extents& extents)
      : keys(arena.take(extents.channels * extents.columns)),
        values(arena.take(extents.columns * extents.channels)),
        queries(arena.take(kTileRows * extents.channels)),
        scores(arena.take(kTileRows * extents.columns)),
        out(arena.take(kTileRows * extents.channels)) {}
};

template <class T>
void forward_head(const RopeAttentionForward& params, float* workspace, const Head<T>& head) {
  const AttentionShape& shape = params.shape;
  const Extents extents(head.tokens, shape.head_dim);
  Arena arena{workspace};
  const ForwardBuffers buffers(arena, extents);
  const Vectors out = {dense_heads(params.out, shape), head.number, kUnrotated};
  float* lse = params.lse + head.number * shape.offsets.tokens + head.first;
  if (head.rotation.cos == nullptr) {
    head.load_columns(head.keys(params.k), buffers.keys);
  } else {  // the values' place is free as yet
    head.load_rows(head.keys(params.k), 0, head.tokens, 1.0f, buffers.values);
    head.load_columns(buffers.values, buffers.keys);
  }
  head.load_rows(head.values(params.v), 0, head.tokens, 1.0f, buffers.values);
  for (int64_t first = 0; first < head.tokens; first += kTileRows) {
    const Tile tile(first, head.tokens, shape.causal);
    head.load_rows(head.queries(params.q), first, tile.rows, shape.scale, buffers.queries);
    score(tile, extents, shape.head_dim, buffers.queries, buffers.keys, buffers.scores);
    for (int64_t row = 0; row < tile.rows; ++row) {
      float* scores = buffers.scores + row * extents.columns;
      const int64_t visible = tile.visible(row);
      lse[first + row] = softmax_row(scores, visible);
      clear(scores + visible, tile.columns - visible);
    }
    combine(tile, extents, buffers.scores, buffers.values, buffers.out);
    head.store_rows(buffers.out, out, first, tile.rows, 1.0f);
  }
}

// --- backward ----------------------------------------------------------------------------------------------

struct BackwardBuffers {
  float *keys, *key_columns, *value_columns;
  // A block's: queries, gradients of the output, weights, and gradients of the scores.
  float *queries, *dout, *weights, *dscores;
  float* dqueries;  // a tile's
  float *dkeys, *dvalues;

  BackwardBuffers(Arena& arena, const Extents& extents)
      : keys(arena.take(extents.columns * extents.channels)),
        key_columns(arena.take(extents.channels * extents.columns)),
        value_columns(arena.take(extents.channels * extents.columns)),
        queries(arena.take(kBlockRows * extents.channels)),
        dout(arena.take(kBlockRows * extents.channels)),
        weights(arena.take(kBlockRows * extents.columns)),
        dscores(arena.take(kBlockRows * extents.columns)),
        dqueries(arena.take(kTileRows * extents.channels)),
        dkeys(arena.take(extents.columns * extents.channels)),
        dvalues(arena.take(extents.columns * extents.channels)) {}
};

template <class T>
class HeadBackward {
 public:
  HeadBackward(const RopeAttentionBackward& params, float* workspace, const Head<T>& head)
      : params_(params),
        shape_(params.shape),
        head_(head),
        extents_(head.tokens, params.shape.head_dim),
        arena_{workspace},
        buffers_(arena_, extents_),
        unrotation_(head.rotation),
        lse_(params.lse + head.number * params.shape.offsets.tokens + head.first) {
    unrotation_.backwards = true;
  }

  void run() const {
    head_.load_rows(head_.keys(params_.k), 0, head_.tokens, 1.0f, buffers_.keys);
    head_.load_columns(buffers_.keys, buffers_.key_columns);
    head_.load_columns(head_.values(params_.v), buffers_.value_columns);
    for (int64_t first = 0; first < head_.tokens; first += kBlockRows) {
      const int64_t count = smaller(kBlockRows, head_.tokens - first);
      head_.load_rows(head_.queries(params_.q), first, count, shape_.scale, buffers_.queries);
      head_.load_rows({params_.dout, head_.number, kUnrotated}, first, count, 1.0f, buffers_.dout);
      for (int64_t row = 0; row < count; row += kTileRows) differentiate_tile(row, first);
      add_over_queries(first, count, buffers_.weights, buffers_.dout, buffers_.dvalues);
      add_over_queries(first, count, buffers_.dscores, buffers_.queries, buffers_.dkeys);
    }
    head_.store_rows(buffers_.dkeys, gradient(params_.dk, unrotation_), 0, head_.tokens, 1.0f);
    head_.store_rows(buffers_.dvalues, gradient(params_.dv, kUnrotated), 0, head_.tokens, 1.0f);
  }

 private:
  Vectors gradient(void* data, const Rotation& rotation) const {
    return {dense_heads(data, shape_), head_.number, rotation};
  }

  // The tile that begins with this row of the block.
  void differentiate_tile(int64_t begin, int64_t block) const {
    const Tile tile(block + begin, head_.tokens, shape_.causal);
    float* weights = buffers_.weights + begin * extents_.columns;
    float* dscores = buffers_.dscores + begin * extents_.columns;
    score(tile, extents_, shape_.head_dim, buffers_.queries + begin * extents_.channels, buffers_.key_columns,
          weights);
    score(tile, extents_, shape_.head_dim, buffers_.dout + begin * extents_.channels, buffers_.value_columns,
          dscores);
    const int64_t written = vectors_of(tile.columns) * kLanes;
    for (int64_t row = 0; row < tile.rows; ++row, weights += extents_.columns, dscores += extents_.columns) {
      const int64_t token = tile.first + row, visible = tile.visible(row);
      // The mean of the weights' gradients is that of dout * out over the channels (Dao et al. 2022).
      const float mean = dot<T>(head_.vector(params_.dout, head_.number, token),
                                head_.vector(params_.out, head_.number, token), shape_.head_dim);
      softmax_row_backward(weights, dscores, visible, lse_[token], mean);
      clear(weights + visible, written - visible);
      clear(dscores + visible, written - visible);
    }
    combine(tile, extents_, buffers_.dscores + begin * extents_.columns, buffers_.keys, buffers_.dqueries);
    head_.store_rows(buffers_.dqueries, gradient(params_.dq, unrotation_), tile.first, tile.rows,
                     shape_.scale);
  }

  // Adds to each key's row of `sums` the block's vectors by what their queries give it.
  void add_over_queries(int64_t block, int64_t count, const float* factors, const float* vectors,
                        float* sums) const {
    const int64_t keys = shape_.causal ? block + count : head_.tokens;
    for (int64_t key = 0; key < keys; key += kTileRows) {
      // No query in front of the key sees it.
      const int64_t begin = shape_.causal && key > block ? key - block : 0;
      const bool is_first = shape_.causal ? key >= block : block == 0;
      multiply_tile({factors + begin * extents_.columns + key, 1, extents_.columns,
                     vectors + begin * extents_.channels, extents_.channels, sums + key * extents_.channels,
                     extents_.channels, extents_.channel_vectors, count - begin, !is_first});
    }
  }

  const RopeAttentionBackward& params_;
  const AttentionShape& shape_;
  const Head<T>& head_;
  Extents extents_;
  Arena arena_;
  BackwardBuffers buffers_;
  Rotation unrotation_;
  const float* lse_;
};

// --- the table ---------------------------------------------------------------------------------------------

template <class Buffers>
int64_t workspace(int64_t tokens, int64_t head_dim) {
  Arena arena{nullptr};
  Buffers(arena, Extents(tokens, head_dim));
  return arena.used;
}

// Calls body with each of the heads.
template <class Body>
void for_each_head(const AttentionShape& shape, const Rotation& rotation, const SequenceHeads& heads,
                   const Body& body) {
  with_element_type(shape.dtype, [&](auto type) {
    for (int64_t number = heads.begin; number < heads.end; ++number) {
      body(Head<decltype(type)>{shape, rotation, heads.first, heads.tokens, number});
    }
  });
}

void forward(const RopeAttentionForward& params, const Rotation& rotation, float* workspace,
             const SequenceHeads& heads) {
  for_each_head(params.shape, rotation, heads,
                [&](const auto& head) { forward_head(params, workspace, head); });
}

void backward(const RopeAttentionBackward& params, const Rotation& rotation, float* workspace,
              const SequenceHeads& heads) {
  for_each_head(params.shape, rotation, heads,
                [&](const auto& head) { HeadBackward(params, workspace, head).run(); });
}

}  // namespace

const PackedAttentionKernels packed_attention = {workspace<ForwardBuffers>, workspace<BackwardBuffers>,
                                                 forward, backward};

}  // namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE
