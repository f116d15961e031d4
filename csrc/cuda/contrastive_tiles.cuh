// Tiles of contrastive logits, logit_scale * image @ text^T, in registers.
//
// A block has 128 x 256 logits at a time; each of its eight warps has 64 x 64. Stages of 32 channels are
// double-buffered with cp.async. Each wave of blocks reads the features once, mostly from the L2 cache.
#pragma once

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
static_assert(kRows == kBlockLogitRows && kColumns == kBlockLogitColumns &&
              kThreads / kWarpSize == kSiglipSums);

constexpr int kDepth = 32;                // channels of a stage
constexpr int kChunk = 8;                 // 16-bit elements of a cp.async
constexpr int kStride = kDepth + kChunk;  // avoids bank conflicts
constexpr int kStageElements = (kRows + kColumns) * kStride;
constexpr size_t kStageBytes = kStageElements * sizeof(BFloat16);

constexpr int kBand = 8;  // groups of row tiles that run together and share captions in the L2 cache
constexpr float kLog2OfE = 1.44269504088896340736f;

__device__ __forceinline__ float exp_approx(float x) { return exp2_approx(x * kLog2OfE); }

// Tiles of a block and a warp in the matrix of logits.
struct TilePlace {
  int row_tile, column_tile;  // of the block; place_of_block sets row_tile to its group of row tiles
  int warp_row, warp_column;  // of the warp in the block

  __device__ __forceinline__ int row() const { return row_tile * kRows + warp_row * kWarpSide; }
  __device__ __forceinline__ int column() const { return column_tile * kColumns + warp_column * kWarpSide; }

  // The warp's column with the caption of its first row; kWarpSide or -kWarpSide if no row has its caption
  // here.
  __device__ __forceinline__ int pair(int64_t offset) const {
    const int64_t pair = row() + offset - column();
    return static_cast<int>(max(min(pair, int64_t{kWarpSide}), int64_t{-kWarpSide}));
  }
};

// Returns the tile of this block, for `groups` x ceil(columns / kColumns) blocks. Consecutive blocks differ
// in group.
__device__ __forceinline__ TilePlace place_of_block(int groups, int columns) {
  const int block = static_cast<int>(blockIdx.x), warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int band = kBand * ceil_div(columns, kColumns), first = block / band * kBand;
  const int height = min(groups - first, kBand), inside = block % band;
  return {first + inside % height, inside / height, warp % kWarpRows, warp / kWarpRows};
}

// Copies channels [first, first + kDepth) of `count` rows, with cp.async if rows are `wide`; zeros after the
// last row and channel. A thread has the same channels of each row.
template <class T>
__device__ __forceinline__ void copy_rows(T* to, const void* matrix, int begin, int count, int64_t rows,
                                          int width, int first, bool wide) {
  constexpr int kChunks = kDepth / kChunk, kRowsAtOnce = kThreads / kChunks;
  const int thread = static_cast<int>(threadIdx.x), row = thread / kChunks;
  const int channel = first + thread % kChunks * kChunk, left = static_cast<int>(width) - channel;
  const int rows_left = static_cast<int>(rows) - begin - row;
  const T* from = static_cast<const T*>(matrix) + int64_t{begin + row} * width + channel;
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

// The warp's row and column of a lane's slot.
__device__ __forceinline__ int row_of(int slot, int lane) {
  return slot / 2 * kTile + row_in_tile(lane, slot % 2 * 2);
}
__device__ __forceinline__ int column_of(int slot, int lane) {
  return slot / 4 * kTile + column_in_tile(lane, slot % 2 + slot / 2 % 2 * 4);
}

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

// The logit scale or bias.
__device__ __forceinline__ float load_scalar(const void* scalar, DType dtype) {
  float values[1];
  load_floats(scalar, dtype, 0, values);
  return values[0];
}

// A warp's products of 64 images and 64 captions over all channels.
template <class T>
__device__ __forceinline__ void multiply(WarpLogits& logits, const ContrastiveFeatures& features,
                                         const TilePlace& place, bool wide) {
  T* const stages = dynamic_shared_memory<T>();
  const auto copy_stage = [&](int first) {
    T* const stage = stages + first / kDepth % 2 * kStageElements;
    copy_rows(stage, features.image, place.row_tile * kRows, kRows, features.rows, features.width, first,
              wide);
    copy_rows(stage + kRows * kStride, features.text, place.column_tile * kColumns, kColumns,
              features.columns, features.width, first, wide);
  };
  const int width = static_cast<int>(features.width);
  copy_stage(0);
  int first = 0;
  do {
    wait_for_copies();
    __syncthreads();  // The stage has arrived, and nobody reads the one before it. #features
    if (first + kDepth < width) copy_stage(first + kDepth);
    const T* const image =
        stages + first / kDepth % 2 * kStageElements + place.warp_row * kWarpSide * kStride;
    const T* const text =
        stages + first / kDepth % 2 * kStageElements + (kRows + place.warp_column * kWarpSide) * kStride;
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

// Whether rows of features can be copied by 16 bytes.
inline bool are_rows_wide(const ContrastiveFeatures& features) {
  const auto is_aligned = [](const void* data) {
    return reinterpret_cast<uintptr_t>(data) % kWidestAccess == 0;
  };
  return features.width % kChunk == 0 && is_aligned(features.image) && is_aligned(features.text);
}

}  // namespace
}  // namespace evakernels::cuda
