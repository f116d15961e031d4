// softmax(scale * rotate(q) rotate(k)^T) v. A block has a head, or a part of its queries; each of its warps
// has 16 or 32 queries at a time in registers and meets the tiles of keys and values, which lie in shared
// memory for all warps.
//
// Where they fit, the keys and values of a head stay there, and each warp takes queries until none are left.
// Else they come in stages, the next one while the warps multiply, and a head has as many blocks as its
// queries need, which run at the same time and find in the cache what the others have read. Heads that are
// too few to fill the GPU have several blocks, too.
//
// Bytes: q, k, v and out once each, 4 B N H D s; k and v once more for each further block of a head, and of
// the heads that share them. The tables (4 N D bytes a head, twice) come from the L2 cache.
//
// Each block of a head rotates the keys for itself. Rotated once by a kernel ahead, they would save 77 of 578
// ns a head at N = 1025, D = 64 and 50 of 469 at N = 577, D = 112, by the audit's counts for H100, and cost
// 77 of DRAM either way. Two blocks a multiprocessor at D = 112, N = 257, their keys in stages, would take a
// third more of everything for what one hides of the other (128 ns a head in place of 97).
//
// Memory plan. Of S slots of keys and W warps a block has, in shared memory, rows of 2 (D + 8) bytes: 2 S for
// k and v, or 4 of a stage's; and 16 or 32 W for the warps' own, which hold q on the way in and out on the
// way back. For H100 (227 KB a block, 228 KB a multiprocessor; resident: blocks of a multiprocessor at a
// time), with a token of prefix:
//
//    D     N   W    KB a block   blocks   resident        D     N   W    KB a block   blocks   resident
//   64    77   3    40           1        2             112   197   7   131           1        1
//   64   197   4    81           1        2             112   257   9   161           1        1
//   64   257   3    90           1        2             112   577  10   158 staged    4        1
//   64   577   7   198           1        1             112  1025  11   161 staged    6        1
//   64  1025   7   104 staged    5        1             128   257   6   170           1        1
//   96   257   9   140           1        1             128   577   8   170 staged    5        1
#include <cfloat>

#include "cuda/attention_plan.h"
#include "cuda/attention_tiles.cuh"
#include "cuda/online_softmax.cuh"

namespace evakernels::cuda {
namespace {

// Of 16 queries that a warp has at a time: with two, what it loads of keys and values feeds four products in
// place of two. Wider heads leave no registers for it.
template <int D>
constexpr int kQueryTiles = D <= 64 ? 2 : 1;
// What registers allow: 12 warps of a multiprocessor with 168 a thread, or 8 with 255. They are one block's,
// or half of them if two fit into shared memory: one computes while the other loads.
template <int D>
constexpr int kMaxWarps = D == 96 || D == 112 ? 12 : 8;
// Whose scores a warp has at a time.
template <int D>
constexpr int kKeyTiles = D <= 112 ? 2 : 4;
// More would only take shared memory.
constexpr int kMaxStageTiles = 8;

// Scores that don't count.
template <int KT, class T, int D, int MT>
__device__ __forceinline__ void mask_scores(Accumulator (&scores)[MT][KT], const Head<T, D>& head,
                                            int query_tile, int key_tile) {
  unsigned lane = threadIdx.x % kWarpSize;
  hide_origin(lane);  // Few tiles are masked: else the compiler would have all of them pay for it.
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int t = 0; t < KT; ++t) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int query = (query_tile + m) * kTile + row_in_tile(lane, i);
        const int key = (key_tile + t) * kTile + column_in_tile(lane, i);
        if (!head.counts(query, key)) scores[m][t].values[i] = -INFINITY;
      }
    }
  }
}

// Adds KT tiles of keys, from `key_tile` on, to the softmax of a warp's queries.
template <int KT, class T, int D, int MT>
__device__ __forceinline__ void attend(OnlineSoftmax<D> (&softmax)[MT],
                                       const LeftFragment (&q)[MT][D / kTile], const T* k, const T* v,
                                       const Head<T, D>& head, int query_tile, int key_tile, float factor) {
  Accumulator scores[MT][KT] = {};
#pragma unroll
  for (int d = 0; d < D / kTile; ++d) {
#pragma unroll
    for (int t = 0; t < KT; ++t) {
      const RightFragment keys = load_right_transposed(k + t * kTileElements<D> + d * kTile, kRow<D>);
#pragma unroll
      for (int m = 0; m < MT; ++m) multiply_add<T>(scores[m][t], q[m][d], keys);
    }
  }
  if (head.is_masked(query_tile, key_tile, KT)) mask_scores(scores, head, query_tile, key_tile);
#pragma unroll
  for (int m = 0; m < MT; ++m) softmax[m].update(scores[m], factor);
#pragma unroll
  for (int t = 0; t < KT; ++t) {
    LeftFragment weights[MT];
#pragma unroll
    for (int m = 0; m < MT; ++m) weights[m] = as_left<T>(scores[m][t]);
#pragma unroll
    for (int d = 0; d < D / kTile; ++d) {
      const RightFragment values = load_right(v + t * kTileElements<D> + d * kTile, kRow<D>);
#pragma unroll
      for (int m = 0; m < MT; ++m) multiply_add<T>(softmax[m].acc[d], weights[m], values);
    }
  }
}

// The results of 16 queries, by way of the warp's own rows in shared memory.
template <class T, int D>
__device__ __forceinline__ void store_results(OnlineSoftmax<D>& softmax, const Head<T, D>& head, T* rows,
                                              const RopeAttentionForward& params, int tile) {
  const Threads warp = Threads::of_warp();
  float row_lse[2];
  softmax.finish(row_lse);
  float* const lse = params.lse + head.first_number();
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int token = tile * kTile + static_cast<int>(warp.rank / 4) + row * 8 - head.slots().shift;
    if (warp.rank % 4 == 0 && head.slots().has(token)) lse[token] = row_lse[row];
  }
#pragma unroll
  for (int d = 0; d < D / kTile; ++d) store_tile(softmax.acc[d], 1.0f, rows + d * kTile, kRow<D>);
  __syncwarp();
  head.store(params.out, Side::Queries, warp, tile * kTile, kTile,
             [&](int, int row, int i, auto& values) { load_floats(rows + row * kRow<D> + i, values); });
}

// A warp's queries, rotated, from its rows in shared memory, which they are on their way to.
template <class T, int D, int MT>
__device__ __forceinline__ void load_queries(LeftFragment (&q)[MT][D / kTile], T* rows,
                                             const Head<T, D>& head, int tile) {
  wait_for_copies();
  __syncwarp();
  head.rotate(rows, Threads::of_warp(), tile * kTile, MT * kTile);
  __syncwarp();
  // The softmax looks for the largest score first: with a negative scale that would be the smallest.
  const uint32_t sign = head.shape.scale < 0.0f ? 0x80008000u : 0u;
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int d = 0; d < D / kTile; ++d) {
      q[m][d] = load_left(rows + m * kTileElements<D> + d * kTile, kRow<D>);
#pragma unroll
      for (uint32_t& word : q[m][d].words) word ^= sign;
    }
  }
  __syncwarp();  // Before results take the rows: PTX takes what ldmatrix reads for weak reads.
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
    const int key_tiles = min(round + plan.warps * MT + plan.sight.reach, head.key_tiles());
    LeftFragment q[MT][D / kTile];
    OnlineSoftmax<D> softmax[MT];
    if (has_queries) head.copy(own, params.q, Side::Queries, Threads::of_warp(), tile * kTile, MT * kTile);
    int stage = 0;
    do {  // Once at least: what is on its way is waited for where queries see no key, too.
      T* const k = keys_of(stage);
      if (round == begin) {
        wait_for_copies();
        __syncthreads();  // The stage has arrived, and nobody reads the one before it.
        head.rotate(k, block, stage * kTile, min(plan.stage_tiles, head.key_tiles() - stage) * kTile);
        __syncthreads();
      }
      if (has_queries && stage == 0) load_queries(q, own, head, tile);
      if (stage + plan.stage_tiles < key_tiles) copy_stage(stage + plan.stage_tiles);
      if (!has_queries) continue;
      int key = stage;
      const int stop = min(min(key_tiles, tile + MT + plan.sight.reach), stage + plan.stage_tiles);
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

// Of shared memory, in bytes.
template <int D>
struct ForwardMemory {
  static constexpr size_t kTileBytes = kTileElements<D> * sizeof(BFloat16);

  static size_t of_block(const AttentionPlan& plan) {
    const int buffers = plan.stage_tiles == plan.key_tiles ? 1 : 2;
    return kTileBytes * (2 * buffers * plan.stage_tiles + plan.warps * kQueryTiles<D>);
  }
};

template <int D, class Kernel>
Error plan_forward(Kernel* kernel, const AttentionShape& shape, AttentionPlan& plan) {
  constexpr int MT = kQueryTiles<D>, kMost = kMaxWarps<D>;
  using Memory = ForwardMemory<D>;
  const size_t limit = max_shared_memory(), half = (limit - 1024) / 2;  // CUDA takes 1 KB a block for itself
  plan = begin_plan(shape);
  const int units = ceil_div(plan.tiles, MT);
  for (const bool two : {true, false}) {
    const int most_warps = two ? kMost / 2 : kMost;
    plan.warps = warps_for(units, most_warps);
    if (Memory::of_block(plan) > (two ? half : limit)) continue;
    const int64_t resident = resident_blocks(kernel, plan.warps * kWarpSize, Memory::of_block(plan));
    const int most = ceil_div(plan.tiles, 4);
    const int blocks = std::clamp<int>(static_cast<int>(resident / (shape.batch * shape.heads)), 1, most);
    plan.block_tiles = ceil_div(units, blocks) * MT;
    plan.warps = std::min(plan.warps, warps_for(plan.block_tiles / MT, most_warps));
    plan.blocks = ceil_div(plan.tiles, plan.block_tiles);
    return nullptr;
  }
  plan.warps = warps_for(units, kMost);
  plan.block_tiles = plan.warps * MT;
  plan.blocks = ceil_div(plan.tiles, plan.block_tiles);
  plan.stage_tiles = 0;
  const size_t stage = limit - std::min(limit, Memory::of_block(plan));
  plan.stage_tiles = std::min(kMaxStageTiles, static_cast<int>(stage / (4 * Memory::kTileBytes)));
  return plan.stage_tiles > 0 ? nullptr : "too little shared memory for the keys of attention";
}

}  // namespace

Error rope_attention_forward(const RopeAttentionForward& params, Stream stream) {
  const AttentionShape& shape = params.shape;
  if (const Error reason = unserved(shape, params.tables, {params.q, params.k, params.v})) return reason;
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
