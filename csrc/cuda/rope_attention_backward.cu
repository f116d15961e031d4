// The gradients of q, k and v, of one head after another, see rope_attention.cuh. The weights are computed
// again from the log-sum-exps, and everything is summed in one order: no atomics.
//
// A block walks over its head twice. First its warps own keys and walk over the queries, which gives dk and
// dv; then they own queries and walk over the keys, which gives dq. With the scores' and the weights'
// gradients computed in both, that is seven products instead of five; in return sums stay in the registers of
// one warp, and warps don't wait for each other.
//
// Bytes: 8 B N H D s, if what the second walk and the parts of a head read again comes from the cache.
//
// Memory plan. Of S slots and W warps a block has, in shared memory, rows of 2 (D + 8) bytes: 2 S for what is
// walked over (q and dout, then k and v), and 32 W for the warps' own (k and v, then q and dout), which also
// hold the float gradients on the way out; and 8 S bytes for the log-sum-exps and the means. For H100, as in
// rope_attention_forward.cu:
//
//    D     N     S   W    KB a block      blocks          D     N     S   W    KB a block      blocks
//   64    77    80   5    46              2              88   257   272   6   152              1
//   64   129   144   5    64              2             112   257   272   6   175              1
//   64   197   224   5    87              2             128   129   144   3   103              2
//   64   257   272   6   106              2             128   257   272   6   198              1
//   64   577   592  10   216              1             128   577   592   4   107 of 5 stages  2
//   64  1025  1040   6   112 of 4 stages  2             128  1025  1040   4   110 of 9 stages  2
#include "cuda/rope_attention.cuh"

namespace evakernels::cuda {
namespace {

// What a warp sums for its 16 slots: the gradients of keys and values, or those of queries alone.
template <int D, bool KEYS>
struct OwnSums {
  Sums turned[D / kTile] = {};  // of k or q, rotated and without the scale
  Sums plain[KEYS ? D / kTile : 1] = {};
};

// Registers hold one of the two vectors of a slot where there are enough.
template <class T, int D>
using OwnVectors = OwnTiles<T, D, D <= 64>;

// Of each slot: the log-sum-exp of its query, to base 2, and the mean of its weights' gradients under the
// weights, which is that of dout * out over the channels (Dao et al. 2022).
struct QueryScalars {
  float* lse;
  float* mean;
};

// Adds what tile `other`, with its two vectors, gives to the sums of tile `own`.
template <class T, int D, bool KEYS>
__device__ __forceinline__ void add_tile(OwnSums<D, KEYS>& sums, const OwnVectors<T, D>& tiles,
                                         const T* turned, const T* plain, const QueryScalars& scalars,
                                         const Stages<T, D, 2>& stages, int own, int other) {
  const Head<T, D>& head = stages.head;
  constexpr int kRow = Head<T, D>::kRow, kSteps = Head<T, D>::kSteps;
  const float factor = head.shape.scale * kLog2E;
  Sums weights = {}, gradients = {};
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    multiply_add<T>(weights, tiles.turned(k), load_tile(turned + k * kTile, kRow));
  }
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    multiply_add<T>(gradients, tiles.plain(k), load_tile(plain + k * kTile, kRow));
  }
  const int lane = threadIdx.x % kWarpSize;
  const bool masked = is_masked(head.slots(), head.shape.causal, KEYS ? other : own, KEYS ? own : other);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int row = own * kTile + row_in_tile(lane, i), column = other * kTile + column_in_tile(lane, i);
    const int query = KEYS ? column : row, key = KEYS ? row : column;
    float& weight = weights.values[i];
    weight = exp2_approximated(weight * factor - scalars.lse[query]);
    if (masked && !counts(head.slots(), head.shape.causal, query, key)) weight = 0.0f;
    gradients.values[i] = weight * (gradients.values[i] - scalars.mean[query]);
  }
  const Operand score_gradients = as_left<T>(gradients);
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    multiply_add<T>(sums.turned[k], score_gradients, load_right_tile(turned + k * kTile, kRow));
  }
  if constexpr (KEYS) {
    const Operand own_weights = as_left<T>(weights);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      multiply_add<T>(sums.plain[k], own_weights, load_right_tile(plain + k * kTile, kRow));
    }
  }
}

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
__device__ __forceinline__ void find_scalars(const QueryScalars& scalars, const RopeAttentionBackward& params,
                                             const Head<T, D>& head) {
  const float* const lse = params.lse + head.number.first_row(params.shape);
  const auto dout = head.number.template tokens_of<T>(params.dout, params.shape),
             out = head.number.template tokens_of<T>(params.out, params.shape);
  const int thread = static_cast<int>(threadIdx.x), part = thread % kLanesOfRow;
  const int rows = static_cast<int>(blockDim.x) / kLanesOfRow;
  // All lanes of a warp have a slot, or none: it has four, and there are sixteen a tile.
  for (int slot = thread / kLanesOfRow; slot < head.tiles() * kTile; slot += rows) {
    const int token = head.slots().token(slot);
    float mean = 0.0f;
    if (token >= 0) {
      const T *const a = dout.at(token), *const b = out.at(token);
      mean = head.plan.wide ? part_of_dot<T, kWide>(a, b, head.width(), part)
                            : part_of_dot<T, 1>(a, b, head.width(), part);
    }
#pragma unroll
    for (int distance = kLanesOfRow / 2; distance > 0; distance /= 2) {
      mean += __shfl_xor_sync(kWholeWarp, mean, distance);
    }
    if (part > 0) continue;
    scalars.mean[slot] = mean;
    // So that the weights of an empty slot are 0.
    scalars.lse[slot] = token < 0 ? INFINITY : lse[token] * kLog2E;
  }
}

template <class T, int D>
__global__ void __launch_bounds__(kMaxWarps<D>* kWarpSize)
    rope_attention_backward_kernel(const __grid_constant__ RopeAttentionBackward params,
                                   const __grid_constant__ AttentionPlan plan) {
  const AttentionShape& shape = params.shape;
  const Head<T, D> head(shape, params.tables, plan);
  const Stages<T, D, 2> stages(head);
  float* const floats = reinterpret_cast<float*>(stages.rest);
  const QueryScalars scalars = {floats, floats + plan.tiles * kTile};
  const Vectors keys = {params.k, params.v}, queries = {params.q, params.dout};
  const int begin = static_cast<int>(blockIdx.x % static_cast<unsigned>(plan.parts)) * plan.part_tiles;
  const int end = min(begin + plan.part_tiles, head.tiles());
  if (begin >= end) return;
  find_scalars(scalars, params, head);
  constexpr int kSumsRow = Head<T, D>::kSumsRow;
  const auto put_out = [&](const Sums(&sums)[D / kTile], float times, bool turned, void* to, int tile) {
    float* const rows = reinterpret_cast<float*>(stages.own);
    const Team warp = Team::warp();
#pragma unroll
    for (int k = 0; k < D / kTile; ++k) put_sums(sums[k], times, rows + k * kTile, kSumsRow);
    __syncwarp();
    if (turned) {
      head.template turn<kSumsRow>(rows, -1.0f, warp, tile * kTile, kTile);
      __syncwarp();
    }
    head.store(rows, to, warp, tile * kTile, kTile);
    __syncwarp();
  };
  // OF_KEYS: the warps own keys and walk over queries; else the other way round.
  const auto pass = [&](auto OF_KEYS, const Vectors& owned, const Vectors& others, const auto& finish) {
    constexpr bool kKeys = decltype(OF_KEYS)::value;
    for (int round = begin; round < end; round += plan.warps) {
      const int tile = round + static_cast<int>(threadIdx.x) / kWarpSize;
      const bool owns = tile < end;
      const bool loaded = round > begin && plan.stage_tiles == plan.tiles;
      // Causal: queries from the own key on, or keys up to the own query.
      const int from = kKeys && head.shape.causal ? round : 0;
      const int to = !kKeys && head.shape.causal ? min(round + plan.warps, end) : head.tiles();
      OwnVectors<T, D> tiles(stages.own);
      OwnSums<D, kKeys> sums;
      stages.walk_over(
          others, owned, owns ? tile : -1, from, to, loaded, [&](bool is_first, int stage, int at, int stop) {
            if (!owns) return;
            if (is_first) tiles.hold();
            if (head.shape.causal && kKeys) at = max(at, tile);
            if (head.shape.causal && !kKeys) stop = min(stop, tile + 1);
#pragma unroll 1
            for (; at < stop; ++at) {
              const int offset = (at - stage) * stages.kTileElements;
              add_tile(sums, tiles, stages.turned + offset, stages.plain + offset, scalars, stages, tile, at);
            }
          });
      if (!owns) continue;
      // Other lanes have read what sums overwrite, by ldmatrix, too: that all execute it at once does not
      // order it with what follows, as PTX takes its reads for weak ones of memory.
      __syncwarp();
      finish(sums, tile);
    }
  };
  pass(std::true_type{}, keys, queries, [&](const auto& sums, int tile) {
    put_out(sums.turned, shape.scale, true, params.dk, tile);
    put_out(sums.plain, 1.0f, false, params.dv, tile);
  });
  pass(std::false_type{}, queries, keys,
       [&](const auto& sums, int tile) { put_out(sums.turned, shape.scale, true, params.dq, tile); });
}

}  // namespace

Error rope_attention_backward(const RopeAttentionBackward& params, Stream stream) {
  const AttentionShape& shape = params.shape;
  if (const Error reason = unserved(shape)) return reason;
  if (shape.batch * shape.heads * shape.tokens * shape.head_dim == 0) return nullptr;
  return with_attention_types(shape, [&](auto element, auto D) {
    using T = decltype(element);
    const auto memory = AttentionMemory::of_stages<T, D(), 2>(2);
    const bool wide = is_wide(shape, params.tables, {params.q, params.k, params.v, params.dout, params.out},
                              {params.dq, params.dk, params.dv});
    return launch_attention<D()>(rope_attention_backward_kernel<T, D()>, params, memory, wide, stream);
  });
}

}  // namespace evakernels::cuda
