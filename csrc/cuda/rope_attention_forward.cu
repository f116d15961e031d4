// softmax(scale * rotate(q) rotate(k)^T) v of one head after another, see rope_attention.cuh.
//
// Bytes: q, k, v and out once each, 4 B N H D s; k and v of a head that doesn't fit into shared memory once
// more for each block that shares it. The tables (4 N D bytes a head, twice) come from the L2 cache.
//
// Memory plan. Of S slots and W warps a block has, in shared memory, rows of 2 (D + 8) bytes: 2 S for k and
// v, and 16 W for the warps' own, which hold q on the way in and out on the way back. For H100 (227 KB a
// block, 228 KB a multiprocessor; blocks: of a multiprocessor):
//
//    D     N     S   W    KB a block      blocks          D     N     S   W    KB a block      blocks
//   64    77    80   5    34              2              88   257   272   6   130              1
//   64   129   144   5    52              2             112   257   272   6   150              1
//   64   197   224   5    74              2             128   129   144   3    89              2
//   64   257   272   6    90              2             128   257   272   6   170              1
//   64   577   592  10   189              1             128   577   592   4   102 of 4 stages  2
//   64  1025  1040   6   112 of 3 stages  2             128  1025  1040   4   110 of 6 stages  2
//
// Registers: see kMaxWarps, and budget.json.
#include <cfloat>

#include "cuda/rope_attention.cuh"

namespace evakernels::cuda {
namespace {

constexpr int kKeyTiles = 4;  // whose scores a warp has at a time

// The softmax of rows whose scores come tile by tile, and its product with the values (Milakov and Gimelshein
// 2018; Dao et al. 2022). A lane has two of the 16 rows, at lane / 4 and 8 below, which four lanes share.
template <class T, int D>
struct OnlineSoftmax {
  Sums out[D / kTile] = {};
  float highest[2] = {-INFINITY, -INFINITY};  // of the scores times `factor`
  float total[2] = {};                        // the lane's part

  // Of element i of a tile.
  static __device__ __forceinline__ int row_of(int i) { return i / 2 % 2; }

  // The scores of KT tiles times `factor` become weights, and what was summed before is made to fit them.
  template <int KT>
  __device__ __forceinline__ void weigh(Sums (&scores)[KT], float factor) {
    float shift[2], correction[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float most = -INFINITY;
#pragma unroll
      for (int t = 0; t < KT; ++t) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (row_of(i) == row) most = fmaxf(most, scores[t].values[i]);
        }
      }
      most = fmaxf(most, __shfl_xor_sync(kWholeWarp, most, 1));
      most = fmaxf(most, __shfl_xor_sync(kWholeWarp, most, 2));
      shift[row] = fmaxf(highest[row], most * factor);
      correction[row] = exp2_approximated(highest[row] - shift[row]);
      highest[row] = shift[row];
      total[row] *= correction[row];
    }
#pragma unroll
    for (int t = 0; t < KT; ++t) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& score = scores[t].values[i];
        score = exp2_approximated(score * factor - shift[row_of(i)]);
        total[row_of(i)] += score;
      }
    }
#pragma unroll
    for (Sums& sums : out) {
#pragma unroll
      for (int i = 0; i < 8; ++i) sums.values[i] *= correction[row_of(i)];
    }
  }

  __device__ __forceinline__ void finish(float (&lse)[2]) {
    float inverse[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      total[row] += __shfl_xor_sync(kWholeWarp, total[row], 1);
      total[row] += __shfl_xor_sync(kWholeWarp, total[row], 2);
      lse[row] = highest[row] * kLn2 + logf(total[row]);
      inverse[row] = 1.0f / total[row];
    }
#pragma unroll
    for (Sums& sums : out) {
#pragma unroll
      for (int i = 0; i < 8; ++i) sums.values[i] *= inverse[row_of(i)];
    }
  }
};

template <class T, int D>
using OwnQueries = OwnTiles<T, D, true>;

// Adds KT tiles of keys, from `key_tile` on, to the softmax of a warp's queries.
template <int KT, class T, int D>
__device__ __forceinline__ void attend_to(OnlineSoftmax<T, D>& softmax, const OwnQueries<T, D>& queries,
                                          const T* keys, const T* values, const Stages<T, D, 1>& stages,
                                          int query_tile, int key_tile, float factor) {
  const Head<T, D>& head = stages.head;
  constexpr int kRow = Head<T, D>::kRow, kSteps = Head<T, D>::kSteps;
  Sums scores[KT] = {};
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
#pragma unroll
    for (int t = 0; t < KT; ++t) {
      multiply_add<T>(scores[t], queries.turned(k), load_tile(keys + t * kTile * kRow + k * kTile, kRow));
    }
  }
#pragma unroll
  for (int t = 0; t < KT; ++t) {
    if (!is_masked(head.slots(), head.shape.causal, query_tile, key_tile + t)) continue;
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int query = query_tile * kTile + row_in_tile(lane, i);
      const int key = (key_tile + t) * kTile + column_in_tile(lane, i);
      if (!counts(head.slots(), head.shape.causal, query, key)) scores[t].values[i] = -INFINITY;
    }
  }
  softmax.weigh(scores, factor);
#pragma unroll
  for (int t = 0; t < KT; ++t) {
    const Operand weights = as_left<T>(scores[t]);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      multiply_add<T>(softmax.out[k], weights, load_right_tile(values + t * kTile * kRow + k * kTile, kRow));
    }
  }
}

// The results of a warp's 16 slots, by way of its own rows in shared memory.
template <class T, int D>
__device__ __forceinline__ void store_results(OnlineSoftmax<T, D>& softmax, const Head<T, D>& head, T* own,
                                              void* out, float* lse, int tile) {
  const Team warp = Team::warp();
  float row_lse[2];
  softmax.finish(row_lse);
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int token = head.slots().token(tile * kTile + warp.thread / 4 + row * 8);
    if (warp.thread % 4 == 0 && token >= 0) lse[token] = row_lse[row];
  }
  __syncwarp();  // as in rope_attention_backward.cu
#pragma unroll
  for (int k = 0; k < D / kTile; ++k) {
    put_sums(softmax.out[k], 1.0f, own + k * kTile, Head<T, D>::kSumsRow);
  }
  __syncwarp();
  head.store(own, out, warp, tile * kTile, kTile);
  __syncwarp();
}

template <class T, int D>
__global__ void __launch_bounds__(kMaxWarps<D>* kWarpSize)
    rope_attention_forward_kernel(const __grid_constant__ RopeAttentionForward params,
                                  const __grid_constant__ AttentionPlan plan) {
  const AttentionShape& shape = params.shape;
  const Head<T, D> head(shape, params.tables, plan);
  const Stages<T, D, 1> stages(head);
  // The softmax looks for the highest score first: with a negative factor that would be the lowest.
  const float factor = fmaxf(fabsf(shape.scale) * kLog2E, FLT_MIN);

  const int begin = static_cast<int>(blockIdx.x % static_cast<unsigned>(plan.parts)) * plan.part_tiles;
  const int end = min(begin + plan.part_tiles, head.tiles());
  for (int round = begin; round < end; round += plan.warps) {
    const int tile = round + static_cast<int>(threadIdx.x) / kWarpSize;
    const bool owns = tile < end;
    const bool loaded = round > begin && plan.stage_tiles == plan.tiles;
    const int last = head.shape.causal ? min(round + plan.warps, end) : head.tiles();
    const Vectors keys = {params.k, params.v}, queries = {params.q, params.q};
    OwnQueries<T, D> own(stages.own);
    OnlineSoftmax<T, D> softmax;
    stages.walk_over(keys, queries, owns ? tile : -1, 0, last, loaded,
                     [&](bool is_first, int stage, int from, int to) {
                       if (!owns) return;
                       if (is_first) own.hold();
                       if (is_first && shape.scale < 0.0f) own.negate();
                       if (head.shape.causal) to = min(to, tile + 1);
                       const auto attend = [&](auto KT, int at) {
                         const int offset = (at - stage) * stages.kTileElements;
                         attend_to<decltype(KT)::value>(softmax, own, stages.turned + offset,
                                                        stages.plain + offset, stages, tile, at, factor);
                       };
#pragma unroll 1
                       for (; from + kKeyTiles <= to; from += kKeyTiles) attend(Constant<kKeyTiles>{}, from);
#pragma unroll 1
                       for (; from < to; ++from) attend(Constant<1>{}, from);
                     });
    if (!owns) continue;
    float* const lse = params.lse + head.number.first_row(shape);
    store_results(softmax, head, stages.own, params.out, lse, tile);
  }
}

}  // namespace

Error rope_attention_forward(const RopeAttentionForward& params, Stream stream) {
  const AttentionShape& shape = params.shape;
  if (const Error reason = unserved(shape)) return reason;
  if (shape.batch * shape.heads * shape.tokens * shape.head_dim == 0) return nullptr;
  return with_attention_types(shape, [&](auto element, auto D) {
    using T = decltype(element);
    const auto memory = AttentionMemory::of_stages<T, D(), 1>(0);
    const bool wide = is_wide(shape, params.tables, {params.q, params.k, params.v}, {params.out});
    return launch_attention<D()>(rope_attention_forward_kernel<T, D()>, params, memory, wide, stream);
  });
}

}  // namespace evakernels::cuda
