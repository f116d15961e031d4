// Statistics of contrastive logits: maximum and log-sum-exp of each row and column, and the logits of the
// pairs.
//
// Grid: a block has 256 captions and loops over tiles of 128 images (contrastive_tiles.cuh). A warp reduces
// its rows and columns to (maximum, sum of exp relative to it), the block merges those of its warps, and a
// second kernel merges those of all blocks, in a fixed order. Logits may be of any size. Traffic: features,
// and partial results of 3 % of the bytes of the logits at most.
#include <algorithm>

#include "cuda/contrastive_tiles.cuh"

namespace evakernels::cuda {
namespace {

constexpr int kMaxTiles = 16;  // row tiles per block
constexpr int kPartsAtOnce = 16;

// Largest distance of maxima for one exponential: exp is 0 below -87, and the terms that are lost are below
// e^-27 of the largest.
constexpr float kSpread = 60.0f;

// The maximum, or 0 instead of an infinite one: infinity minus infinity is NaN.
__device__ __forceinline__ float finite(float maximum) { return fabsf(maximum) < INFINITY ? maximum : 0.0f; }

// Sum of exp(logit - finite(max)).
struct alignas(8) Part {
  float max;
  float sum;
};

__device__ __forceinline__ void merge(Part& part, const Part& other) {
  const float most = fmaxf(part.max, other.max), shift = finite(most);
  const auto rescaled = [&](const Part& of) {
    return of.max == most ? of.sum : of.sum * exp_approx(of.max - shift);
  };
  part = {most, rescaled(part) + rescaled(other)};
}

struct BlockParts {
  Part rows[kWarpColumns][kRows];
  Part columns[kWarpRows][kColumns];
};

// Lanes of a row differ in the two lowest bits, lanes of a column in the others.
template <int N, class Reduce>
__device__ __forceinline__ void reduce_lanes(float (&values)[N], bool of_rows, const Reduce& reduce) {
#pragma unroll
  for (int distance = of_rows ? 1 : 4; distance < (of_rows ? 4 : kWarpSize); distance *= 2) {
#pragma unroll
    for (float& value : values) value = reduce(value, __shfl_xor_sync(kFullMask, value, distance));
  }
}

// Writes the parts of a warp's rows and columns. Columns from `columns` on don't exist.
__device__ __forceinline__ void reduce_logits(WarpLogits& logits, int columns, Part* row_parts,
                                              Part* col_parts) {
  constexpr int kRowSlots = 2 * kWarpTiles, kColSlots = 4 * kWarpTiles;
  const auto larger = [](float a, float b) { return fmaxf(a, b); };
  const auto sum = [](float a, float b) { return a + b; };
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  float row_max[kRowSlots], col_max[kColSlots], row_sum[kRowSlots] = {};
#pragma unroll
  for (float& value : row_max) value = -INFINITY;
#pragma unroll
  for (float& value : col_max) value = -INFINITY;
  for_each_logit(logits, [&](float x, int r, int c, int, int) {
    row_max[r] = fmaxf(row_max[r], x);
    col_max[c] = fmaxf(col_max[c], x);
  });
  reduce_lanes(row_max, true, larger);
  reduce_lanes(col_max, false, larger);
  float most[1] = {row_max[0]}, least[1] = {INFINITY};
#pragma unroll
  for (float value : row_max) most[0] = fmaxf(most[0], value);
#pragma unroll
  for (int c = 0; c < kColSlots; ++c) {
    if (column_of(c, lane) < columns) least[0] = fminf(least[0], col_max[c]);
  }
  reduce_lanes(most, false, larger);
  reduce_lanes(least, true, [](float a, float b) { return fminf(a, b); });

  // One exponential serves both directions: terms of rows, rescaled from the row's maximum to the warp's.
  const bool shares = most[0] - least[0] <= kSpread;
  float scale[kRowSlots];
#pragma unroll
  for (int r = 0; r < kRowSlots; ++r) scale[r] = exp_approx(row_max[r] - finite(most[0]));
#pragma unroll
  for (int n = 0; n < kWarpTiles; ++n) {
    float col_sum[4] = {};
    if (shares) {
      for_each_logit(logits, n, [&](float x, int r, int c, int, int) {
        const float p = exp_approx(x - finite(row_max[r]));
        row_sum[r] += p;
        col_sum[c % 4] += p * scale[r];
      });
#pragma unroll
      for (int c = 0; c < 4; ++c) col_sum[c] *= exp_approx(finite(most[0]) - finite(col_max[4 * n + c]));
    } else {
      for_each_logit(logits, n, [&](float x, int r, int c, int, int) {
        row_sum[r] += exp_approx(x - finite(row_max[r]));
        col_sum[c % 4] += exp_approx(x - finite(col_max[c]));
      });
    }
    reduce_lanes(col_sum, false, sum);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (lane < 4) col_parts[column_of(4 * n + c, lane)] = {col_max[4 * n + c], col_sum[c]};
    }
  }
  reduce_lanes(row_sum, true, sum);
#pragma unroll
  for (int r = 0; r < kRowSlots; ++r) {
    if (lane % 4 == 0) row_parts[row_of(r, lane)] = {row_max[r], row_sum[r]};
  }
}

// Scales a warp's products to logits and stores those of pairs, and all of them if they are saved. Logits
// without an image or a caption become -inf.
__device__ __forceinline__ void finish_logits(WarpLogits& logits, const ContrastiveStatistics& params,
                                              const TilePlace& place) {
  const int row = place.row(), column = place.column();
  const float scale = load_scalar(params.logit_scale, params.scale_dtype);
  for_each_logit(logits, [&](float& x, int, int, int, int) { x *= scale; });
  const int rows = static_cast<int>(params.rows) - row;  // from this warp's on
  const int columns = static_cast<int>(params.columns) - column;
  const int64_t pair = row + params.offset - column;
  if (-kWarpSide < pair && pair < kWarpSide) {
    for_each_logit(logits, [&](float x, int, int, int i, int j) {
      if (j == i + pair && i < rows) params.positive[row + i] = x;
    });
  }
  if (params.logits) {
    float* const corner = params.logits + row * params.columns + column;
    for_each_logit(logits, [&](float x, int, int, int i, int j) {
      if (i < rows && j < columns) corner[i * params.columns + j] = x;
    });
  }
  if (rows < kWarpSide || columns < kWarpSide) {
    for_each_logit(logits, [&](float& x, int, int, int i, int j) {
      if (i >= rows || j >= columns) x = -INFINITY;
    });
  }
}

// row_parts: [column tiles, rows]; col_parts: [groups, columns]. A group is `group_tiles` tiles of rows.
template <class T>
__global__ void __launch_bounds__(kThreads)
    contrastive_statistics_kernel(const __grid_constant__ ContrastiveStatistics params, bool wide,
                                  int group_tiles, Part* row_parts, Part* col_parts) {
  const int thread = static_cast<int>(threadIdx.x),
            row_tiles = ceil_div(static_cast<int>(params.rows), kRows);
  TilePlace place = place_of_block(ceil_div(row_tiles, group_tiles), static_cast<int>(params.columns));
  const int group = place.row_tile;
  BlockParts& parts = shared_memory<BlockParts>();
  Part column_part = {-INFINITY, 0.0f};  // of this thread's column

  const int end = min((group + 1) * group_tiles, row_tiles);
  for (int tile = group * group_tiles; tile < end; ++tile) {
    place.row_tile = tile;
    WarpLogits logits = {};
    multiply<T>(logits, params, place, wide);
    finish_logits(logits, params, place);
    reduce_logits(logits, static_cast<int>(params.columns) - place.column(),
                  parts.rows[place.warp_column] + place.warp_row * kWarpSide,
                  parts.columns[place.warp_row] + place.warp_column * kWarpSide);
    __syncthreads();  // #parts-of-warps
    for (int n = 0; n < kWarpRows; ++n) merge(column_part, parts.columns[n][thread]);
    if (thread < kRows && tile * kRows + thread < params.rows) {
      Part row_part = parts.rows[0][thread];
      for (int n = 1; n < kWarpColumns; ++n) merge(row_part, parts.rows[n][thread]);
      row_parts[place.column_tile * params.rows + tile * kRows + thread] = row_part;
    }
  }
  if (place.column_tile * kColumns + thread < params.columns) {
    col_parts[group * params.columns + place.column_tile * kColumns + thread] = column_part;
  }
}

struct MergeScratch {
  Part parts[kPartsAtOnce][kWarpSize];
};

// Merges parts, [number, count]: a column per lane.
__global__ void __launch_bounds__(kWarpSize* kPartsAtOnce)
    contrastive_merge_kernel(const Part* parts, int64_t number, int64_t count, float* lse, float* most) {
  MergeScratch& scratch = shared_memory<MergeScratch>();
  const int64_t at = int64_t{blockIdx.x} * kWarpSize + threadIdx.x;
  Part total = {-INFINITY, 0.0f};
  if (at < count) {
    for (int64_t n = threadIdx.y; n < number; n += kPartsAtOnce) merge(total, parts[n * count + at]);
  }
  scratch.parts[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y > 0 || at >= count) return;
  for (int n = 1; n < kPartsAtOnce; ++n) merge(total, scratch.parts[n][threadIdx.x]);
  lse[at] = logf(total.sum) + finite(total.max);
  most[at] = isnan(total.sum) ? total.sum : total.max;  // Maxima ignore NaN; sums don't.
}

}  // namespace

Error contrastive_forward(const ContrastiveStatistics& params, Scratch& scratch, Stream stream) {
  const int64_t row_tiles = ceil_div(params.rows, kRows), column_tiles = ceil_div(params.columns, kColumns);
  // Several blocks per SM, so that the last ones leave few SMs idle.
  const int64_t blocks = std::max(1, 4 * multiprocessors());
  const int64_t group_tiles = std::clamp<int64_t>(row_tiles * column_tiles / blocks, 1, kMaxTiles);
  const int64_t groups = ceil_div(row_tiles, group_tiles);
  float* memory = nullptr;
  const int64_t row_parts = column_tiles * params.rows, col_parts = groups * params.columns;
  if (const Error error = scratch.allocate(&memory, 2 * (row_parts + col_parts))) return error;
  Part* const parts = reinterpret_cast<Part*>(memory);
  const auto kernel = params.dtype == DType::BFloat16 ? contrastive_statistics_kernel<BFloat16>
                                                      : contrastive_statistics_kernel<Float16>;
  const auto merge_parts = [&](const Part* from, int64_t number, int64_t count, float* lse, float* most) {
    return launch(contrastive_merge_kernel, static_cast<unsigned>(ceil_div(count, kWarpSize)),
                  {kWarpSize, kPartsAtOnce, 1}, stream, from, number, count, lse, most);
  };
  Error error = launch_with_memory(kernel, static_cast<unsigned>(groups * column_tiles), kThreads,
                                   2 * kStageBytes, stream, params, are_rows_wide(params),
                                   static_cast<int>(group_tiles), parts, parts + row_parts);
  if (!error) error = merge_parts(parts, column_tiles, params.rows, params.row_lse, params.row_max);
  if (error) return error;
  return merge_parts(parts + row_parts, groups, params.columns, params.col_lse, params.col_max);
}

}  // namespace evakernels::cuda
