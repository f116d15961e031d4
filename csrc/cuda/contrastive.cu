// Statistics of contrastive logits, logit_scale * image @ text^T: maximum and log-sum-exp of each row and
// column, and the logits of the pairs.
//
// Grid: a block has 256 captions and loops over tiles of 128 images. Block: eight warps with 64 x 64 logits
// each in registers; stages of 32 channels are double-buffered with cp.async. A warp reduces its rows and
// columns to (maximum, sum of exp relative to it), the block merges those of its warps, and a second kernel
// merges those of all blocks, in a fixed order. Logits may be of any size.
// Traffic: features once per wave of blocks, from the L2 cache for most of them; partial results, 3 % of the
// bytes of the logits at most.
#include <algorithm>

#include "cuda/elements.cuh"
#include "cuda/tensor_core.h"
#include "include/contrastive.h"

namespace evakernels::cuda {
namespace {

constexpr int kWarpTiles = 4;                   // 16 x 16 tiles per side of a warp's logits
constexpr int kWarpSide = kWarpTiles * kTile;   // rows and columns of a warp
constexpr int kWarpRows = 2, kWarpColumns = 4;  // warps of a block
constexpr int kRows = kWarpRows * kWarpSide;    // of a block at a time
constexpr int kColumns = kWarpColumns * kWarpSide;
constexpr int kThreads = kWarpRows * kWarpColumns * kWarpSize;
static_assert(kThreads == kColumns && kThreads >= kRows);

constexpr int kDepth = 32;                // channels of a stage
constexpr int kChunk = 8;                 // 16-bit elements of a cp.async
constexpr int kStride = kDepth + kChunk;  // avoids bank conflicts
constexpr int kStageElements = (kRows + kColumns) * kStride;
constexpr size_t kStageBytes = kStageElements * sizeof(BFloat16);

constexpr int kBand = 8;        // groups of row tiles that run together and share captions in the L2 cache
constexpr int kMostTiles = 16;  // row tiles per block
constexpr int kPartsAtOnce = 16;
constexpr float kLog2OfE = 1.44269504088896340736f;

// Largest distance of maxima for one exponential: exp is 0 below -87, and the terms that are lost are below
// e^-27 of the largest.
constexpr float kSpread = 60.0f;

__device__ __forceinline__ float exp_approx(float x) { return exp2_approx(x * kLog2OfE); }

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

// Copies channels [first, first + kDepth) of `count` rows, with cp.async if rows are `wide`; zeros after the
// last row and channel. A thread has the same channels of each row.
template <class T>
__device__ __forceinline__ void copy_rows(T* to, const void* matrix, int begin, int count, int64_t rows,
                                          int64_t width, int first, bool wide) {
  constexpr int kChunks = kDepth / kChunk, kRowsAtOnce = kThreads / kChunks;
  const int thread = static_cast<int>(threadIdx.x), row = thread / kChunks;
  const int channel = first + thread % kChunks * kChunk, left = static_cast<int>(width) - channel;
  const int rows_left = static_cast<int>(rows) - begin - row;
  const T* from = static_cast<const T*>(matrix) + (begin + row) * width + channel;
  to += row * kStride + thread % kChunks * kChunk;
#pragma unroll 1
  for (int i = 0; i < count; i += kRowsAtOnce, from += kRowsAtOnce * width) {
    const int exist = i < rows_left ? left : 0;
    if (wide) {
      copy_async(to + i * kStride, from, exist > 0);
    } else {
      for (int n = 0; n < kChunk; ++n) to[i * kStride + n] = n < exist ? from[n] : T{};
    }
  }
}

using WarpLogits = Accumulator[kWarpTiles][kWarpTiles];

// Calls body(value, row slot, column slot, row, column) for a lane's logits in 16 columns, or in all. Slots
// are the lane's, rows and columns the warp's.
template <class Body>
__device__ __forceinline__ void for_each_logit(WarpLogits& logits, int n, const Body& body) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll
  for (int m = 0; m < kWarpTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      body(logits[m][n].values[i], 2 * m + i / 2 % 2, 4 * n + i % 2 + i / 4 * 2,
           m * kTile + row_in_tile(lane, i), n * kTile + column_in_tile(lane, i));
    }
  }
}
template <class Body>
__device__ __forceinline__ void for_each_logit(WarpLogits& logits, const Body& body) {
#pragma unroll
  for (int n = 0; n < kWarpTiles; ++n) for_each_logit(logits, n, body);
}

// Lanes of a row differ in the two lowest bits, lanes of a column in the others.
template <int N, class Reduce>
__device__ __forceinline__ void reduce_lanes(float (&values)[N], bool of_rows, const Reduce& reduce) {
#pragma unroll
  for (int distance = of_rows ? 1 : 4; distance < (of_rows ? 4 : kWarpSize); distance *= 2) {
#pragma unroll
    for (float& value : values) value = reduce(value, __shfl_xor_sync(kFullMask, value, distance));
  }
}

// The warp's column in a lane's slot.
__device__ __forceinline__ int column_of(int slot, int lane) {
  return slot / 4 * kTile + column_in_tile(lane, slot % 2 + slot / 2 % 2 * 4);
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
    if (lane % 4 == 0) row_parts[r / 2 * kTile + r % 2 * 8 + lane / 4] = {row_max[r], row_sum[r]};
  }
}

// A warp's products of 64 images and 64 captions over all channels.
template <class T>
__device__ __forceinline__ void multiply(WarpLogits& logits, const ContrastiveStatistics& params, int row,
                                         int column, int warp_row, int warp_column, bool wide) {
  T* const stages = dynamic_shared_memory<T>();
  const auto copy_stage = [&](int first) {
    T* const stage = stages + first / kDepth % 2 * kStageElements;
    copy_rows(stage, params.image, row, kRows, params.rows, params.width, first, wide);
    copy_rows(stage + kRows * kStride, params.text, column, kColumns, params.columns, params.width, first,
              wide);
  };
  const int width = static_cast<int>(params.width);
  copy_stage(0);
  int first = 0;
  do {
    wait_for_copies();
    __syncthreads();  // The stage has arrived, and nobody reads the one before it. #features
    if (first + kDepth < width) copy_stage(first + kDepth);
    const T* const image = stages + first / kDepth % 2 * kStageElements + warp_row * kWarpSide * kStride;
    const T* const text =
        stages + first / kDepth % 2 * kStageElements + (kRows + warp_column * kWarpSide) * kStride;
#pragma unroll
    for (int k = 0; k < kDepth; k += kTile) {
      FragmentA a[kWarpTiles];
#pragma unroll
      for (int m = 0; m < kWarpTiles; ++m) a[m] = load_a(image + m * kTile * kStride + k, kStride);
#pragma unroll
      for (int n = 0; n < kWarpTiles; ++n) {
        const FragmentB b = load_b_transposed(text + n * kTile * kStride + k, kStride);
#pragma unroll
        for (int m = 0; m < kWarpTiles; ++m) mma<T>(logits[m][n], a[m], b);
      }
    }
  } while ((first += kDepth) < width);
}

// Scales a warp's products to logits and stores those of pairs, and all of them if they are saved. Logits
// without an image or a caption become -inf.
__device__ __forceinline__ void finish_logits(WarpLogits& logits, const ContrastiveStatistics& params,
                                              int row, int column) {
  float scale[1];
  load_floats(params.logit_scale, params.scale_dtype, 0, scale);
  for_each_logit(logits, [&](float& x, int, int, int, int) { x *= scale[0]; });
  const int64_t rows = params.rows - row, columns = params.columns - column;  // from this warp's on
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
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize;
  const int warp_row = warp % kWarpRows, warp_column = warp / kWarpRows;
  const int row_tiles = static_cast<int>(ceil_div(params.rows, kRows));
  const int column_tiles = static_cast<int>(ceil_div(params.columns, kColumns));
  const int groups = ceil_div(row_tiles, group_tiles), block = static_cast<int>(blockIdx.x);
  const int first_group = block / (kBand * column_tiles) * kBand, height = min(groups - first_group, kBand);
  const int inside = block % (kBand * column_tiles);
  const int group = first_group + inside % height, column_tile = inside / height;
  const int column = column_tile * kColumns + warp_column * kWarpSide;
  BlockParts& parts = shared_memory<BlockParts>();
  Part column_part = {-INFINITY, 0.0f};  // of this thread's column

  const int end = min((group + 1) * group_tiles, row_tiles);
  for (int tile = group * group_tiles; tile < end; ++tile) {
    const int row = tile * kRows + warp_row * kWarpSide;
    WarpLogits logits = {};
    multiply<T>(logits, params, tile * kRows, column_tile * kColumns, warp_row, warp_column, wide);
    finish_logits(logits, params, row, column);
    reduce_logits(logits, static_cast<int>(params.columns) - column,
                  parts.rows[warp_column] + warp_row * kWarpSide,
                  parts.columns[warp_row] + warp_column * kWarpSide);
    __syncthreads();  // #parts-of-warps
    for (int n = 0; n < kWarpRows; ++n) merge(column_part, parts.columns[n][thread]);
    if (thread < kRows && tile * kRows + thread < params.rows) {
      Part row_part = parts.rows[0][thread];
      for (int n = 1; n < kWarpColumns; ++n) merge(row_part, parts.rows[n][thread]);
      row_parts[column_tile * params.rows + tile * kRows + thread] = row_part;
    }
  }
  if (column_tile * kColumns + thread < params.columns) {
    col_parts[group * params.columns + column_tile * kColumns + thread] = column_part;
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
  if (params.rows == 0) return nullptr;
  const int64_t row_tiles = ceil_div(params.rows, kRows), column_tiles = ceil_div(params.columns, kColumns);
  // Several blocks per SM, so that the last ones leave few SMs idle.
  const int64_t blocks = std::max(1, 4 * multiprocessors());
  const int64_t group_tiles = std::clamp<int64_t>(row_tiles * column_tiles / blocks, 1, kMostTiles);
  const int64_t groups = ceil_div(row_tiles, group_tiles);
  float* memory = nullptr;
  const int64_t row_parts = column_tiles * params.rows, col_parts = groups * params.columns;
  if (const Error error = scratch.allocate(&memory, 2 * (row_parts + col_parts))) return error;
  Part* const parts = reinterpret_cast<Part*>(memory);
  const auto is_aligned = [](const void* data) {
    return reinterpret_cast<uintptr_t>(data) % kWidestAccess == 0;
  };
  const bool wide = params.width % kChunk == 0 && is_aligned(params.image) && is_aligned(params.text);
  const auto kernel = params.dtype == DType::BFloat16 ? contrastive_statistics_kernel<BFloat16>
                                                      : contrastive_statistics_kernel<Float16>;
  const auto merge_parts = [&](const Part* from, int64_t number, int64_t count, float* lse, float* most) {
    return launch(contrastive_merge_kernel, static_cast<unsigned>(ceil_div(count, kWarpSize)),
                  {kWarpSize, kPartsAtOnce, 1}, stream, from, number, count, lse, most);
  };
  Error error =
      launch_with_memory(kernel, static_cast<unsigned>(groups * column_tiles), kThreads, 2 * kStageBytes,
                         stream, params, wide, static_cast<int>(group_tiles), parts, parts + row_parts);
  if (!error) error = merge_parts(parts, column_tiles, params.rows, params.row_lse, params.row_max);
  if (error) return error;
  return merge_parts(parts + row_parts, groups, params.columns, params.col_lse, params.col_max);
}

}  // namespace evakernels::cuda
