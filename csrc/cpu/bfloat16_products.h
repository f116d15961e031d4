// bfloat16 matmuls with AVX512_BF16: vdpbf16ps adds the products of a pair.
#pragma once

#if defined(__AVX512BF16__)

#include "cpu/pair_matrices.h"

namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE {

// Divisible by the rows of every block below.
constexpr int64_t kPanelRows = 24;
constexpr int64_t kPanelChunk = kPanelRows * kChunkPairs;

// Pairs per step.
constexpr int64_t kPairStep = 1;

// AMX needs these around matmuls.
static inline void begin_products() {}
static inline void end_products() {}

// c[row.., vector..] = a b: kRows * kVectors sums fit into registers and hide the latency.
template <int kRows, int kVectors, int kRowDistance>
static inline void multiply_block(const Product& product, int64_t row, int64_t vector) {
  float* c = product.c + row * product.c_stride + vector * kLanes;
  const int64_t c_stride = product.c_stride, a_step = product.a_step, b_stride = product.b_stride;
  __m512 sums[kRows][kVectors];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) sums[i][j] = _mm512_setzero_ps();
  }
  if (product.add) {
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kVectors; ++j) sums[i][j] = _mm512_load_ps(c + i * c_stride + j * kLanes);
    }
  }
  const uint32_t* b = product.b + vector * kLanes;
  const uint32_t* chunk = product.a + row * kRowDistance;
  for (int64_t rest = product.pairs; rest > 0; rest -= kChunkPairs, chunk += product.a_chunk) {
    const uint32_t* a = chunk;
    for (int64_t pair = rest < kChunkPairs ? rest : kChunkPairs; pair > 0; --pair) {
      __m512i right[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) right[j] = _mm512_load_si512(b + j * kLanes);
#pragma GCC unroll 12
      for (int i = 0; i < kRows; ++i) {
        const __m512i left = _mm512_set1_epi32(static_cast<int>(a[i * kRowDistance]));
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) {
          sums[i][j] = _mm512_dpbf16_ps(sums[i][j], (__m512bh)left, (__m512bh)right[j]);
        }
      }
      a += a_step;
      b += b_stride;
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) _mm512_store_ps(c + i * c_stride + j * kLanes, sums[i][j]);
  }
}

template <int kRows, int kVectors, int kRowDistance>
static inline void multiply_columns(const Product& product, int64_t vector) {
  for (int64_t row = 0; row < product.rows; row += kRows) {
    multiply_block<kRows, kVectors, kRowDistance>(product, row, vector);
  }
}

// Not inlined, to limit code size.
template <int kRowDistance>
__attribute__((noinline)) static void multiply(const Product& product) {
  // Widths of blocks differ by at most one.
  int64_t blocks = (product.vectors + 3) / 4;
  for (int64_t vector = 0; vector < product.vectors; --blocks) {
    const int64_t width = (product.vectors - vector + blocks - 1) / blocks;
    switch (width) {
      case 4:
        multiply_columns<6, 4, kRowDistance>(product, vector);
        break;
      case 3:
        multiply_columns<8, 3, kRowDistance>(product, vector);
        break;
      case 2:
        multiply_columns<12, 2, kRowDistance>(product, vector);
        break;
      default:
        multiply_columns<12, 1, kRowDistance>(product, vector);
    }
    vector += width;
  }
}

static inline void multiply_panel(const Product& product) { multiply<kChunkPairs>(product); }
static inline void multiply_transposed(const Product& product) { multiply<1>(product); }

}  // namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE

#endif
