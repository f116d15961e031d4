// Forward attention with rotary embedding: out = softmax(scale * rope(q) rope(k)^T) v.
//
// Grid: one or several blocks per (batch, head). Block: each warp owns 16 or 32 query rows in registers and
// loops over key/value tiles in shared memory. Tiles: of the whole head, or double-buffered with cp.async.
// Plan: by shared memory and the GPU's resident blocks (plan_forward).
// Shared memory: padded rows of 2 (D + 8) bytes for k and v (of a head or of two stages) and for each warp's
// own rows, which hold q first and out at the end.
// Traffic: q, k, v, out once, plus k and v once per extra block of a head. Tables come from the L2 cache.
#include <cfloat>

#include "cuda/attention_plan.h"
#include "cuda/attention_tiles.cuh"
#include "cuda/online_softmax.cuh"

namespace evakernels::cuda {
namespace {

// Query tiles per warp. With two, each load of keys and values feeds twice as many mma; wider heads lack the
// registers.
template <int D>
constexpr int kQueryTiles = D <= 64 ? 2 : 1;
// Warps per SM that registers allow: 12 with 168 per thread or 8 with 255. Blocks share them, so that one
// computes while another loads.
template <int D>
constexpr int kMaxWarps = D == 96 || D == 112 ? 12 : 8;
// Key tiles per step of a warp.
template <int D>
constexpr int kKeyTiles = D <= 112 ? 2 : 4;
// Key tiles per stage where keys aren't resident.
constexpr int kStageTiles = 4;

// Sets masked scores to -inf.
template <int KT, class T, int D, int MT>
__device__ __forceinline__ void mask_scores(Accumulator (&scores)[MT][KT], const Head<T, D>& head,
                                            int query_tile, int key_tile) {
  unsigned lane = threadIdx.x % kWarpSize;
  optimization_barrier(lane);  // Keeps the index arithmetic out of unmasked tiles.
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int t = 0; t < KT; ++t) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int query = (query_tile + m) * kTile + row_in_tile(lane, i);
        const int key = (key_tile + t) * kTile + column_in_tile(lane, i);
        if (!head.is_visible(query, key)) scores[m][t].values[i] = -INFINITY;
      }
    }
  }
}

// One step of a warp: scores, online softmax and weighted values of KT key tiles from `key_tile` on.
template <int KT, class T, int D, int MT>
__device__ __forceinline__ void attend(OnlineSoftmax<D> (&softmax)[MT], const FragmentA (&q)[MT][D / kTile],
                                       const T* k, const T* v, const Head<T, D>& head, int query_tile,
                                       int key_tile, float factor) {
  Accumulator scores[MT][KT] = {};
#pragma unroll
  for (int d = 0; d < D / kTile; ++d) {
#pragma unroll
    for (int t = 0; t < KT; ++t) {
      const FragmentB keys = load_b_transposed(k + t * kTileElements<D> + d * kTile, kRow<D>);
#pragma unroll
      for (int m = 0; m < MT; ++m) mma<T>(scores[m][t], q[m][d], keys);
    }
  }
  if (head.needs_mask(query_tile, key_tile, KT)) mask_scores(scores, head, query_tile, key_tile);
#pragma unroll
  for (int m = 0; m < MT; ++m) softmax[m].update(scores[m], factor);
#pragma unroll
  for (int t = 0; t < KT; ++t) {
    FragmentA weights[MT];
#pragma unroll
    for (int m = 0; m < MT; ++m) weights[m] = as_fragment_a<T>(scores[m][t]);
#pragma unroll
    for (int d = 0; d < D / kTile; ++d) {
      const FragmentB values = load_b(v + t * kTileElements<D> + d * kTile, kRow<D>);
#pragma unroll
      for (int m = 0; m < MT; ++m) mma<T>(softmax[m].acc[d], weights[m], values);
    }
  }
}

// Stores out and lse of 16 queries, out through the warp's rows in shared memory.
template <class T, int D>
__device__ __forceinline__ void store_results(OnlineSoftmax<D>& softmax, const Head<T, D>& head, T* rows,
                                              const RopeAttentionForward& params, int tile) {
  const Threads warp = Threads::of_warp();
  float row_lse[2];
  softmax.finish(row_lse);
  float* const lse = params.lse + head.first_number();
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int token = tile * kTile + static_cast<int>(warp.rank / 4) + row * 8 - head.padded_rows().offset;
    if (warp.rank % 4 == 0 && head.padded_rows().contains(token)) lse[token] = row_lse[row];
  }
#pragma unroll
  for (int d = 0; d < D / kTile; ++d) store_tile(softmax.acc[d], 1.0f, rows + d * kTile, kRow<D>);
  __syncwarp();
  head.store(params.out, Side::Queries, warp, tile * kTile, kTile,
             [&](int, int row, int i, auto& values) { load_floats(rows + row * kRow<D> + i, values); });
}

// Waits for a warp's queries in shared memory, rotates them and loads them into registers.
template <class T, int D, int MT>
__device__ __forceinline__ void load_queries(FragmentA (&q)[MT][D / kTile], T* rows, const Head<T, D>& head,
                                             int tile) {
  wait_for_copies();
  __syncwarp();
  head.rotate(rows, Threads::of_warp(), tile * kTile, MT * kTile);
  __syncwarp();
  // The softmax takes the maximum before scaling: a negative scale moves into q.
  const uint32_t sign = head.shape.scale < 0.0f ? 0x80008000u : 0u;
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int d = 0; d < D / kTile; ++d) {
      q[m][d] = load_a(rows + m * kTileElements<D> + d * kTile, kRow<D>);
#pragma unroll
      for (uint32_t& word : q[m][d].words) word ^= sign;
    }
  }
  __syncwarp();  // Before results overwrite the rows: ldmatrix reads are weak in PTX.
}

template <class T, int D>
__global__ void __launch_bounds__(kMaxWarps<D>* kWarpSize)
    rope_attention_forward_kernel(const __grid_constant__ RopeAttentionForward params,
                                  const __grid_constant__ AttentionPlan plan) {
  constexpr int MT = kQueryTiles<D>, KT = kKeyTiles<D>;
  const AttentionShape& shape = params.shape;
  const Head<T, D> head(shape, params.tables, plan);
  const Threads block = Threads::of_block();
  const float factor = fmaxf(fabsf(shape.scale) * kLog2E, FLT_MIN);
  const bool resident = plan.stage_tiles == plan.key_tiles;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int stage_elements = plan.stage_tiles * kTileElements<D>;
  T* const stages = dynamic_shared_memory<T>();
  T* const own = stages + (resident ? 2 : 4) * stage_elements + warp * MT * kTileElements<D>;
  const auto keys_of = [&](int stage) {
    return stages + (stage / plan.stage_tiles & 1) * 2 * stage_elements;
  };
  const auto copy_stage = [&](int stage) {
    const int first = stage * kTile, count = min(plan.stage_tiles, head.key_tiles() - stage) * kTile;
    head.copy(keys_of(stage), params.k, Side::Keys, block, first, count);
    head.copy(keys_of(stage) + stage_elements, params.v, Side::Keys, block, first, count);
  };

  const int begin = static_cast<int>(blockIdx.x % static_cast<unsigned>(plan.blocks)) * plan.block_tiles;
  const int end = min(begin + plan.block_tiles, head.tiles());
  if (begin >= end) return;
  copy_stage(0);
  for (int round = begin; round < end; round += plan.warps * MT) {
    const int tile = round + warp * MT;
    const bool has_queries = tile < end;
    const int key_tiles = min(round + plan.warps * MT + plan.mask.max_tile, head.key_tiles());
    FragmentA q[MT][D / kTile];
    OnlineSoftmax<D> softmax[MT];
    if (has_queries) head.copy(own, params.q, Side::Queries, Threads::of_warp(), tile * kTile, MT * kTile);
    int stage = 0;
    do {  // At least once: copies in flight are awaited even if the queries see no key.
      T* const k = keys_of(stage);
      if (round == begin) {
        wait_for_copies();  // #stage-copies
        __syncthreads();    // The stage has arrived, and nobody reads the one before it. #stage
        head.rotate(k, block, stage * kTile, min(plan.stage_tiles, head.key_tiles() - stage) * kTile);
        __syncthreads();
      }
      if (has_queries && stage == 0) load_queries(q, own, head, tile);
      if (stage + plan.stage_tiles < key_tiles) copy_stage(stage + plan.stage_tiles);
      if (!has_queries) continue;
      int key = stage;
      const int stop = min(min(key_tiles, tile + MT + plan.mask.max_tile), stage + plan.stage_tiles);
      const T* keys = k;
#pragma unroll 1
      for (; key + KT <= stop; key += KT, keys += KT * kTileElements<D>) {
        attend<KT>(softmax, q, keys, keys + stage_elements, head, tile, key, factor);
      }
#pragma unroll 1
      for (; key < stop; ++key, keys += kTileElements<D>) {
        attend<1>(softmax, q, keys, keys + stage_elements, head, tile, key, factor);
      }
    } while ((stage += plan.stage_tiles) < key_tiles);
    if (!has_queries) continue;
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      store_results(softmax[m], head, own + m * kTileElements<D>, params, tile + m);
    }
    __syncwarp();
  }
}

// Bytes of shared memory.
template <int D>
struct ForwardMemory {
  static constexpr size_t kTileBytes = kTileElements<D> * sizeof(BFloat16);

  static size_t of_block(const AttentionPlan& plan) {
    const int buffers = plan.stage_tiles == plan.key_tiles ? 1 : 2;
    return kTileBytes * (2 * buffers * plan.stage_tiles + plan.warps * kQueryTiles<D>);
  }
};

// All keys stay in shared memory if two blocks of half the warps then fit a multiprocessor. Otherwise a block
// has as many warps as fit, and each takes queries once.
template <int D, class Kernel>
Error plan_forward(Kernel* kernel, const AttentionShape& shape, AttentionPlan& plan) {
  constexpr int MT = kQueryTiles<D>;
  plan = begin_plan(shape);
  const int warp_tiles = ceil_div(plan.tiles, MT);
  int64_t resident =
      fit_warps(plan, std::min(kMaxWarps<D> / 2, warp_tiles), kernel, ForwardMemory<D>::of_block);
  if (resident > 0 && 2 * ForwardMemory<D>::of_block(plan) <= max_shared_memory()) {
    share_tiles(plan, shape, resident, plan.tiles, MT);
    return nullptr;
  }
  plan.stage_tiles = std::min(kStageTiles, plan.key_tiles);
  resident = fit_warps(plan, std::min(kMaxWarps<D>, warp_tiles), kernel, ForwardMemory<D>::of_block);
  if (resident == 0) return kNoPlan;
  plan.block_tiles = plan.warps * MT;
  plan.blocks = ceil_div(plan.tiles, plan.block_tiles);
  return nullptr;
}

}  // namespace

Error rope_attention_forward(const RopeAttentionForward& params, Stream stream) {
  const AttentionShape& shape = params.shape;
  if (is_empty(shape, shape.tokens)) return nullptr;
  return with_attention_types(shape, [&](auto element, auto D) {
    using T = decltype(element);
    AttentionPlan plan;
    void (*const kernel)(RopeAttentionForward, AttentionPlan) = rope_attention_forward_kernel<T, D()>;
    if (const Error error = plan_forward<D()>(kernel, shape, plan)) return error;
    plan.wide = is_wide(shape, params.tables, {params.q, params.k, params.v}, {params.out});
    const dim3 grid = {static_cast<unsigned>(shape.batch * shape.heads * plan.blocks), 1, 1};
    const dim3 block = {static_cast<unsigned>(plan.warps * kWarpSize), 1, 1};
    return launch_with_memory(kernel, grid, block, ForwardMemory<D()>::of_block(plan), stream, params, plan);
  });
}

}  // namespace evakernels::cuda
