// Matrix products in float32 of small matrices that lie in the cache.
#pragma once

#include "cpu/simd.h"

namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE {

// Rows of a tile, and vectors of columns at a time: kTileRows * kTileVectors sums, few enough for the
// registers and enough to hide the latency.
#if defined(__AVX512F__)
constexpr int kTileRows = 8;
#else
constexpr int kTileRows = 4;
#endif
constexpr int kTileVectors = 3;

// c = a b, or c += a b, for kTileRows rows.
struct TileProduct {
  const float* a;  // element [row][step]
  int64_t a_row;   // distances in elements
  int64_t a_step;
  const float* b;  // [step][column]
  int64_t b_stride;
  float* c;  // [row][column]
  int64_t c_stride;
  int64_t vectors;  // of kLanes columns
  int64_t steps;
  bool add;
};

template <int kVectors>
static inline void multiply_columns(const TileProduct& product, int64_t vector) {
  const int64_t a_row = product.a_row, a_step = product.a_step, b_stride = product.b_stride;
  float* c = product.c + vector * kLanes;
  F32 sums[kTileRows][kVectors] = {};
  const float* a = product.a;
  const float* b = product.b + vector * kLanes;
  for (int64_t step = product.steps; step > 0; --step, a += a_step, b += b_stride) {
    F32 right[kVectors];
#pragma GCC unroll 3
    for (int j = 0; j < kVectors; ++j) right[j] = load(b + j * kLanes, Whole{});
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
      const F32 left = broadcast(a[i * a_row]);
#pragma GCC unroll 3
      for (int j = 0; j < kVectors; ++j) sums[i][j] += left * right[j];
    }
  }
  for (int i = 0; i < kTileRows; ++i) {
    for (int j = 0; j < kVectors; ++j) {
      float* to = c + i * product.c_stride + j * kLanes;
      // Added last: of thousands of keys one sum of all would lose digits, one of each panel's sums doesn't.
      store(to, product.add ? load(to, Whole{}) + sums[i][j] : sums[i][j], Whole{});
    }
  }
}

// Not inline: three kinds of columns are enough code once.
__attribute__((noinline)) static void multiply_tile(const TileProduct& product) {
  // Of equal width, give or take one.
  int64_t blocks = (product.vectors + kTileVectors - 1) / kTileVectors;
  for (int64_t vector = 0; vector < product.vectors; --blocks) {
    const int64_t width = (product.vectors - vector + blocks - 1) / blocks;
    switch (width) {
      case 3:
        multiply_columns<3>(product, vector);
        break;
      case 2:
        multiply_columns<2>(product, vector);
        break;
      default:
        multiply_columns<1>(product, vector);
    }
    vector += width;
  }
}

}  // namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE
