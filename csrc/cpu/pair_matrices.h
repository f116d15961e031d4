// bfloat16 operands of a matmul with float32 sums. A pair is two neighbours along the reduction axis.
//
// The left operand is a panel of rows or the transpose of a pair matrix. The right operand is a pair matrix,
// with one row per pair.
#pragma once

#include "cpu/simd.h"

namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE {

// A panel is a stack of chunks of this many pairs per row, so that the row stride is a compile-time constant.
constexpr int64_t kChunkPairs = 64;

struct Product {
  const uint32_t* a;  // panel: rows kChunkPairs apart; transposed pair matrix: 1
  int64_t a_step;     // stride of pairs
  int64_t a_chunk;    // stride of chunks
  const uint32_t* b;  // pair matrix, aligned to a vector
  int64_t b_stride;   // stride of pair rows; all strides are multiples of kLanes
  float* c;
  int64_t c_stride;
  int64_t rows;     // of c, rounded up to a whole block
  int64_t vectors;  // of kLanes columns of c
  int64_t pairs;    // a multiple of kPairStep
  bool add;         // accumulate into c
};

// Lane i is the pair (a[i], b[i]).
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

// target[i] = pairs (slab[2 i], slab[2 i + 1]) of rows [0, rows); rows is even.
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

// Transposes kLanes rows: target[pair][row] = source[row][pair], for `vectors` vectors of pairs.
static inline void transpose_rows(const uint32_t* source, int64_t source_stride, int64_t vectors,
                                  uint32_t* target, int64_t stride) {
  for (int64_t vector = 0; vector < vectors; ++vector) {
    U32 rows[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      __builtin_memcpy(&rows[i], source + i * source_stride + vector * kLanes, sizeof rows[i]);
    }
    transpose_square(rows);
    for (int i = 0; i < kLanes; ++i) store_pairs(target + (vector * kLanes + i) * stride, rows[i]);
  }
}

}  // namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE
