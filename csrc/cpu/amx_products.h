// bfloat16 matmuls on AMX tiles: a tile multiply adds a 16 x 32 block of a panel times a 32 x 16 block of a
// pair matrix to 16 x 16 float32 sums. Four sums are kept at a time, so four tile loads feed four multiplies.
#pragma once

#if defined(__AMX_BF16__)

#include "cpu/pair_matrices.h"

namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE {

constexpr int64_t kTileRows = 16;

// A panel is two tiles high.
constexpr int64_t kPanelRows = 2 * kTileRows;
constexpr int64_t kPanelChunk = kPanelRows * kChunkPairs;

// Pairs per tile multiply.
constexpr int64_t kPairStep = kTileRows;

// Eight tiles of 16 rows of 64 bytes.
struct alignas(64) TileShapes {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
constexpr TileShapes kTileShapes = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// A thread calls begin_products before its first multiply and end_products after its last.
static inline void begin_products() { _tile_loadconfig(&kTileShapes); }
static inline void end_products() { _tile_release(); }

// c[row.., vector..] = a b, or += if product.add: kPanelRows rows, one or two vectors of columns.
// Tiles: 0, 1 upper sums; 2, 3 lower sums; 4, 5 rows of a; 6, 7 columns of b.
template <int kVectors>
static inline void multiply_block(const Product& product, const uint32_t* a, int64_t row, int64_t vector) {
  constexpr bool kBoth = kVectors == 2;
  constexpr int64_t kRowBytes = kChunkPairs * sizeof(uint32_t);
  const int64_t b_bytes = product.b_stride * sizeof(uint32_t), c_bytes = product.c_stride * sizeof(float);
  const uint32_t* b = product.b + vector * kLanes;
  float* upper = product.c + row * product.c_stride + vector * kLanes;
  float* lower = upper + kTileRows * product.c_stride;
  asm volatile("" ::: "memory");  // GCC ignores that tile loads read memory
  if (product.add) {
    _tile_loadd(0, upper, c_bytes);
    _tile_loadd(2, lower, c_bytes);
    if constexpr (kBoth) {
      _tile_loadd(1, upper + kLanes, c_bytes);
      _tile_loadd(3, lower + kLanes, c_bytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t rest = product.pairs; rest > 0; rest -= kChunkPairs, a += product.a_chunk) {
    for (int64_t pair = 0; pair < rest && pair < kChunkPairs; pair += kPairStep) {
      _tile_loadd(4, a + pair, kRowBytes);
      _tile_loadd(6, b, b_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, a + pair + kTileRows * kChunkPairs, kRowBytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kBoth) {
        _tile_loadd(7, b + kLanes, b_bytes);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
      b += kPairStep * product.b_stride;
    }
  }
  _tile_stored(0, upper, c_bytes);
  _tile_stored(2, lower, c_bytes);
  if constexpr (kBoth) {
    _tile_stored(1, upper + kLanes, c_bytes);
    _tile_stored(3, lower + kLanes, c_bytes);
  }
}

// Rows of c from `row` on; `a` is one panel.
static inline void multiply_rows(const Product& product, const uint32_t* a, int64_t row) {
  int64_t vector = 0;
  for (; vector + 1 < product.vectors; vector += 2) multiply_block<2>(product, a, row, vector);
  if (vector < product.vectors) multiply_block<1>(product, a, row, vector);
}

__attribute__((noinline)) static void multiply_panel(const Product& product) {
  multiply_rows(product, product.a, 0);
}

// c = a^T b with at most kChunkPairs pairs. Tiles can't read columns, so a's are transposed into a panel.
__attribute__((noinline)) static void multiply_transposed(const Product& product) {
  alignas(64) uint32_t panel[kPanelChunk];
  for (int64_t row = 0; row < product.rows; row += kPanelRows) {
    for (int64_t pair = 0; pair < product.pairs; pair += kLanes) {
      transpose_rows(product.a + pair * product.a_step + row, product.a_step, kPanelRows / kLanes,
                     panel + pair, kChunkPairs);
    }
    multiply_rows(product, panel, row);
  }
}

}  // namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE

#endif
