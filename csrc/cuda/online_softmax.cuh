// The softmax of rows whose scores come tile by tile, and its product with the values (Milakov and Gimelshein
// 2018; Dao et al. 2022).
#pragma once

#include <cfloat>

#include "cuda/attention_tiles.cuh"

namespace evakernels::cuda {

// How much larger a score may be than the maximum that its row has been given, to base 2. Weights are then up
// to 256, which float16 holds, and what was summed is rarely rescaled, as in FlashAttention-4.
constexpr float kMaxGrowth = 8.0f;

// Of a tile of 16 queries. A lane has two of its rows, at lane / 4 and 8 below, which four lanes share.
template <int D>
struct OnlineSoftmax {
  Accumulator acc[D / kTile] = {};
  // Of the scores times `factor`, or up to kMaxGrowth less. Finite, so that a row whose scores don't count,
  // which are -INFINITY, has weights of 0.
  float row_max[2] = {-FLT_MAX, -FLT_MAX};
  float row_sum[2] = {};  // the lane's part

  // Of element i of a tile.
  static __device__ __forceinline__ int row_of(int i) { return i / 2 % 2; }

  // The scores of KT tiles times `factor` become weights, and what was summed before is rescaled to fit them.
  template <int KT>
  __device__ __forceinline__ void update(Accumulator (&scores)[KT], float factor) {
    float rescale[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float most = scores[0].values[2 * row];
#pragma unroll
      for (int n = 1; n < 8 * KT; ++n) {
        if (row_of(n) == row) most = fmaxf(most, scores[n / 8].values[n % 8]);
      }
      most = fmaxf(most, __shfl_xor_sync(kWholeWarp, most, 1));
      most = fmaxf(most, __shfl_xor_sync(kWholeWarp, most, 2));
      const float before = row_max[row];
      if (most * factor > before + kMaxGrowth) row_max[row] = most * factor;
      rescale[row] = exp2_approximated(before - row_max[row]);
    }
    if (__any_sync(kWholeWarp, rescale[0] != 1.0f || rescale[1] != 1.0f)) multiply(rescale);
#pragma unroll
    for (int t = 0; t < KT; ++t) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& score = scores[t].values[i];
        score = exp2_approximated(score * factor - row_max[row_of(i)]);
        row_sum[row_of(i)] += score;
      }
    }
  }

  // Divides by the row sums; a row without weights stays 0. lse: of the lane's two rows.
  __device__ __forceinline__ void finish(float (&lse)[2]) {
    float inverse[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      row_sum[row] += __shfl_xor_sync(kWholeWarp, row_sum[row], 1);
      row_sum[row] += __shfl_xor_sync(kWholeWarp, row_sum[row], 2);
      lse[row] = row_max[row] * kLn2 + logf(row_sum[row]);
      inverse[row] = 1.0f / fmaxf(row_sum[row], FLT_MIN);
    }
    multiply(inverse);
  }

 private:
  // What is summed of the rows.
  __device__ __forceinline__ void multiply(const float (&factors)[2]) {
#pragma unroll
    for (Accumulator& sums : acc) {
#pragma unroll
      for (int i = 0; i < 8; ++i) sums.values[i] *= factors[row_of(i)];
    }
    row_sum[0] *= factors[0];
    row_sum[1] *= factors[1];
  }
};

}  // namespace evakernels::cuda
