// Gradients of contrastive logits in 16 bits, of InfoNCE and of the sigmoid loss. The latter's kernel also
// sums the loss.
//
// Grid: a block per tile of 128 x 256 logits (contrastive_tiles.cuh), which it replaces by their gradients.
// The caller multiplies these with the features. Traffic: features, and the gradients once, in words of two
// columns.
#include "cuda/contrastive_tiles.cuh"

namespace evakernels::cuda {
namespace {

// Stores the gradients of 16 columns of a warp's logits, of which `rows` and `columns` exist, to its corner
// of all gradients.
template <class T>
__device__ __forceinline__ void store_gradients(const WarpLogits& gradients, int n, T* corner, int64_t stride,
                                                int rows, int columns) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll
  for (int m = 0; m < kWarpTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const int row = m * kTile + row_in_tile(lane, i), column = n * kTile + column_in_tile(lane, i);
      const float pair[2] = {gradients[m][n].values[i], gradients[m][n].values[i + 1]};
      // #gradients
      if (row < rows && column < columns) store_floats(corner + row * stride + column, pair);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    contrastive_dlogits_kernel(const __grid_constant__ ContrastiveGradients params, bool wide) {
  const int rows = static_cast<int>(params.rows), columns = static_cast<int>(params.columns);
  const TilePlace place = place_of_block(ceil_div(rows, kRows), columns);
  const int row = place.row(), column = place.column(), pair = place.pair(params.offset);
  WarpLogits logits = {};
  multiply<T>(logits, params, place, wide);

  // Rows and columns that don't exist repeat the last one.
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const float scale = load_scalar(params.logit_scale, params.scale_dtype);
  float row_lse[2 * kWarpTiles], drow[2 * kWarpTiles];
#pragma unroll
  for (int r = 0; r < 2 * kWarpTiles; ++r) {
    const int at = min(row + row_of(r, lane), rows - 1);
    row_lse[r] = params.row_lse[at];
    drow[r] = params.drow_lse[at];
  }
#pragma unroll
  for (int n = 0; n < kWarpTiles; ++n) {
    float col_lse[4], dcol[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int at = min(column + column_of(4 * n + c, lane), columns - 1);
      col_lse[c] = params.col_lse[at];
      dcol[c] = params.dcol_lse[at];
    }
    for_each_logit(logits, n, [&](float& x, int r, int c, int i, int j) {
      const float logit = x * scale;
      x = drow[r] * exp_approx(logit - row_lse[r]) + dcol[c % 4] * exp_approx(logit - col_lse[c % 4]);
      if (j == i + pair) x += params.dpositive[min(row + i, rows - 1)];
    });
    store_gradients(logits, n, static_cast<T*>(params.dlogits) + row * params.stride + column, params.stride,
                    rows - row, columns - column);
  }
}

// log(1 + x) for x in [0, 1], as 2 artanh(x / (2 + x)): log would lose the digits of a small x.
__device__ __forceinline__ float log1p_approx(float x) {
  const float z = __fdividef(x, 2.0f + x), square = z * z;
  float series = 1.0f / 15.0f;
#pragma unroll
  for (int divisor = 13; divisor > 0; divisor -= 2) series = series * square + 1.0f / divisor;
  return 2.0f * z * series;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    siglip_dlogits_kernel(const __grid_constant__ SiglipGradients params, bool wide) {
  const int all_rows = static_cast<int>(params.rows), all_columns = static_cast<int>(params.columns);
  const TilePlace place = place_of_block(ceil_div(all_rows, kRows), all_columns);
  const int row = place.row(), column = place.column(), pair = place.pair(params.offset);
  const int rows = all_rows - row, columns = all_columns - column;  // from this warp's on
  WarpLogits logits = {};
  multiply<T>(logits, params, place, wide);

  const float scale = load_scalar(params.logit_scale, params.scale_dtype);
  const float bias = load_scalar(params.logit_bias, params.bias_dtype);
  float loss = 0.0f, dbias = 0.0f;
#pragma unroll
  for (int n = 0; n < kWarpTiles; ++n) {
    for_each_logit(logits, n, [&](float& x, int, int, int i, int j) {
      // With negated pairs every loss is log(1 + e^x). Negating their gradients, too, avoids the cancellation
      // in sigmoid(x) - 1.
      const bool is_pair = j == i + pair, exists = i < rows && j < columns;
      const float logit = x * scale + bias, signed_logit = is_pair ? -logit : logit;
      const float power = exp_approx(-fabsf(signed_logit));
      const float gradient = __fdividef(signed_logit < 0.0f ? power : 1.0f, 1.0f + power);
      x = is_pair ? -gradient : gradient;
      if (exists) loss += fmaxf(signed_logit, 0.0f) + log1p_approx(power);
      if (exists) dbias += x;
      x *= kSiglipUnit;
    });
    if (params.dlogits) {
      store_gradients(logits, n, static_cast<T*>(params.dlogits) + row * params.stride + column,
                      params.stride, rows, columns);
    }
  }
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    loss += __shfl_xor_sync(kFullMask, loss, distance);
    dbias += __shfl_xor_sync(kFullMask, dbias, distance);
  }
  if (threadIdx.x % kWarpSize > 0) return;
  constexpr int kWarps = kThreads / kWarpSize;
  float* const sum = params.sums + int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  sum[0] = loss;
  sum[int64_t{gridDim.x} * kWarps] = dbias;
}

template <class Params>
Error launch_tiles(void (*bfloat16)(Params, bool), void (*float16)(Params, bool), const Params& params,
                   Stream stream) {
  const auto blocks =
      static_cast<unsigned>(ceil_div(params.rows, kRows) * ceil_div(params.columns, kColumns));
  return launch_with_memory(params.dtype == DType::BFloat16 ? bfloat16 : float16, blocks, kThreads,
                            2 * kStageBytes, stream, params, are_rows_wide(params));
}

}  // namespace

Error contrastive_dlogits(const ContrastiveGradients& params, Stream stream) {
  return launch_tiles(contrastive_dlogits_kernel<BFloat16>, contrastive_dlogits_kernel<Float16>, params,
                      stream);
}

Error siglip_dlogits(const SiglipGradients& params, Stream stream) {
  return launch_tiles(siglip_dlogits_kernel<BFloat16>, siglip_dlogits_kernel<Float16>, params, stream);
}

}  // namespace evakernels::cuda
