// The softmax of rows whose scores come tile by tile, and its product with the values (Milakov and Gimelshein
// 2018; Dao et al. 2022).
#pragma once

#include "cuda/attention_tiles.cuh"

namespace evakernels::cuda {

// Of a tile of 16 queries. A lane has two of its rows, at lane / 4 and 8 below, which four lanes share.
template <int D>
struct OnlineSoftmax {
  Accumulator acc[D / kTile] = {};
  float row_max[2] = {-INFINITY, -INFINITY};  // of the scores times `factor`
  float row_sum[2] = {};                      // the lane's part

  // Of element i of a tile.
  static __device__ __forceinline__ int row_of(int i) { return i / 2 % 2; }

  // The scores of KT tiles times `factor` become weights, and what was summed before is rescaled to fit them.
  template <int KT>
  __device__ __forceinline__ void update(Accumulator (&scores)[KT], float factor) {
    float rescale[2];
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
      const float before = row_max[row];
      row_max[row] = fmaxf(before, most * factor);
      rescale[row] = exp2_approximated(before - row_max[row]);
      row_sum[row] *= rescale[row];
    }
#pragma unroll
    for (int t = 0; t < KT; ++t) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& score = scores[t].values[i];
        score = exp2_approximated(score * factor - row_max[row_of(i)]);
        row_sum[row_of(i)] += score;
      }
    }
#pragma unroll
    for (Accumulator& sums : acc) {
#pragma unroll
      for (int i = 0; i < 8; ++i) sums.values[i] *= rescale[row_of(i)];
    }
  }

  // Divides by the row sums. lse: of the lane's two rows.
  __device__ __forceinline__ void finish(float (&lse)[2]) {
    float inverse[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      row_sum[row] += __shfl_xor_sync(kWholeWarp, row_sum[row], 1);
      row_sum[row] += __shfl_xor_sync(kWholeWarp, row_sum[row], 2);
      lse[row] = row_max[row] * kLn2 + logf(row_sum[row]);
      inverse[row] = 1.0f / row_sum[row];
    }
#pragma unroll
    for (Accumulator& sums : acc) {
#pragma unroll
      for (int i = 0; i < 8; ++i) sums.values[i] *= inverse[row_of(i)];
    }
  }
};

}  // namespace evakernels::cuda
