// mma.m16n8k16 on 16 x 16 tiles of 16-bit elements, and ldmatrix to load them; compute capability 8.0 and
// later. Register layouts as in the PTX ISA.
#pragma once

#include "cuda/elements.cuh"

namespace evakernels::cuda {

constexpr int kTile = 16;

// 16 x 16 elements of operand A: two neighbours in a row per lane and quarter. Quarters: (top, left),
// (bottom, left), (top, right), (bottom, right).
struct FragmentA {
  uint32_t words[4];
};

// 16 x 16 elements of operand B for two instructions: (top, left), (bottom, left) and (top, right), (bottom,
// right). A lane's neighbours are in a column.
struct FragmentB {
  uint32_t words[4];
};

// 16 x 16 sums. Element i of a lane is at row_in_tile(lane, i), column_in_tile(lane, i).
struct Accumulator {
  float values[8];
};

__device__ __forceinline__ int row_in_tile(int lane, int i) { return lane / 4 + (i & 2) * 4; }
__device__ __forceinline__ int column_in_tile(int lane, int i) {
  return lane % 4 * 2 + (i & 1) + (i & 4) * 2;
}

// Loads four 8 x 8 matrices; lane l passes the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void ldmatrix(uint32_t (&words)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&words)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void mma_m16n8k16(float* sums, const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                             BFloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_m16n8k16(float* sums, const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                             Float16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The address that a lane passes to ldmatrix. Quarters by rows first, (top, left), (bottom, left), ..., or by
// columns first, (top, left), (top, right), ...: so that the registers match the operand, plain or
// transposed. `stride`: row stride in elements.
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

// A tile in shared memory as operand A or B.
template <class T>
__device__ __forceinline__ FragmentA load_a(const T* corner, int stride) {
  FragmentA tile;
  ldmatrix(tile.words, lane_row_by_rows(corner, stride));
  return tile;
}
template <class T>
__device__ __forceinline__ FragmentB load_b(const T* corner, int stride) {
  FragmentB tile;
  ldmatrix_transposed(tile.words, lane_row_by_rows(corner, stride));
  return tile;
}

// Its transpose as operand A or B.
template <class T>
__device__ __forceinline__ FragmentA load_a_transposed(const T* corner, int stride) {
  FragmentA tile;
  ldmatrix_transposed(tile.words, lane_row_by_columns(corner, stride));
  return tile;
}
template <class T>
__device__ __forceinline__ FragmentB load_b_transposed(const T* corner, int stride) {
  FragmentB tile;
  ldmatrix(tile.words, lane_row_by_columns(corner, stride));
  return tile;
}

// sums += a * b.
template <class T>
__device__ __forceinline__ void mma(Accumulator& sums, const FragmentA& left, const FragmentB& right) {
  mma_m16n8k16(sums.values, left.words, right.words[0], right.words[1], T{});
  mma_m16n8k16(sums.values + 4, left.words, right.words[2], right.words[3], T{});
}

// Stores the sums times `factor` into a tile in shared memory.
template <class T>
__device__ __forceinline__ void store_tile(const Accumulator& sums, float factor, T* corner, int stride) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    const float pair[2] = {sums.values[i] * factor, sums.values[i + 1] * factor};
    store_floats(corner + row_in_tile(lane, i) * stride + column_in_tile(lane, i), pair);
  }
}

// Rounds sums to operand A: both have the same layout over lanes.
template <class T>
__device__ __forceinline__ FragmentA as_fragment_a(const Accumulator& sums) {
  FragmentA tile;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    tile.words[i] = pack_pair(sums.values[2 * i], sums.values[2 * i + 1], T{});
  }
  return tile;
}

// Stores operand A into a tile in shared memory.
template <class T>
__device__ __forceinline__ void store_a(const FragmentA& tile, T* corner, int stride) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    T* const pair = corner + row_in_tile(lane, 2 * i) * stride + column_in_tile(lane, 2 * i);
    store(reinterpret_cast<uint32_t*>(pair), tile.words[i]);
  }
}

}  // namespace evakernels::cuda
