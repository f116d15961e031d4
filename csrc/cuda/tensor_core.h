// What tensor cores multiply, 16 x 16 elements of 16 bits at a time, and how these get into registers; for
// compute capability 8.0 and later. The layouts over the lanes of a warp are those of the PTX ISA for
// mma.m16n8k16 and ldmatrix.
#pragma once

#include "cuda/elements.cuh"

namespace evakernels::cuda {

constexpr int kTile = 16;

// 16 x 16 elements, the left factor of a product. A lane has two neighbours of each quarter; the quarters
// are, in this order, (top, left), (bottom, left), (top, right), (bottom, right).
struct LeftFragment {
  uint32_t words[4];
};

// The right factor: (top, left), (bottom, left), as one product takes them, and (top, right), (bottom,
// right); a lane's neighbours are in a column.
struct RightFragment {
  uint32_t words[4];
};

// 16 x 16 sums. A lane has elements i at row_in_tile(lane, i) and column_in_tile(lane, i).
struct Accumulator {
  float values[8];
};

__device__ __forceinline__ int row_in_tile(int lane, int i) { return lane / 4 + (i & 2) * 4; }
__device__ __forceinline__ int column_in_tile(int lane, int i) {
  return lane % 4 * 2 + (i & 1) + (i & 4) * 2;
}

// Four matrices of 8 x 8 elements in shared memory; lane l brings the address of row l % 8 of number l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&words)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void multiply(float* sums, const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                         BFloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply(float* sums, const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                         Float16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The addresses that a lane brings: of a row of the quarter that is its own, lane / 8. In the order of the
// rows first, (top, left), (bottom, left), ..., or of the columns, (top, left), (top, right), ...: so that
// what a product takes lies in the registers where it takes it, as it is or transposed. `stride`: elements
// from row to row.
template <class T>
__device__ __forceinline__ const T* lane_row_by_rows(const T* corner, int stride) {
  const int lane = threadIdx.x % kWarpSize;
  return corner + lane % kTile * stride + lane / kTile * 8;
}
template <class T>
__device__ __forceinline__ const T* lane_row_by_columns(const T* corner, int stride) {
  const int lane = threadIdx.x % kWarpSize;
  return corner + (lane % 8 + lane / kTile * 8) * stride + lane / 8 % 2 * 8;
}

// A tile M in shared memory.
template <class T>
__device__ __forceinline__ LeftFragment load_left(const T* corner, int stride) {
  LeftFragment tile;
  load_matrices(tile.words, lane_row_by_rows(corner, stride));
  return tile;
}
template <class T>
__device__ __forceinline__ RightFragment load_right(const T* corner, int stride) {
  RightFragment tile;
  load_matrices_transposed(tile.words, lane_row_by_rows(corner, stride));
  return tile;
}

// Its transpose.
template <class T>
__device__ __forceinline__ LeftFragment load_left_transposed(const T* corner, int stride) {
  LeftFragment tile;
  load_matrices_transposed(tile.words, lane_row_by_columns(corner, stride));
  return tile;
}
template <class T>
__device__ __forceinline__ RightFragment load_right_transposed(const T* corner, int stride) {
  RightFragment tile;
  load_matrices(tile.words, lane_row_by_columns(corner, stride));
  return tile;
}

// sums += left * right.
template <class T>
__device__ __forceinline__ void multiply_add(Accumulator& sums, const LeftFragment& left,
                                             const RightFragment& right) {
  multiply(sums.values, left.words, right.words[0], right.words[1], T{});
  multiply(sums.values + 4, left.words, right.words[2], right.words[3], T{});
}

// Two neighbours of each quarter of the sums, times `factor`, to where they belong in a tile in shared
// memory.
template <class T>
__device__ __forceinline__ void store_tile(const Accumulator& sums, float factor, T* corner, int stride) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    const float pair[2] = {sums.values[i] * factor, sums.values[i + 1] * factor};
    store_floats(corner + row_in_tile(lane, i) * stride + column_in_tile(lane, i), pair);
  }
}

// Sums as the left factor of a product: a lane's are where it has them already.
template <class T>
__device__ __forceinline__ LeftFragment as_left(const Accumulator& sums) {
  LeftFragment tile;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    tile.words[i] = round_pair(sums.values[2 * i], sums.values[2 * i + 1], T{});
  }
  return tile;
}

// To where it belongs in a tile in shared memory.
template <class T>
__device__ __forceinline__ void store_left(const LeftFragment& tile, T* corner, int stride) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    T* const pair = corner + row_in_tile(lane, 2 * i) * stride + column_in_tile(lane, 2 * i);
    store(reinterpret_cast<uint32_t*>(pair), tile.words[i]);
  }
}

}  // namespace evakernels::cuda
