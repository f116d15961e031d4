// Backward attention with rotary embedding: dq, dk and dv. Weights are recomputed from the log-sum-exps.
//
// Grid: one block per (batch, head), or several that share the keys of a head if there are too few heads for
// the GPU. A second kernel then adds the dq of these blocks, which are in the workspace.
// Block: each warp owns 16 or 32 keys and accumulates their dk and dv in registers. All warps loop over
// stages of 32 queries, double-buffered with cp.async:
//   S^T = k q^T,  P = exp(S - lse),  dP^T = v dout^T,  dS = P (dP - dPsum),  dv += P^T dout,  dk += dS^T q
// dS goes to shared memory in 16 bits, from where the warps compute dq = dS k together: five matmuls.
// Rounds: more keys than the warps own take several rounds; between them dq is accumulated in a float32
// workspace. The order of every sum is fixed: no atomics.
// Plan: by shared memory and the GPU's resident blocks (plan_backward).
// Shared memory: padded rows of 2 (D + 8) bytes for k, v and two stages of q and dout, 80 bytes per key for
// dS, 32 rows of floats for dq, and lse and dPsum of all queries. Traffic: 8 B N H D elements; per further
// round or block q and dout again, and 8 B N H D bytes of the workspace; per block out.
#include "cuda/attention_plan.h"
#include "cuda/attention_tiles.cuh"

namespace evakernels::cuda {
namespace {

// Key tiles that a warp owns, and query tiles per step. Two of either, so that each load of the other feeds
// twice as many mma; two of both would spill.
template <int D>
constexpr int kKeyTiles = D <= 64 ? 2 : 1;
template <int D>
constexpr int kQueryTiles = D <= 64 || D > 112 ? 1 : 2;
constexpr int kStageTiles = 2;
constexpr int kStageRows = kStageTiles * kTile;
// Padded query rows, rounded up to whole stages.
__host__ __device__ __forceinline__ int stage_rows(int tiles) {
  return (tiles + kStageTiles - 1) / kStageTiles * kStageRows;
}
// With 255 registers per thread.
constexpr int kMaxWarps = 8;
// Row stride of dS^T: a key's scores for the queries of a stage, padded by 16 bytes.
constexpr int kScoreRow = kStageRows + kWide;

// The forward kernels' plan has no such member, which would make one of them spill.
struct BackwardPlan : AttentionPlan {
  int64_t workspace_rows;  // of dq per head and block, of all samples
};

// A warp's accumulators.
template <int D>
struct KeyGradients {
  Accumulator dk[kKeyTiles<D>][D / kTile] = {};  // rotated and unscaled
  Accumulator dv[kKeyTiles<D>][D / kTile] = {};
};

// Per padded query row: the log-sum-exp to base 2, and dPsum = sum(dout * out) over the channels (Dao et al.
// 2022).
struct SoftmaxStats {
  float* lse;
  float* dPsum;
};

// A block's shared memory.
template <class T, int D>
struct BackwardMemory {
  static constexpr int kOwnElements = kKeyTiles<D> * kTileElements<D>;  // per warp
  static constexpr int kStageElements = kStageTiles * kTileElements<D>;
  static constexpr int kScoreElements = kKeyTiles<D> * kTile * kScoreRow;

  T* k;  // of all warps; at the end dk and dv in float32
  T* v;
  T* stages;  // two stages of q, each followed by dout
  T* scores;  // dS^T
  float* dq;  // of one stage
  SoftmaxStats stats;

  // Constructed where it is used: addresses that live through a loop would take registers from the matmuls.
  __device__ __forceinline__ explicit BackwardMemory(const AttentionPlan& plan) {
    unsigned warps = static_cast<unsigned>(plan.warps);
    optimization_barrier(warps);
    k = dynamic_shared_memory<T>();
    v = k + warps * kOwnElements;
    stages = v + warps * kOwnElements;
    scores = stages + 4 * kStageElements;
    dq = reinterpret_cast<float*>(scores + warps * kScoreElements);
    stats.lse = dq + kStageElements;
    stats.dPsum = stats.lse + stage_rows(plan.tiles);
  }

  __device__ __forceinline__ T* queries(int stage) const {
    return stages + (stage / kStageTiles & 1) * 2 * kStageElements;  // #stages
  }
  __device__ __forceinline__ T* dout(int stage) const { return queries(stage) + kStageElements; }

  static size_t bytes(const AttentionPlan& plan) {
    const int warp = 2 * kOwnElements + kScoreElements;
    return (plan.warps * warp + 4 * kStageElements) * sizeof(T) +
           (kStageElements + 2 * stage_rows(plan.tiles)) * sizeof(float);
  }
};

// Lanes that share a row of dout and out, so that they read whole sectors.
constexpr int kLanesOfRow = 8;

// The share of lane `part` in the dot product of a row.
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
__device__ __forceinline__ void compute_dPsum(const SoftmaxStats& stats, const RopeAttentionBackward& params,
                                              const Head<T, D>& head) {
  const float* const lse = params.lse + head.first_number();
  const auto dout = head.token_rows(params.dout), out = head.token_rows(params.out);
  const int thread = static_cast<int>(threadIdx.x), part = thread % kLanesOfRow;
  const int rows = static_cast<int>(blockDim.x) / kLanesOfRow;
  // A warp processes four rows at a time and a tile has sixteen, so all of its lanes loop equally often.
  for (int row = thread / kLanesOfRow; row < stage_rows(head.tiles()); row += rows) {
    const int token = row - head.padded_rows().offset;
    const bool exists = head.padded_rows().contains(token);
    float dPsum = 0.0f;
    if (exists) {
      const T *const a = dout.at(token), *const b = out.at(token);
      dPsum = head.plan.wide ? part_of_dot<T, kWide>(a, b, head.width(), part)
                             : part_of_dot<T, 1>(a, b, head.width(), part);
    }
#pragma unroll
    for (int distance = kLanesOfRow / 2; distance > 0; distance /= 2) {
      dPsum += __shfl_xor_sync(kFullMask, dPsum, distance);
    }
    if (part == 0) {
      stats.dPsum[row] = dPsum;
      // Padding rows get weights of 0.
      stats.lse[row] = exists ? lse[token] * kLog2E : INFINITY;
    }
    __syncwarp();  // Keeps the lanes of a warp on the same rows, so that they read whole sectors. #dPsum
  }
}

// products[m][n] = own rows * other rows^T.
template <class T, int D, int M, int N>
__device__ __forceinline__ void multiply_rows(Accumulator (&products)[M][N], const T* own, const T* other) {
#pragma unroll 2  // A full unroll would spill.
  for (int d = 0; d < D; d += kTile) {
    FragmentA left[M];
#pragma unroll
    for (int m = 0; m < M; ++m) left[m] = load_a(own + m * kTileElements<D> + d, kRow<D>);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const FragmentB right = load_b_transposed(other + n * kTileElements<D> + d, kRow<D>);
#pragma unroll
      for (int m = 0; m < M; ++m) mma<T>(products[m][n], left[m], right);
    }
  }
}

// sums[m] += left[m] * rows.
template <class T, int D, int M>
__device__ __forceinline__ void add_products(Accumulator (&sums)[M][D / kTile], const FragmentA (&left)[M],
                                             const T* rows) {
#pragma unroll
  for (int d = 0; d < D / kTile; ++d) {
    const FragmentB right = load_b(rows + d * kTile, kRow<D>);
#pragma unroll
    for (int m = 0; m < M; ++m) mma<T>(sums[m][d], left[m], right);
  }
}

// Sets masked weights of a transposed tile to 0.
template <class T, int D>
__device__ __forceinline__ void mask_weights(Accumulator& weights, const Head<T, D>& head, int query_tile,
                                             int key_tile) {
  // Keeps the index arithmetic out of unmasked tiles.
  unsigned lane = threadIdx.x % kWarpSize;
  optimization_barrier(lane);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int query = query_tile * kTile + column_in_tile(lane, i);
    const int key = key_tile * kTile + row_in_tile(lane, i);
    if (!head.is_visible(query, key)) weights.values[i] = 0.0f;
  }
}

// Adds the share of kQueryTiles query tiles to a warp's dk and dv, and stores dS^T in `scores`.
template <class T, int D>
__device__ __forceinline__ void add_queries(KeyGradients<D>& sums, const T* k, const T* v, const T* q,
                                            const T* dout, T* scores, const SoftmaxStats& stats,
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
    FragmentA weights[KT], gradients[KT];
#pragma unroll
    for (int t = 0; t < KT; ++t) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float lse = stats.lse[first + column_in_tile(lane, i)];
        p[t][n].values[i] = exp2_approx(p[t][n].values[i] * factor - lse);
      }
      if (head.needs_mask(query_tile + n, key_tile + t)) {
        mask_weights(p[t][n], head, query_tile + n, key_tile + t);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float dPsum = stats.dPsum[first + column_in_tile(lane, i)];
        ds[t][n].values[i] = p[t][n].values[i] * (ds[t][n].values[i] - dPsum);
      }
      weights[t] = as_fragment_a<T>(p[t][n]);
      gradients[t] = as_fragment_a<T>(ds[t][n]);
      store_a(gradients[t], scores + t * kTile * kScoreRow + n * kTile, kScoreRow);
    }
    add_products<T, D>(sums.dv, weights, dout + n * kTileElements<D>);
    add_products<T, D>(sums.dk, gradients, q + n * kTileElements<D>);
  }
}

// Start the copies of a round's k and v, and of a stage's q and dout, into shared memory.
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

// Adds a stage's share to a warp's dk and dv.
template <class T, int D>
__device__ __forceinline__ void add_stage(KeyGradients<D>& sums, const Head<T, D>& head, int warp,
                                          int key_tile, int stage) {
  using Memory = BackwardMemory<T, D>;
  const Memory memory(head.plan);
  const int stop = min(stage + kStageTiles, head.tiles());
#pragma unroll 1
  for (int query = stage; query < stop; query += kQueryTiles<D>) {
    if (query + kQueryTiles<D> + head.plan.mask.max_tile <= key_tile) continue;
    const int row = (query - stage) * kTileElements<D>;
    add_queries(sums, memory.k + warp * Memory::kOwnElements, memory.v + warp * Memory::kOwnElements,
                memory.queries(stage) + row, memory.dout(stage) + row,
                memory.scores + warp * Memory::kScoreElements + (query - stage) * kTile, memory.stats, head,
                key_tile, query);
  }
}

// dq of a stage from the keys of a round; each warp computes 16 columns of all rows.
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
      // dS of fully masked tiles is never written.
      const int seen = first_key + key - stage - head.plan.mask.max_tile;
      const FragmentB right = load_b(memory.k + key * kTileElements<D> + d * kTile, kRow<D>);
#pragma unroll
      for (int m = 0; m < kStageTiles; ++m) {
        if (m < seen || m >= tiles) continue;
        const T* const scores = memory.scores + key * kTile * kScoreRow + m * kTile;
        mma<T>(dq[m], load_a_transposed(scores, kScoreRow), right);
      }
    }
#pragma unroll
    for (int m = 0; m < kStageTiles; ++m) {
      if (m >= tiles) continue;
      store_tile(dq[m], head.shape.scale, memory.dq + m * kTileElements<D> + d * kTile, kRow<D>);
    }
  }
}

// Loads E floats of a row in shared memory. Half of the lanes load their second half first, which avoids bank
// conflicts.
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

// Accumulates dq of a stage in `workspace`, [padded rows, D], for the next round or rope_attention_sum_dq.
template <class T, int D>
__device__ __forceinline__ void keep_queries(const Head<T, D>& head, float* workspace, int stage,
                                             bool is_first) {
  constexpr int E = kWide;
  const float* const rows = BackwardMemory<T, D>(head.plan).dq;
  head.template for_each_chunk<E>(Threads::of_block(), stage * kTile, kStageRows,
                                  [&](int token, int row, int i) {
                                    if (!head.padded_rows().contains(token)) return;
                                    float sums[E], before[E] = {};
                                    float* const kept = workspace + (stage * kTile + row) * D + i;
                                    load_sums(rows + row * kRow<D>, i, sums);
                                    if (!is_first) load_floats(kept, before);
#pragma unroll
                                    for (int n = 0; n < E; ++n) sums[n] += before[n];
                                    store_floats(kept, sums);
                                  });
}

// Stores dq of a stage, added to the workspace unless this round is the first.
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

// Stores a warp's dk and dv of 16 keys through its floats in shared memory.
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
  __syncwarp();  // #dk-stored
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
                                   const __grid_constant__ BackwardPlan plan, float* workspace) {
  constexpr int KT = kKeyTiles<D>;
  using Memory = BackwardMemory<T, D>;
  const AttentionShape& shape = params.shape;
  const Head<T, D> head(shape, params.tables, plan);
  const Threads block = Threads::of_block();
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, round_tiles = plan.warps * KT;
  // The first stage that sees keys of a round; the first round includes queries that see none.
  const auto first_stage = [&](int round) {
    return round == 0 ? 0 : max(round - plan.mask.max_tile, 0) / kStageTiles * kStageTiles;
  };

  const int part = static_cast<int>(blockIdx.x % static_cast<unsigned>(plan.blocks));
  const int begin = part * plan.block_tiles, end = min(begin + plan.block_tiles, head.key_tiles());
  // A block without keys stores the dq of 0 if it is the head's only one.
  if (begin >= end && (begin > 0 || head.tiles() == 0)) return;
  compute_dPsum(Memory(plan).stats, params, head);
  int round = begin;
  do {
    const int key_tile = round + warp * KT, keys = min(round_tiles, end - round);
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
      if (key_tile < end) add_stage(sums, head, warp, key_tile, stage);
      __syncthreads();  // dS is complete. #dS
      multiply_scores(head, warp, stage, round, keys);
      wait_for_copies();
      __syncthreads();  // dq is complete, and the next stage has arrived.
      if (next < head.tiles()) rotate_stage(head, next);
      // Whether a later round, or another block, adds to dq of these queries.
      const int next_round = round + round_tiles;
      const bool is_kept = plan.blocks > 1 || (next_round < end && first_stage(next_round) <= stage);
      // #own-dq
      float* const kept = workspace + head.workspace_row(part, plan.blocks, plan.workspace_rows) * D;
      if (!is_kept) {
        store_queries(head, kept, params.dq, stage, round == begin);
      } else {
        keep_queries(head, kept, stage, round == begin);
      }
      __syncthreads();
    }
    float* const own = reinterpret_cast<float*>(Memory(plan).k) + warp * kTileElements<D>;
#pragma unroll
    for (int t = 0; t < KT; ++t) {
      if (key_tile + t >= end) continue;
      store_keys(head, sums, t, own, params, key_tile + t);
    }
  } while ((round += round_tiles) < end);
}

// Adds the dq of a head's blocks in order; each block of threads has a stage of queries. plan.blocks: stages
// per head. parts: blocks of the kernel above per head.
template <class T, int D>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize, 2)  // Without a minimum two instances would spill.
    rope_attention_sum_dq_kernel(const __grid_constant__ RopeAttentionBackward params,
                                 const __grid_constant__ BackwardPlan plan, const float* workspace,
                                 int parts) {
  const Head<T, D> head(params.shape, params.tables, plan);
  const int stage = static_cast<int>(blockIdx.x % static_cast<unsigned>(plan.blocks)) * kStageTiles;
  if (stage >= head.tiles()) return;
  // The first parts have the keys that these queries see; the others have written no dq of them.
  const int seen = min(stage + kStageTiles + plan.mask.max_tile, head.key_tiles());
  const int count = max(ceil_div(seen, plan.block_tiles), 1);  // #parts
  head.store(params.dq, Side::Queries, Threads::of_block(), stage * kTile, kStageRows,
             [&](int token, int row, int i, auto& values) {
               const auto load = [&](int from, auto& sums) {
                 constexpr int E = sizeof(sums) / sizeof(float);
#pragma unroll
                 for (int n = 0; n < E; ++n) sums[n] = 0.0f;
                 for (int part = 0; part < count; ++part) {
                   float share[E];
                   load_floats(
                       workspace +
                           (head.workspace_row(part, parts, plan.workspace_rows) + stage * kTile + row) * D +
                           from,
                       share);
#pragma unroll
                   for (int n = 0; n < E; ++n) sums[n] += share[n];
                 }
               };
               load(i, values);
               head.rotate_back(values, token, i, load);
             });
}

// As many warps as fit, and as many blocks per head as fill the GPU.
template <class T, int D, class Kernel>
Error plan_backward(Kernel* kernel, const AttentionShape& shape, AttentionPlan& plan) {
  constexpr int KT = kKeyTiles<D>;
  plan = begin_plan(shape);
  const int warps = std::min(kMaxWarps, ceil_div(plan.key_tiles, KT));
  const int64_t resident = fit_warps(plan, warps, kernel, BackwardMemory<T, D>::bytes);
  if (resident == 0) return kNoPlan;
  share_tiles(plan, shape, resident, plan.key_tiles, KT);
  return nullptr;
}

}  // namespace

Error rope_attention_backward(const RopeAttentionBackward& params, Scratch& scratch, Stream stream) {
  const AttentionShape& shape = params.shape;
  if (is_empty(shape, std::max(shape.tokens, shape.keys))) return nullptr;
  return with_attention_types(shape, [&](auto element, auto D) {
    using T = decltype(element);
    BackwardPlan plan;
    const auto kernel = rope_attention_backward_kernel<T, D()>;
    if (const Error error = plan_backward<T, D()>(kernel, shape, plan)) return error;
    plan.wide = is_wide(shape, params.tables, {params.q, params.k, params.v, params.dout, params.out},
                        {params.dq, params.dk, params.dv});
    plan.workspace_rows =
        shape.offsets.data ? shape.offsets.tokens + shape.batch * kTile : shape.batch * plan.tiles * kTile;
    const auto grid_of = [&](const AttentionPlan& of) {
      return dim3{static_cast<unsigned>(shape.batch * shape.heads * of.blocks), 1, 1};
    };
    const dim3 block = {static_cast<unsigned>(plan.warps * kWarpSize), 1, 1};
    const size_t bytes = BackwardMemory<T, D()>::bytes(plan);
    float* workspace = nullptr;
    if (plan.warps * kKeyTiles<D()> < plan.key_tiles) {
      const int64_t floats = shape.heads * plan.blocks * plan.workspace_rows * D();
      if (const Error error = scratch.allocate(&workspace, floats)) return error;
    }
    const Error error =
        launch_with_memory(kernel, grid_of(plan), block, bytes, stream, params, plan, workspace);
    if (error || plan.blocks == 1 || plan.tiles == 0) return error;
    BackwardPlan stages = plan;
    stages.blocks = ceil_div(plan.tiles, kStageTiles);
    return launch(rope_attention_sum_dq_kernel<T, D()>, grid_of(stages), kMaxWarps * kWarpSize, stream,
                  params, stages, workspace, plan.blocks);
  });
}

}  // namespace evakernels::cuda
