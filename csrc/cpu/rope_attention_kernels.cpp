// Compiled once for each instruction set.
//
// A head's keys and values are laid out in float32 once; then a block of queries at a time, tile by tile,
// meets the keys that it sees, a panel of them at a time. What is beyond the last query, key or channel of a
// whole tile is whatever the workspace held, and only makes more of that.
#include "cpu/dtype_dispatch.h"
#include "cpu/float32_products.h"
#include "cpu/rotation.h"
#include "cpu/softmax_rows.h"
#include "cpu/transpose.h"
#include "include/rope_attention.h"

namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE {
namespace {

// Queries that are taken at a time: backward adds up over them.
constexpr int64_t kBlockRows = 48;

// Keys that the tiles of a block meet one after the other, so that these stay in the cache, and whole
// vectors.
constexpr int64_t kPanelKeys = 256;

static_assert(kBlockRows % kTileRows == 0, "a block consists of tiles");
static_assert(kPanelKeys % kLanes == 0, "a panel consists of vectors");
static_assert(kLanes % kTileRows == 0, "vectors of keys are tiles of them, too");

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t vectors_of(int64_t elements) { return (elements + kLanes - 1) / kLanes; }

// Lengths of what is kept of a head, in whole vectors.
struct Extents {
  Extents(int64_t keys, int64_t head_dim)
      : columns(vectors_of(keys) * kLanes),
        channel_vectors(vectors_of(head_dim)),
        channels(channel_vectors * kLanes) {}

  int64_t columns;  // keys
  int64_t channel_vectors;
  int64_t channels;
};

// Queries of a head, and the keys that they see. A causal query sees those up to its own number and `shift`.
struct Queries {
  int64_t first;  // query
  int64_t rows;   // queries
  int64_t keys;   // of the head
  int64_t shift;
  bool causal;

  int64_t visible(int64_t row) const {
    return causal ? larger_of(0, smaller(first + row + 1 + shift, keys)) : keys;
  }
  int64_t columns() const { return visible(rows - 1); }

  // Tile `row` of the block that these are, and whatever is in it.
  Queries tile(int64_t row) const {
    return {first + row, smaller(kTileRows, rows - row), keys, shift, causal};
  }
};

const Rotation kUnrotated = {};

// A tensor of the caller's, of which one head is asked for, and how that is rotated on the way.
struct Vectors {
  HeadsView view;
  int64_t head;
  const Rotation& rotation;
};

// A head of a sample or sequence, and its vectors in the caller's tensors of T.
template <class T>
struct Head {
  const AttentionShape& shape;
  const Rotation& rotation;  // of queries and keys
  const SequenceHeads& sequence;
  int64_t number;

  int64_t tokens() const { return sequence.tokens; }
  int64_t keys() const { return sequence.keys; }
  Extents extents() const { return {keys(), shape.head_dim}; }

  T* vector(const HeadsView& view, int64_t head, int64_t token) const {
    return Position{sequence.sample, head, sequence.first + token}.in<T>(view);
  }

  Queries queries(int64_t first, int64_t most) const {
    return {first, smaller(most, tokens() - first), keys(), keys() - tokens(), shape.causal};
  }

  Vectors queries_of(const HeadsView& view) const { return {view, number, rotation}; }
  Vectors keys_of(const HeadsView& view) const { return {view, shared_number(), rotation}; }
  Vectors values_of(const HeadsView& view) const { return {view, shared_number(), kUnrotated}; }
  int64_t shared_number() const { return number / (shape.heads / shape.kv_heads); }

  // target = factor * rotate(source). Apart from the loops of what isn't rotated, which it would slow down.
  template <class From, class To>
  [[gnu::noinline]] void rotate(const From* source, To* target, const Rotation& by, float factor,
                                int64_t token) const {
    const Position at = {sequence.sample, number, by.token_index == nullptr ? token : sequence.first + token};
    rotate_vector(source, target, {tokens(), shape.heads, shape.head_dim}, by, factor, at);
  }

  // Tokens [begin, begin + count), one behind the other.
  void load_rows(const Vectors& from, int64_t begin, int64_t count, float factor, float* rows) const {
    const int64_t stride = extents().channels;
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
    const int64_t stride = extents().channels;
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

  // All keys as columns: [channels][columns]. row_of: where a key's channels begin.
  template <class RowOf>
  void transpose_rows(const RowOf& row_of, float* columns) const {
    const int64_t stride = extents().columns;
    for (int64_t key = 0; key < keys(); key += kLanes) {
      for_each_vector(shape.head_dim, [&](int64_t channel, auto part) {
        U32 square[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          // Beyond the last key stands that one again.
          const auto* source = row_of(smaller(key + i, keys() - 1));
          square[i] = __builtin_bit_cast(U32, load(source + channel, part));
        }
        transpose_square(square);
        for (int i = 0; i < kLanes; ++i) {
          store(columns + (channel + i) * stride + key, __builtin_bit_cast(F32, square[i]), Whole{});
        }
      });
    }
  }

  void load_columns(const Vectors& from, float* columns) const {
    transpose_rows([&](int64_t key) -> const T* { return vector(from.view, from.head, key); }, columns);
  }

  void load_columns(const float* rows, float* columns) const {
    const int64_t stride = extents().channels;
    transpose_rows([&](int64_t key) { return rows + key * stride; }, columns);
  }
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

// Calls body(row, tile, first, count) for the tiles of a block of queries and the keys [first, first + count)
// of each panel that they see; of the first panel at least, with no keys if need be.
template <class Body>
void for_each_panel(const Queries& block, const Body& body) {
  for (int64_t first = 0; first == 0 || first < block.columns(); first += kPanelKeys) {
    for (int64_t row = 0; row < block.rows; row += kTileRows) {
      const Queries tile = block.tile(row);
      const int64_t count = smaller(kPanelKeys, tile.columns() - first);
      if (first == 0 || count > 0) body(row, tile, first, count);
    }
  }
}

// Dot products of a block's vectors with all keys or values that it sees.
void score(const Queries& block, const Extents& extents, int64_t head_dim, const float* rows,
           const float* columns, float* scores) {
  for_each_panel(block, [&](int64_t row, const Queries&, int64_t first, int64_t count) {
    multiply_tile({rows + row * extents.channels, extents.channels, 1, columns + first, extents.columns,
                   scores + row * extents.columns + first, extents.columns, vectors_of(count), head_dim,
                   false});
  });
}

// Sums of the keys or values that a block sees, by its weights.
void combine(const Queries& block, const Extents& extents, const float* weights, const float* rows,
             float* sums) {
  for_each_panel(block, [&](int64_t row, const Queries&, int64_t first, int64_t count) {
    multiply_tile({weights + row * extents.columns + first, extents.columns, 1,
                   rows + first * extents.channels, extents.channels, sums + row * extents.channels,
                   extents.channels, extents.channel_vectors, count, first > 0});
  });
}

// --- forward -----------------------------------------------------------------------------------------------

struct ForwardBuffers {
  float *keys, *values, *queries, *scores, *out;

  ForwardBuffers(Arena& arena, const Extents& extents)
      : keys(arena.take(extents.channels * extents.columns)),
        values(arena.take(extents.columns * extents.channels)),
        queries(arena.take(kBlockRows * extents.channels)),
        scores(arena.take(kBlockRows * extents.columns)),
        out(arena.take(kBlockRows * extents.channels)) {}
};

template <class T>
void forward_head(const RopeAttentionForward& params, float* workspace, const Head<T>& head) {
  const AttentionShape& shape = params.shape;
  const Extents extents = head.extents();
  Arena arena{workspace};
  const ForwardBuffers buffers(arena, extents);
  const Vectors out = {dense_heads(params.out, shape, head.tokens()), head.number, kUnrotated};
  float* lse = lse_of_head(params.lse, shape, head.sequence, head.number);
  if (head.rotation.cos == nullptr) {
    head.load_columns(head.keys_of(params.k), buffers.keys);
  } else {  // the values' place is free as yet
    head.load_rows(head.keys_of(params.k), 0, head.keys(), 1.0f, buffers.values);
    head.load_columns(buffers.values, buffers.keys);
  }
  head.load_rows(head.values_of(params.v), 0, head.keys(), 1.0f, buffers.values);
  for (int64_t first = 0; first < head.tokens(); first += kBlockRows) {
    const Queries block = head.queries(first, kBlockRows);
    head.load_rows(head.queries_of(params.q), first, block.rows, shape.scale, buffers.queries);
    score(block, extents, shape.head_dim, buffers.queries, buffers.keys, buffers.scores);
    for (int64_t row = 0; row < block.rows; ++row) {
      float* scores = buffers.scores + row * extents.columns;
      const int64_t visible = block.visible(row);
      lse[first + row] = visible > 0 ? softmax_row(scores, visible) : -__builtin_inff();
      clear(scores + visible, block.tile(row - row % kTileRows).columns() - visible);
    }
    combine(block, extents, buffers.scores, buffers.values, buffers.out);
    head.store_rows(buffers.out, out, first, block.rows, 1.0f);
  }
}

// --- backward ----------------------------------------------------------------------------------------------

struct BackwardBuffers {
  float *keys, *key_columns, *value_columns;
  // A block's: queries, gradients of the output, weights, and gradients of the scores and of the queries.
  float *queries, *dout, *weights, *dscores, *dqueries;
  float *dkeys, *dvalues;

  BackwardBuffers(Arena& arena, const Extents& extents)
      : keys(arena.take(extents.columns * extents.channels)),
        key_columns(arena.take(extents.channels * extents.columns)),
        value_columns(arena.take(extents.channels * extents.columns)),
        queries(arena.take(kBlockRows * extents.channels)),
        dout(arena.take(kBlockRows * extents.channels)),
        weights(arena.take(kBlockRows * extents.columns)),
        dscores(arena.take(kBlockRows * extents.columns)),
        dqueries(arena.take(kBlockRows * extents.channels)),
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
        extents_(head.extents()),
        arena_{workspace},
        buffers_(arena_, extents_),
        unrotation_(head.rotation),
        lse_(lse_of_head(params.lse, params.shape, head.sequence, head.number)) {
    unrotation_.backwards = true;
  }

  void run() const {
    head_.load_rows(head_.keys_of(params_.k), 0, head_.keys(), 1.0f, buffers_.keys);
    head_.load_columns(buffers_.keys, buffers_.key_columns);
    head_.load_columns(head_.values_of(params_.v), buffers_.value_columns);
    for (int64_t first = 0; first < head_.tokens(); first += kBlockRows) {
      const Queries block = head_.queries(first, kBlockRows);
      head_.load_rows(head_.queries_of(params_.q), first, block.rows, shape_.scale, buffers_.queries);
      head_.load_rows({params_.dout, head_.number, kUnrotated}, first, block.rows, 1.0f, buffers_.dout);
      differentiate(block);
      add_over_queries(block, buffers_.weights, buffers_.dout, buffers_.dvalues);
      add_over_queries(block, buffers_.dscores, buffers_.queries, buffers_.dkeys);
    }
    head_.store_rows(buffers_.dkeys, gradient(params_.dk, unrotation_, head_.keys()), 0, head_.keys(), 1.0f);
    head_.store_rows(buffers_.dvalues, gradient(params_.dv, kUnrotated, head_.keys()), 0, head_.keys(), 1.0f);
  }

 private:
  Vectors gradient(void* data, const Rotation& rotation, int64_t tokens) const {
    return {dense_heads(data, shape_, tokens), head_.number, rotation};
  }

  // Weights, gradients of the scores and those of the queries.
  void differentiate(const Queries& block) const {
    score(block, extents_, shape_.head_dim, buffers_.queries, buffers_.key_columns, buffers_.weights);
    score(block, extents_, shape_.head_dim, buffers_.dout, buffers_.value_columns, buffers_.dscores);
    for (int64_t row = 0; row < block.rows; ++row) {
      float* weights = buffers_.weights + row * extents_.columns;
      float* dscores = buffers_.dscores + row * extents_.columns;
      const int64_t token = block.first + row, visible = block.visible(row);
      const int64_t written = vectors_of(block.tile(row - row % kTileRows).columns()) * kLanes;
      // The mean of the weights' gradients is that of dout * out over the channels (Dao et al. 2022).
      const float mean = dot<T>(head_.vector(params_.dout, head_.number, token),
                                head_.vector(params_.out, head_.number, token), shape_.head_dim);
      softmax_row_backward(weights, dscores, visible, lse_[token], mean);
      clear(weights + visible, written - visible);
      clear(dscores + visible, written - visible);
    }
    combine(block, extents_, buffers_.dscores, buffers_.keys, buffers_.dqueries);
    head_.store_rows(buffers_.dqueries, gradient(params_.dq, unrotation_, head_.tokens()), block.first,
                     block.rows, shape_.scale);
  }

  // Adds to each key's row of `sums` the block's vectors by what their queries give it.
  void add_over_queries(const Queries& block, const float* factors, const float* vectors, float* sums) const {
    // Keys from here on no block before this one has seen.
    const int64_t unseen = block.first == 0 ? 0 : head_.queries(block.first - 1, 1).columns();
    for (int64_t key = 0; key < block.columns(); key += kTileRows) {
      // No query in front of this one sees the key.
      const int64_t begin = block.causal ? larger_of(0, key - block.shift - block.first) : 0;
      multiply_tile({factors + begin * extents_.columns + key, 1, extents_.columns,
                     vectors + begin * extents_.channels, extents_.channels, sums + key * extents_.channels,
                     extents_.channels, extents_.channel_vectors, block.rows - begin, key < unseen});
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
int64_t workspace(int64_t keys, int64_t head_dim) {
  Arena arena{nullptr};
  Buffers(arena, Extents(keys, head_dim));
  return arena.used;
}

// Calls body with each of the heads.
template <class Body>
void for_each_head(const AttentionShape& shape, const Rotation& rotation, const SequenceHeads& heads,
                   const Body& body) {
  with_element_type(shape.dtype, [&](auto type) {
    for (int64_t number = heads.begin; number < heads.end; ++number) {
      body(Head<decltype(type)>{shape, rotation, heads, number});
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

const RopeAttentionKernels rope_attention = {workspace<ForwardBuffers>, workspace<BackwardBuffers>, forward,
                                             backward};

}  // namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE
