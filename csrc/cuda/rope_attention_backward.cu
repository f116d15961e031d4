// The gradients of q, k and v. The weights are computed again from the log-sum-exps, and everything is summed
// in one order: no atomics.
//
// A block has a head. Its warps own keys, 16 or 32 of them, whose dk and dv they sum in registers, and all
// walk over the queries, which come in stages of 32, the next one while the warps multiply:
//
//   S^T = k q^T,  P = exp(S - lse),  dP^T = v dout^T,  dS = P (dP - delta),  dv += P^T dout,  dk += dS^T q
//
// and put dS into shared memory, in 16 bits, from which they make dq = dS k together: five products. Keys
// that are more than the warps own take several rounds; between rounds the sums of dq are floats in a
// workspace, which the cache holds.
//
// Bytes: 8 B N H D s; q and dout once more for each further round, and 8 B N H D of the workspace.
//
// Memory plan. Of S slots of queries, W warps with K keys each (32 with D up to 64, else 16), a block has, in
// shared memory, rows of 2 (D + 8) bytes: 2 K W for k and v and 128 for two stages of q and dout; rows of 80
// bytes: K W for dS; 32 rows of 4 (D + 8) bytes for dq; and 8 S bytes for the log-sum-exps and delta.
// Registers hold 8 warps a multiprocessor. With a token of prefix, as in rope_attention_forward.cu:
//
//    D     N   W   KB a block   rounds         D     N   W   KB a block   rounds
//   64    77   3    62          1             112   197   7   108          2
//   64   197   7   109          1             112   257   6   100          3
//   64   257   5    87          2             112   577   8   120          5
//   64   577   7   112          3             112  1025   8   123          9
//   64  1025   7   116          5             128   257   6   112          3
//   96   257   6    88          3             128   577   8   134          5
#include "cuda/attention_plan.h"
#include "cuda/attention_tiles.cuh"

namespace evakernels::cuda {
namespace {

// Of 16 keys that a warp owns, and of 16 queries that it meets at a time: two of either, so that what is
// loaded of the others feeds four products in place of two. (Both would spill registers.)
template <int D>
constexpr int kKeyTiles = D <= 64 ? 2 : 1;
template <int D>
constexpr int kQueryTiles = D <= 64 || D > 112 ? 1 : 2;
constexpr int kStageTiles = 2;
constexpr int kStageRows = kStageTiles * kTile;
// Slots of whole stages.
__host__ __device__ __forceinline__ int stage_slots(int tiles) {
  return (tiles + kStageTiles - 1) / kStageTiles * kStageRows;
}
// With 255 registers a thread.
constexpr int kMaxWarps = 8;
// A row of dS^T: of a key, with the queries of a stage. 16 bytes longer than these.
constexpr int kScoreRow = kStageRows + kWide;

// What a warp sums for its keys.
template <int D>
struct KeyGradients {
  Accumulator dk[kKeyTiles<D>][D / kTile] = {};  // rotated, and without the scale
  Accumulator dv[kKeyTiles<D>][D / kTile] = {};
};

// Of each slot: the log-sum-exp of its query, to base 2, and delta, the mean of its weights' gradients under
// the weights, which is dout * out summed over the channels (Dao et al. 2022).
struct QueryScalars {
  float* lse;
  float* delta;
};

// A block's shared memory.
template <class T, int D>
struct BackwardMemory {
  static constexpr int kOwnElements = kKeyTiles<D> * kTileElements<D>;  // of a warp's keys
  static constexpr int kStageElements = kStageTiles * kTileElements<D>;
  static constexpr int kScoreElements = kKeyTiles<D> * kTile * kScoreRow;

  T* k;  // of all warps; then their gradients in float
  T* v;
  T* stages;  // two: the queries, and behind them dout
  T* scores;  // dS^T
  float* dq;  // of a stage
  QueryScalars scalars;

  // Computed where it is used: kept for a whole loop, the addresses would take registers of the products.
  __device__ __forceinline__ explicit BackwardMemory(const AttentionPlan& plan) {
    unsigned warps = static_cast<unsigned>(plan.warps);
    hide_origin(warps);
    k = dynamic_shared_memory<T>();
    v = k + warps * kOwnElements;
    stages = v + warps * kOwnElements;
    scores = stages + 4 * kStageElements;
    dq = reinterpret_cast<float*>(scores + warps * kScoreElements);
    scalars.lse = dq + kStageElements;
    scalars.delta = scalars.lse + stage_slots(plan.tiles);
  }

  __device__ __forceinline__ T* queries(int stage) const {
    return stages + (stage / kStageTiles & 1) * 2 * kStageElements;
  }
  __device__ __forceinline__ T* dout(int stage) const { return queries(stage) + kStageElements; }

  static size_t bytes(const AttentionPlan& plan) {
    const int warp = 2 * kOwnElements + kScoreElements;
    return (plan.warps * warp + 4 * kStageElements) * sizeof(T) +
           (kStageElements + 2 * stage_slots(plan.tiles)) * sizeof(float);
  }
};

// Lanes that share a row where rows are read once: together they read whole sectors.
constexpr int kLanesOfRow = 8;

// The lane's part, which is number `part` of those of its row.
template <class T, int E>
__device__ __forceinline__ float part_of_dot(const T* a, const T* b, int width, int part) {
  float sum = 0.0f;
  for (int i = part * E; i < width; i += kLanesOfRow * E) {
    float x[E], y[E];
    load_floats(a + i, x);
    load_floats(b + i, y);
#pragma unroll
    for (int n = 0; n < E; ++n) sum += x[n] * y[n];
  }
  return sum;
}

template <class T, int D>
__device__ __forceinline__ void compute_scalars(const QueryScalars& scalars,
                                                const RopeAttentionBackward& params, const Head<T, D>& head) {
  const float* const lse = params.lse + head.first_number();
  const auto dout = head.rows_of(params.dout), out = head.rows_of(params.out);
  const int thread = static_cast<int>(threadIdx.x), part = thread % kLanesOfRow;
  const int rows = static_cast<int>(blockDim.x) / kLanesOfRow;
  // All lanes of a warp have a slot, or none: it has four, and there are sixteen a tile.
  for (int slot = thread / kLanesOfRow; slot < stage_slots(head.tiles()); slot += rows) {
    const int token = slot - head.slots().shift;
    const bool exists = head.slots().has(token);
    float delta = 0.0f;
    if (exists) {
      const T *const a = dout.at(token), *const b = out.at(token);
      delta = head.plan.wide ? part_of_dot<T, kWide>(a, b, head.width(), part)
                             : part_of_dot<T, 1>(a, b, head.width(), part);
    }
#pragma unroll
    for (int distance = kLanesOfRow / 2; distance > 0; distance /= 2) {
      delta += __shfl_xor_sync(kWholeWarp, delta, distance);
    }
    if (part == 0) {
      scalars.delta[slot] = delta;
      // So that the weights of an empty slot are 0.
      scalars.lse[slot] = exists ? lse[token] * kLog2E : INFINITY;
    }
    __syncwarp();  // Else some lanes would ask for the next rows before the others.
  }
}

// products[m][n] = own rows * other rows^T.
template <class T, int D, int M, int N>
__device__ __forceinline__ void multiply_rows(Accumulator (&products)[M][N], const T* own, const T* other) {
#pragma unroll 2  // All at once would spill 12 to 84 bytes (nvcc 13.0, sm_90).
  for (int d = 0; d < D; d += kTile) {
    LeftFragment left[M];
#pragma unroll
    for (int m = 0; m < M; ++m) left[m] = load_left(own + m * kTileElements<D> + d, kRow<D>);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const RightFragment right = load_right_transposed(other + n * kTileElements<D> + d, kRow<D>);
#pragma unroll
      for (int m = 0; m < M; ++m) multiply_add<T>(products[m][n], left[m], right);
    }
  }
}

// sums[m] += left[m] * rows.
template <class T, int D, int M>
__device__ __forceinline__ void add_products(Accumulator (&sums)[M][D / kTile], const LeftFragment (&left)[M],
                                             const T* rows) {
#pragma unroll
  for (int d = 0; d < D / kTile; ++d) {
    const RightFragment right = load_right(rows + d * kTile, kRow<D>);
#pragma unroll
    for (int m = 0; m < M; ++m) multiply_add<T>(sums[m][d], left[m], right);
  }
}

// Weights that don't count, of a transposed tile.
template <class T, int D>
__device__ __forceinline__ void mask_weights(Accumulator& weights, const Head<T, D>& head, int query_tile,
                                             int key_tile) {
  // A branch, as in forward.
  unsigned lane = threadIdx.x % kWarpSize;
  hide_origin(lane);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int query = query_tile * kTile + column_in_tile(lane, i);
    const int key = key_tile * kTile + row_in_tile(lane, i);
    if (!head.counts(query, key)) weights.values[i] = 0.0f;
  }
}

// What the queries from `query_tile` on give to a warp's keys, and the gradients of their scores,
// transposed, to `scores`. q, dout: the rows of the queries; k, v: those of the keys.
template <class T, int D>
__device__ __forceinline__ void add_queries(KeyGradients<D>& sums, const T* k, const T* v, const T* q,
                                            const T* dout, T* scores, const QueryScalars& scalars,
                                            const Head<T, D>& head, int key_tile, int query_tile) {
  constexpr int KT = kKeyTiles<D>, QT = kQueryTiles<D>;
  const float factor = head.shape.scale * kLog2E;
  const int lane = threadIdx.x % kWarpSize;
  Accumulator p[KT][QT] = {}, ds[KT][QT] = {};
  multiply_rows<T, D>(p, k, q);
  multiply_rows<T, D>(ds, v, dout);
#pragma unroll
  for (int n = 0; n < QT; ++n) {
    const int first = (query_tile + n) * kTile;
    LeftFragment weights[KT], gradients[KT];
#pragma unroll
    for (int t = 0; t < KT; ++t) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float lse = scalars.lse[first + column_in_tile(lane, i)];
        p[t][n].values[i] = exp2_approximated(p[t][n].values[i] * factor - lse);
      }
      if (head.is_masked(query_tile + n, key_tile + t)) {
        mask_weights(p[t][n], head, query_tile + n, key_tile + t);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float delta = scalars.delta[first + column_in_tile(lane, i)];
        ds[t][n].values[i] = p[t][n].values[i] * (ds[t][n].values[i] - delta);
      }
      weights[t] = as_left<T>(p[t][n]);
      gradients[t] = as_left<T>(ds[t][n]);
      store_left(gradients[t], scores + t * kTile * kScoreRow + n * kTile, kScoreRow);
    }
    add_products<T, D>(sums.dv, weights, dout + n * kTileElements<D>);
    add_products<T, D>(sums.dk, gradients, q + n * kTileElements<D>);
  }
}

// A round's keys and values, and a stage's queries with dout, on their way into shared memory.
template <class T, int D>
__device__ __forceinline__ void load_keys(const Head<T, D>& head, const RopeAttentionBackward& params,
                                          int round) {
  const BackwardMemory<T, D> memory(head.plan);
  const int count = head.plan.warps * kKeyTiles<D> * kTile;
  head.copy(memory.k, params.k, Side::Keys, Threads::of_block(), round * kTile, count);
  head.copy(memory.v, params.v, Side::Keys, Threads::of_block(), round * kTile, count);
}
template <class T, int D>
__device__ __forceinline__ void copy_stage(const Head<T, D>& head, const RopeAttentionBackward& params,
                                           int stage) {
  const BackwardMemory<T, D> memory(head.plan);
  const Threads block = Threads::of_block();
  head.copy(memory.queries(stage), params.q, Side::Queries, block, stage * kTile, kStageRows);
  head.copy(memory.dout(stage), params.dout, Side::Queries, block, stage * kTile, kStageRows);
}

template <class T, int D>
__device__ __forceinline__ void rotate_stage(const Head<T, D>& head, int stage) {
  T* const rows = BackwardMemory<T, D>(head.plan).queries(stage);
  head.rotate(rows, Threads::of_block(), stage * kTile, kStageRows);
}

// What a stage gives to a warp's keys.
template <class T, int D>
__device__ __forceinline__ void add_stage(KeyGradients<D>& sums, const Head<T, D>& head, int warp,
                                          int key_tile, int stage) {
  using Memory = BackwardMemory<T, D>;
  const Memory memory(head.plan);
  const int stop = min(stage + kStageTiles, head.tiles());
#pragma unroll 1
  for (int query = stage; query < stop; query += kQueryTiles<D>) {
    if (query + kQueryTiles<D> + head.plan.sight.reach <= key_tile) continue;
    const int row = (query - stage) * kTileElements<D>;
    add_queries(sums, memory.k + warp * Memory::kOwnElements, memory.v + warp * Memory::kOwnElements,
                memory.queries(stage) + row, memory.dout(stage) + row,
                memory.scores + warp * Memory::kScoreElements + (query - stage) * kTile, memory.scalars, head,
                key_tile, query);
  }
}

// dq of a stage, from tile `stage` on, of the keys of a round: a warp makes 16 columns of all its rows.
template <class T, int D>
__device__ __forceinline__ void multiply_scores(const Head<T, D>& head, int warp, int stage, int first_key,
                                                int keys) {
  const BackwardMemory<T, D> memory(head.plan);
  const int tiles = min(kStageTiles, head.tiles() - stage);
#pragma unroll 1
  for (int d = warp; d < D / kTile; d += head.plan.warps) {
    Accumulator dq[kStageTiles] = {};
#pragma unroll 1
    for (int key = 0; key < keys; ++key) {
      // Of keys that queries don't see nobody has written any.
      const int seen = first_key + key - stage - head.plan.sight.reach;
      const RightFragment right = load_right(memory.k + key * kTileElements<D> + d * kTile, kRow<D>);
#pragma unroll
      for (int m = 0; m < kStageTiles; ++m) {
        if (m < seen || m >= tiles) continue;
        const T* const scores = memory.scores + key * kTile * kScoreRow + m * kTile;
        multiply_add<T>(dq[m], load_left_transposed(scores, kScoreRow), right);
      }
    }
#pragma unroll
    for (int m = 0; m < kStageTiles; ++m) {
      if (m >= tiles) continue;
      store_tile(dq[m], head.shape.scale, memory.dq + m * kTileElements<D> + d * kTile, kRow<D>);
    }
  }
}

// E floats of a row in shared memory. Of eight lanes in a row the first four take the first half first: so
// they ask for different banks.
template <int E>
__device__ __forceinline__ void load_sums(const float* row, int i, float (&values)[E]) {
  if constexpr (E == 1) {
    values[0] = row[i];
  } else {
    const int first = i / E / 4 % 2 * (E / 2);
    float a[E / 2], b[E / 2];
    load_floats(row + i + first, a);
    load_floats(row + i + E / 2 - first, b);
#pragma unroll
    for (int n = 0; n < E / 2; ++n) {
      values[n] = first == 0 ? a[n] : b[n];
      values[n + E / 2] = first == 0 ? b[n] : a[n];
    }
  }
}

// Leaves the sums of dq of a stage, with those of earlier rounds, in `workspace`, [slots, D], for the next.
template <class T, int D>
__device__ __forceinline__ void keep_queries(const Head<T, D>& head, float* workspace, int stage,
                                             bool is_first) {
  constexpr int E = kWide;
  const float* const rows = BackwardMemory<T, D>(head.plan).dq;
  head.template for_each_chunk<E>(Threads::of_block(), stage * kTile, kStageRows,
                                  [&](int token, int row, int i) {
                                    if (!head.slots().has(token)) return;
                                    float sums[E], before[E] = {};
                                    float* const kept = workspace + (stage * kTile + row) * D + i;
                                    load_sums(rows + row * kRow<D>, i, sums);
                                    if (!is_first) load_floats(kept, before);
#pragma unroll
                                    for (int n = 0; n < E; ++n) sums[n] += before[n];
                                    store_floats(kept, sums);
                                  });
}

// Stores dq of a stage, its sums with those that earlier rounds have left in `workspace`, if there were any.
template <class T, int D>
__device__ __forceinline__ void store_queries(const Head<T, D>& head, const float* workspace, void* dq,
                                              int stage, bool is_first) {
  const float* const rows = BackwardMemory<T, D>(head.plan).dq;
  head.store(dq, Side::Queries, Threads::of_block(), stage * kTile, kStageRows,
             [&](int token, int row, int i, auto& values) {
               const auto load = [&](int from, auto& sums) {
                 constexpr int E = sizeof(sums) / sizeof(float);
                 load_sums(rows + row * kRow<D>, from, sums);
                 if (is_first) return;
                 float before[E];
                 load_floats(workspace + (stage * kTile + row) * D + from, before);
#pragma unroll
                 for (int n = 0; n < E; ++n) sums[n] += before[n];
               };
               load(i, values);
               head.rotate_back(values, token, i, load);
             });
}

// A warp's sums for 16 keys, by way of its own floats in shared memory.
template <class T, int D>
__device__ __forceinline__ void store_keys(const Head<T, D>& head, const KeyGradients<D>& sums, int t,
                                           float* rows, const RopeAttentionBackward& params, int tile) {
  const Threads warp = Threads::of_warp();
  const float scale = head.shape.scale;
#pragma unroll
  for (int d = 0; d < D / kTile; ++d) store_tile(sums.dk[t][d], scale, rows + d * kTile, kRow<D>);
  __syncwarp();
  head.store(params.dk, Side::Keys, warp, tile * kTile, kTile, [&](int token, int row, int i, auto& values) {
    const auto load = [&](int from, auto& floats) { load_sums(rows + row * kRow<D>, from, floats); };
    load(i, values);
    head.rotate_back(values, token, i, load);
  });
  __syncwarp();
#pragma unroll
  for (int d = 0; d < D / kTile; ++d) store_tile(sums.dv[t][d], 1.0f, rows + d * kTile, kRow<D>);
  __syncwarp();
  head.store(params.dv, Side::Keys, warp, tile * kTile, kTile,
             [&](int, int row, int i, auto& values) { load_sums(rows + row * kRow<D>, i, values); });
  __syncwarp();
}

template <class T, int D>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize)
    rope_attention_backward_kernel(const __grid_constant__ RopeAttentionBackward params,
                                   const __grid_constant__ AttentionPlan plan, float* workspace) {
  constexpr int KT = kKeyTiles<D>;
  using Memory = BackwardMemory<T, D>;
  const AttentionShape& shape = params.shape;
  const Head<T, D> head(shape, params.tables, plan);
  const Threads block = Threads::of_block();
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, round_tiles = plan.warps * KT;
  // The first queries that see keys of a round; of the first one, those that see none, too.
  const auto first_stage = [&](int round) {
    return round == 0 ? 0 : max(round - plan.sight.reach, 0) / kStageTiles * kStageTiles;
  };

  if (head.tiles() == 0 && head.key_tiles() == 0) return;
  compute_scalars(Memory(plan).scalars, params, head);
  int round = 0;
  do {  // Once at least: without keys dq is 0.
    const int key_tile = round + warp * KT, keys = min(round_tiles, head.key_tiles() - round);
    KeyGradients<D> sums;
    __syncthreads();
    load_keys(head, params, round);
    copy_stage(head, params, first_stage(round));
    wait_for_copies();
    __syncthreads();
    head.rotate(Memory(plan).k, block, round * kTile, keys * kTile);
    rotate_stage(head, first_stage(round));
    __syncthreads();
    for (int stage = first_stage(round); stage < head.tiles(); stage += kStageTiles) {
      const int next = stage + kStageTiles;
      if (next < head.tiles()) copy_stage(head, params, next);
      if (key_tile < head.key_tiles()) add_stage(sums, head, warp, key_tile, stage);
      __syncthreads();  // dS is there.
      multiply_scores(head, warp, stage, round, keys);
      wait_for_copies();
      __syncthreads();  // So are dq and the next stage.
      if (next < head.tiles()) rotate_stage(head, next);
      // A later round adds to dq of these queries, too.
      const int next_round = round + round_tiles;
      const bool is_kept = next_round < head.key_tiles() && first_stage(next_round) <= stage;
      float* const kept = workspace + int64_t{blockIdx.x} * plan.tiles * kTile * D;
      if (!is_kept) {
        store_queries(head, kept, params.dq, stage, round == 0);
      } else {
        keep_queries(head, kept, stage, round == 0);
      }
      __syncthreads();
    }
    float* const own = reinterpret_cast<float*>(Memory(plan).k) + warp * kTileElements<D>;
#pragma unroll
    for (int t = 0; t < KT; ++t) {
      if (key_tile + t >= head.key_tiles()) continue;
      store_keys(head, sums, t, own, params, key_tile + t);
    }
  } while ((round += round_tiles) < head.key_tiles());
}

// A block has all keys of a head in as few rounds as registers and shared memory allow.
template <class T, int D>
Error plan_backward(const AttentionShape& shape, AttentionPlan& plan) {
  plan = begin_plan(shape);
  const size_t limit = max_shared_memory();
  const int units = ceil_div(plan.key_tiles, kKeyTiles<D>);
  for (int most = kMaxWarps; most > 0; --most) {
    plan.warps = warps_for(units, most);
    if (BackwardMemory<T, D>::bytes(plan) <= limit) return nullptr;
  }
  return "too little shared memory for so many tokens";
}

}  // namespace

Error rope_attention_backward(const RopeAttentionBackward& params, Scratch& scratch, Stream stream) {
  const AttentionShape& shape = params.shape;
  if (const Error reason =
          unserved(shape, params.tables, {params.q, params.k, params.v, params.dout, params.out}))
    return reason;
  if (is_empty(shape, std::max(shape.tokens, shape.keys))) return nullptr;
  return with_attention_types(shape, [&](auto element, auto D) {
    using T = decltype(element);
    AttentionPlan plan;
    if (const Error error = plan_backward<T, D()>(shape, plan)) return error;
    plan.wide = is_wide(shape, params.tables, {params.q, params.k, params.v, params.dout, params.out},
                        {params.dq, params.dk, params.dv});
    const dim3 grid = {static_cast<unsigned>(shape.batch * shape.heads), 1, 1};
    const dim3 block = {static_cast<unsigned>(plan.warps * kWarpSize), 1, 1};
    const size_t bytes = BackwardMemory<T, D()>::bytes(plan);
    float* workspace = nullptr;
    if (plan.warps * kKeyTiles<D()> < plan.key_tiles) {
      const int64_t floats = shape.batch * shape.heads * plan.tiles * kTile * D();
      if (const Error error = scratch.allocate(&workspace, floats)) return error;
    }
    return launch_with_memory(rope_attention_backward_kernel<T, D()>, grid, block, bytes, stream, params,
                              plan, workspace);
  });
}

}  // namespace evakernels::cuda
