// What tensor cores multiply, 16 x 16 elements of 16 bits at a time, and how these get into registers; for
// compute capability 8.0 and later. The layouts over the lanes of a warp are those of the PTX ISA for
// mma.m16n8k16 and ldmatrix.
#pragma once

#include "cuda/elements.cuh"

namespace evakernels::cuda {

constexpr int kTile = 16;

// 16 x 16 elements. A lane has two neighbours of each quarter; the quarters are, in this order, (top, left),
// (bottom, left), (top, right), (bottom, right).
struct Fragment {
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

// Columns [0, 8) of b are in its first and third word, the others in the rest.
template <class T>
__device__ __forceinline__ void multiply_tiles(float (&sums)[8], const uint32_t (&a)[4],
                                               const uint32_t (&b)[4], T) {
  multiply(sums, a, b[0], b[2], T{});
  multiply(sums + 4, a, b[1], b[3], T{});
}

// The row of a tile in shared memory whose address is this lane's to bring. `stride`: elements from row to
// row.
template <class T>
__device__ __forceinline__ const T* lane_row(const T* corner, int stride) {
  const int lane = threadIdx.x % kWarpSize;
  return corner + lane % kTile * stride + lane / kTile * 8;
}

// A tile M; as the right factor it stands for its transpose.
template <class T>
__device__ __forceinline__ Fragment load_tile(const T* corner, int stride) {
  Fragment tile;
  load_matrices(tile.words, lane_row(corner, stride));
  return tile;
}

// A tile M; as the right factor it stands for itself.
template <class T>
__device__ __forceinline__ Fragment load_tile_transposed(const T* corner, int stride) {
  uint32_t words[4];
  load_matrices_transposed(words, lane_row(corner, stride));
  return {{words[0], words[2], words[1], words[3]}};
}

// sums += left * right.
template <class T>
__device__ __forceinline__ void multiply_add(Accumulator& sums, const Fragment& left, const Fragment& right) {
  multiply_tiles(sums.values, left.words, right.words, T{});
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
__device__ __forceinline__ Fragment as_fragment(const Accumulator& sums) {
  Fragment tile;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    tile.words[i] = round_pair(sums.values[2 * i], sums.values[2 * i + 1], T{});
  }
  return tile;
}

// A fragment to where it belongs in a tile in shared memory.
template <class T>
__device__ __forceinline__ void store_fragment(const Fragment& tile, T* corner, int stride) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    T* const pair = corner + row_in_tile(lane, 2 * i) * stride + column_in_tile(lane, 2 * i);
    store(reinterpret_cast<uint32_t*>(pair), tile.words[i]);
  }
}

}  // namespace evakernels::cuda
