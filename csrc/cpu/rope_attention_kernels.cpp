// Compiled once for each instruction set.
//
// A head's keys and values are copied to float32 once; then each block of queries is multiplied with its
// visible keys, a panel at a time. Padding of the last tile is uninitialised and only affects padding.
#include "cpu/attention_blocks.h"
#include "cpu/rotation.h"
#include "include/rope_attention.h"

namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE {
namespace {

// --- matmul ---

// kTileRows * kTileVectors sums fit into registers and hide the latency of FMA.
#if defined(__AVX512F__)
constexpr int kTileRows = 8;
#else
constexpr int kTileRows = 4;
#endif
constexpr int kTileVectors = 3;

// c = a b, or c += a b, for kTileRows rows.
struct TileProduct {
  const float* a;  // element [row][step]
  int64_t a_row;   // strides in elements
  int64_t a_step;
  const float* b;  // [step][column]
  int64_t b_stride;
  float* c;  // [row][column]
  int64_t c_stride;
  int64_t vectors;  // of kLanes columns
  int64_t steps;
  bool add;
};

template <int kVectors>
static inline void multiply_columns(const TileProduct& product, int64_t vector) {
  const int64_t a_row = product.a_row, a_step = product.a_step, b_stride = product.b_stride;
  float* c = product.c + vector * kLanes;
  F32 sums[kTileRows][kVectors] = {};
  const float* a = product.a;
  const float* b = product.b + vector * kLanes;
  for (int64_t step = product.steps; step > 0; --step, a += a_step, b += b_stride) {
    F32 right[kVectors];
#pragma GCC unroll 3
    for (int j = 0; j < kVectors; ++j) right[j] = load(b + j * kLanes, Whole{});
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
      const F32 left = broadcast(a[i * a_row]);
#pragma GCC unroll 3
      for (int j = 0; j < kVectors; ++j) sums[i][j] += left * right[j];
    }
  }
  for (int i = 0; i < kTileRows; ++i) {
    for (int j = 0; j < kVectors; ++j) {
      float* to = c + i * product.c_stride + j * kLanes;
      // Adds per panel: a single float32 sum over thousands of keys would lose accuracy.
      store(to, product.add ? load(to, Whole{}) + sums[i][j] : sums[i][j], Whole{});
    }
  }
}

// Not inlined, to limit code size.
__attribute__((noinline)) static void multiply_tile(const TileProduct& product) {
  // Widths of column blocks differ by at most one.
  int64_t blocks = (product.vectors + kTileVectors - 1) / kTileVectors;
  for (int64_t vector = 0; vector < product.vectors; --blocks) {
    const int64_t width = (product.vectors - vector + blocks - 1) / blocks;
    switch (width) {
      case 3:
        multiply_columns<3>(product, vector);
        break;
      case 2:
        multiply_columns<2>(product, vector);
        break;
      default:
        multiply_columns<1>(product, vector);
    }
    vector += width;
  }
}

// --- softmax ---

static inline void clear(float* row, int64_t width) {
  for_each_vector(width, [&](int64_t i, auto part) { store(row + i, F32{}, part); });
}

// Softmax over the visible keys in place. Returns the log-sum-exp.
static inline float softmax_row(float* row, int64_t visible) {
  F32 highest = broadcast(-__builtin_inff());
  for_each_vector(visible, [&](int64_t i, auto part) {
    highest = larger(fill_beyond(load(row + i, part), -__builtin_inff(), part), highest);
  });
  const float shift = horizontal_max(highest);
  float sum[1];
  sum_over_row(visible, sum, [&](int64_t i, auto part, F32* sums) {
    const F32 e = exp(load(row + i, part) - shift);
    store(row + i, e, part);
    sums[0] += zero_beyond(e, part);
  });
  const float factor = 1.0f / sum[0];
  for_each_vector(visible, [&](int64_t i, auto part) { store(row + i, load(row + i, part) * factor, part); });
  return shift + __builtin_logf(sum[0]);
}

// Recomputes P from scores, and turns dP into dS = P (dP - mean); mean: dPsum.
static inline void softmax_row_backward(float* scores, float* gradients, int64_t visible, float lse,
                                        float mean) {
  for_each_vector(visible, [&](int64_t i, auto part) {
    const F32 weight = exp(load(scores + i, part) - lse);
    store(scores + i, weight, part);
    store(gradients + i, weight * (load(gradients + i, part) - mean), part);
  });
}

// --- a head ---

// Queries per block: backward sums over them.
constexpr int64_t kBlockRows = 48;

// Keys per panel, which stay in the cache for all tiles of a block.
constexpr int64_t kPanelKeys = 256;

static_assert(kBlockRows % kTileRows == 0, "a block consists of tiles");
static_assert(kPanelKeys % kLanes == 0, "a panel consists of vectors");
static_assert(kLanes % kTileRows == 0, "vectors of keys are tiles of them, too");

// Lengths of a head's matrices, padded to whole vectors.
struct Extents {
  Extents(int64_t keys, int64_t head_dim)
      : columns(vectors_of(keys) * kLanes),
        channel_vectors(vectors_of(head_dim)),
        channels(channel_vectors * kLanes) {}

  int64_t columns;  // keys
  int64_t channel_vectors;
  int64_t channels;
};

const Rotation kUnrotated = {};

// One head of a tensor of the caller, with the rotation of its copy.
struct Vectors {
  HeadsView view;
  int64_t head;
  const Rotation& rotation;
};

// A head of a sample or sequence, with elements of type T.
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
    return Queries{0, tokens(), keys(), keys() - tokens(), shape.causal}.part(first, most);
  }

  Vectors queries_of(const HeadsView& view) const { return {view, number, rotation}; }
  Vectors keys_of(const HeadsView& view) const { return {view, shared_number(), rotation}; }
  Vectors values_of(const HeadsView& view) const { return {view, shared_number(), kUnrotated}; }
  int64_t shared_number() const { return number / (shape.heads / shape.kv_heads); }

  // target = factor * rotate(source). Not inlined, which would slow down the loops without rotation.
  template <class From, class To>
  [[gnu::noinline]] void rotate(const From* source, To* target, const Rotation& by, float factor,
                                int64_t token) const {
    const Position at = {sequence.sample, number, by.token_index == nullptr ? token : sequence.first + token};
    rotate_vector(source, target, {tokens(), shape.heads, shape.head_dim}, by, factor, at);
  }

  // Copies tokens [begin, begin + count) to consecutive rows.
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

  // Transposes all keys to [channels][columns]. row_of(key) returns the key's row.
  template <class RowOf>
  void transpose_rows(const RowOf& row_of, float* columns) const {
    const int64_t stride = extents().columns;
    for (int64_t key = 0; key < keys(); key += kLanes) {
      for_each_vector(shape.head_dim, [&](int64_t channel, auto part) {
        U32 square[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          // Padding repeats the last key.
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

// Calls body(row, tile, first, count) for each tile of a block and keys [first, first + count) of each
// visible panel; at least for the first panel, which may have no keys.
template <class Body>
void for_each_panel(const Queries& block, const Body& body) {
  for (int64_t first = 0; first == 0 || first < block.columns(); first += kPanelKeys) {
    for (int64_t row = 0; row < block.rows; row += kTileRows) {
      const Queries tile = block.part(row, kTileRows);
      const int64_t count = smaller(kPanelKeys, tile.columns() - first);
      if (first == 0 || count > 0) body(row, tile, first, count);
    }
  }
}

// scores = rows * columns over the visible keys.
void score(const Queries& block, const Extents& extents, int64_t head_dim, const float* rows,
           const float* columns, float* scores) {
  for_each_panel(block, [&](int64_t row, const Queries&, int64_t first, int64_t count) {
    multiply_tile({rows + row * extents.channels, extents.channels, 1, columns + first, extents.columns,
                   scores + row * extents.columns + first, extents.columns, vectors_of(count), head_dim,
                   false});
  });
}

// sums = weights * rows over the visible keys.
void combine(const Queries& block, const Extents& extents, const float* weights, const float* rows,
             float* sums) {
  for_each_panel(block, [&](int64_t row, const Queries&, int64_t first, int64_t count) {
    multiply_tile({weights + row * extents.columns + first, extents.columns, 1,
                   rows + first * extents.channels, extents.channels, sums + row * extents.channels,
                   extents.channels, extents.channel_vectors, count, first > 0});
  });
}

// --- forward ---

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
  } else {  // uses the buffer of the values, which is still free
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
      clear(scores + visible, block.part(row - row % kTileRows, kTileRows).columns() - visible);
    }
    combine(block, extents, buffers.scores, buffers.values, buffers.out);
    head.store_rows(buffers.out, out, first, block.rows, 1.0f);
  }
}

// --- backward ---

struct BackwardBuffers {
  float *keys, *key_columns, *value_columns;
  // Per block.
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

  // P, dS and dq of a block.
  void differentiate(const Queries& block) const {
    score(block, extents_, shape_.head_dim, buffers_.queries, buffers_.key_columns, buffers_.weights);
    score(block, extents_, shape_.head_dim, buffers_.dout, buffers_.value_columns, buffers_.dscores);
    for (int64_t row = 0; row < block.rows; ++row) {
      float* weights = buffers_.weights + row * extents_.columns;
      float* dscores = buffers_.dscores + row * extents_.columns;
      const int64_t token = block.first + row, visible = block.visible(row);
      const int64_t written = vectors_of(block.part(row - row % kTileRows, kTileRows).columns()) * kLanes;
      // dPsum = sum(dout * out) over the channels (Dao et al. 2022).
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

  // sums += factors^T * vectors: dv from P and dout, dk from dS and q.
  void add_over_queries(const Queries& block, const float* factors, const float* vectors, float* sums) const {
    // Earlier blocks have initialised the sums of keys before this one.
    const int64_t unseen = block.first == 0 ? 0 : head_.queries(block.first - 1, 1).columns();
    for (int64_t key = 0; key < block.columns(); key += kTileRows) {
      // The first query that sees the key.
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

// --- table ---

// Calls body(Head<T>) for each head.
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
