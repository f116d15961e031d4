// Online softmax over tiles of scores, and its product with the values (Milakov and Gimelshein 2018; Dao et
// al. 2022).
#pragma once

#include <cfloat>

#include "cuda/attention_tiles.cuh"

namespace evakernels::cuda {

// Growth of a row's maximum, in log2, that leaves the accumulator unscaled, as in FlashAttention-4. Weights
// of up to 2^8 fit into float16.
constexpr float kMaxGrowth = 8.0f;

// A tile of 16 queries. A lane holds parts of two rows, lane / 4 and lane / 4 + 8, which four lanes share.
template <int D>
struct OnlineSoftmax {
  Accumulator acc[D / kTile] = {};
  // Maximum of scores * factor, at most kMaxGrowth stale. Finite, so that fully masked rows have weights of
  // 0.
  float row_max[2] = {-FLT_MAX, -FLT_MAX};
  float row_sum[2] = {};  // this lane's share

  // Row of element i of a tile.
  static __device__ __forceinline__ int row_of(int i) { return i / 2 % 2; }

  // Turns the scores of KT tiles into weights exp2(score * factor - row_max), and rescales earlier sums.
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
      most = fmaxf(most, __shfl_xor_sync(kFullMask, most, 1));
      most = fmaxf(most, __shfl_xor_sync(kFullMask, most, 2));
      const float before = row_max[row];
      if (most * factor > before + kMaxGrowth) row_max[row] = most * factor;
      rescale[row] = exp2_approx(before - row_max[row]);
    }
    if (__any_sync(kFullMask, rescale[0] != 1.0f || rescale[1] != 1.0f)) rescale_rows(rescale);
#pragma unroll
    for (int t = 0; t < KT; ++t) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& score = scores[t].values[i];
        score = exp2_approx(score * factor - row_max[row_of(i)]);
        row_sum[row_of(i)] += score;
      }
    }
  }

  // Divides by the row sums (a row without weights stays 0) and returns the lse of the lane's two rows.
  __device__ __forceinline__ void finish(float (&lse)[2]) {
    float inverse[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      row_sum[row] += __shfl_xor_sync(kFullMask, row_sum[row], 1);
      row_sum[row] += __shfl_xor_sync(kFullMask, row_sum[row], 2);
      lse[row] = row_max[row] * kLn2 + logf(row_sum[row]);
      inverse[row] = 1.0f / fmaxf(row_sum[row], FLT_MIN);
    }
    rescale_rows(inverse);
  }

 private:
  __device__ __forceinline__ void rescale_rows(const float (&factors)[2]) {
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
