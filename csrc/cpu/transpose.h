// The transpose of a square of vectors.
#pragma once

#include "cpu/simd.h"

namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE {

// Swaps what lies off the diagonal of each square of 2 kStep lanes in rows i and i + kStep.
template <int kStep>
static inline void swap_squares(U32 (&rows)[kLanes]) {
  U32 low, high;
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    low[lane] = lane & kStep ? kLanes + lane - kStep : lane;
    high[lane] = lane & kStep ? kLanes + lane : lane + kStep;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kStep) continue;
    const U32 a = rows[i], b = rows[i + kStep];
    rows[i] = shuffle(a, b, low);
    rows[i + kStep] = shuffle(a, b, high);
  }
}

// rows[i][j] and rows[j][i] change places.
template <int kStep = kLanes / 2>
static inline void transpose_square(U32 (&rows)[kLanes]) {
  swap_squares<kStep>(rows);
  if constexpr (kStep > 1) transpose_square<kStep / 2>(rows);
}

}  // namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE
