// The softmax of a query's scores, and its gradient.
#pragma once

#include "cpu/simd.h"

namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE {

static inline void clear(float* row, int64_t width) {
  for_each_vector(width, [&](int64_t i, auto part) { store(row + i, F32{}, part); });
}

// Scores of the `visible` keys become weights. Returns the logarithm of their denominator.
static inline float softmax_row(float* row, int64_t visible) {
  F32 highest = broadcast(-__builtin_inff());
  for_each_vector(visible, [&](int64_t i, auto part) {
    highest = larger(fill_beyond(load(row + i, part), -__builtin_inff(), part), highest);
  });
  const float shift = horizontal_max(highest);
  float sum[1];
  sum_over_row(visible, sum, [&](int64_t i, auto part, F32* sums) {
    const F32 e = exp(load(row + i, part) - shift);
    store(row + i, e, part);
    sums[0] += zero_beyond(e, part);
  });
  const float factor = 1.0f / sum[0];
  for_each_vector(visible, [&](int64_t i, auto part) { store(row + i, load(row + i, part) * factor, part); });
  return shift + __builtin_logf(sum[0]);
}

// Scores become weights again, and the weights' gradients those of the scores. mean: that of the weights'
// gradients under the weights.
static inline void softmax_row_backward(float* scores, float* gradients, int64_t visible, float lse,
                                        float mean) {
  for_each_vector(visible, [&](int64_t i, auto part) {
    const F32 weight = exp(load(scores + i, part) - lse);
    store(scores + i, weight, part);
    store(gradients + i, weight * (load(gradients + i, part) - mean), part);
  });
}

}  // namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE
