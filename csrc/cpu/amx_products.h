// Products of bfloat16 on AMX's tiles: 16 rows of a panel, of 16 pairs each, by 16 pairs of 16 columns of a
// pair matrix, added to 16 rows of 16 sums.
//
// Nothing here has run on such a processor yet: its machine code is tested on an emulator.
#pragma once

#if defined(__AMX_BF16__)

#include "cpu/pair_matrices.h"

namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE {

constexpr int64_t kTileRows = 16;

// Two tiles.
constexpr int64_t kPanelRows = 2 * kTileRows;
constexpr int64_t kPanelChunk = kPanelRows * kChunkPairs;

// Products take pairs in steps of so many, a tile's.
constexpr int64_t kPairStep = kTileRows;

// Eight tiles of 16 rows of 64 bytes.
struct alignas(64) TileShapes {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
constexpr TileShapes kTileShapes = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// A thread multiplies between these two.
static inline void begin_products() { _tile_loadconfig(&kTileShapes); }
static inline void end_products() { _tile_release(); }

// c[row.., vector..] = a b: kPanelRows rows, one or two vectors. Tiles are named by number: 0 to 3 are sums,
// 0 and 1 the upper ones; 4 and 5 are of a, 6 and 7 of b.
template <int kVectors>
static inline void multiply_block(const Product& product, const uint32_t* a, int64_t row, int64_t vector) {
  constexpr bool kBoth = kVectors == 2;
  constexpr int64_t kRowBytes = kChunkPairs * sizeof(uint32_t);
  const int64_t b_bytes = product.b_stride * sizeof(uint32_t), c_bytes = product.c_stride * sizeof(float);
  const uint32_t* b = product.b + vector * kLanes;
  float* upper = product.c + row * product.c_stride + vector * kLanes;
  float* lower = upper + kTileRows * product.c_stride;
  asm volatile("" ::: "memory");  // loads of tiles don't tell GCC that they read
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

// Rows of c from `row` on, of a panel a.
static inline void multiply_rows(const Product& product, const uint32_t* a, int64_t row) {
  int64_t vector = 0;
  for (; vector + 1 < product.vectors; vector += 2) multiply_block<2>(product, a, row, vector);
  if (vector < product.vectors) multiply_block<1>(product, a, row, vector);
}

__attribute__((noinline)) static void multiply_panel(const Product& product) {
  multiply_rows(product, product.a, 0);
}

// Tiles don't read columns, so a panel is made of these. Of at most kChunkPairs pairs.
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
