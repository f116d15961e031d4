// Matrix products of bfloat16 with sums in float32, for AVX-512 with its BF16 extension. A pair is two
// neighbours along the axis that is summed over: vdpbf16ps adds the products of both.
//
// The left matrix is a panel of kPanelRows rows, or the transpose of a pair matrix. A pair matrix has a row
// for each pair, which holds that pair of every column; it is what stands at the right.
#pragma once

#if defined(__AVX512BF16__)

#include "cpu/transpose.h"

namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE {

// Divisible by the rows of every block of the products below.
constexpr int64_t kPanelRows = 24;

// A panel is a stack of chunks of so many pairs a row, so that the distance of rows is known to the compiler.
constexpr int64_t kChunkPairs = 64;
constexpr int64_t kPanelChunk = kPanelRows * kChunkPairs;

struct Product {
  const uint32_t* a;  // panel: rows kChunkPairs apart; transposed pair matrix: 1
  int64_t a_step;     // from pair to pair
  int64_t a_chunk;    // from chunk to chunk
  const uint32_t* b;  // pair matrix, aligned to a vector
  int64_t b_stride;   // of pair rows, as are all strides a multiple of kLanes
  float* c;
  int64_t c_stride;
  int64_t rows;     // of c; up to a whole block more are written
  int64_t vectors;  // of kLanes columns of c
  int64_t pairs;
  bool add;  // to what c holds
};

// c[row.., vector..] = a b: kRows * kVectors sums, few enough for the registers and enough to hide the
// latency.
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

// Not inline: four kinds of blocks are enough code once.
template <int kRowDistance>
__attribute__((noinline)) static void multiply(const Product& product) {
  // Blocks of equal width, give or take one.
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

// --- pair matrices -----------------------------------------------------------------------------------------

// Two rows as one of pairs: lane i has a[i] below b[i].
static inline U32 interleave(U16 a, U16 b) { return zero_extend(a) | (zero_extend(b) << 16); }

static inline void store_pairs(uint32_t* target, U32 pairs) {
  __builtin_memcpy(target, &pairs, sizeof pairs);
}

static inline void store_bits(BFloat16* target, U16 bits) { __builtin_memcpy(target, &bits, sizeof bits); }

static inline U16 load_bits(const BFloat16* source) {
  U16 bits;
  __builtin_memcpy(&bits, source, sizeof bits);
  return bits;
}

// Rows [0, rows) of a slab as rows of pairs of rows: target[i] = (slab[2 i], slab[2 i + 1]). rows is even.
static inline void pair_rows(const uint32_t* slab, int64_t rows, int64_t vectors, uint32_t* target,
                             int64_t stride) {
  for (int64_t row = 0; row < rows; row += 2) {
    const auto* a = reinterpret_cast<const BFloat16*>(slab + row * kChunkPairs);
    const BFloat16* b = a + 2 * kChunkPairs;
    for (int64_t i = 0; i < vectors; ++i) {
      const U32 pairs = interleave(load_bits(a + i * kLanes), load_bits(b + i * kLanes));
      store_pairs(target + row / 2 * stride + i * kLanes, pairs);
    }
  }
}

// kLanes rows of a slab as columns: target[pair][row] = slab[row][pair], for `vectors` vectors of pairs.
static inline void transpose_rows(const uint32_t* slab, int64_t vectors, uint32_t* target, int64_t stride) {
  for (int64_t vector = 0; vector < vectors; ++vector) {
    U32 rows[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      __builtin_memcpy(&rows[i], slab + i * kChunkPairs + vector * kLanes, sizeof rows[i]);
    }
    transpose_square(rows);
    for (int i = 0; i < kLanes; ++i) store_pairs(target + (vector * kLanes + i) * stride, rows[i]);
  }
}

}  // namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE

#endif
