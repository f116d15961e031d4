// Statistics of a row and of its gradient, for all norm kernels.
//
// Two-pass variance: accurate for a large mean, and the row stays in the L1 cache.
#pragma once

#include "cpu/simd.h"

namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE {

template <class T>
static inline float row_sum(const T* x, int64_t width) {
  float sum[1];
  sum_over_row(width, sum, [&](int64_t i, auto part, F32* sums) { sums[0] += load(x + i, part); });
  return sum[0];
}

// Sum of body(offset, deviations from the mean) over all vectors.
template <class T, class Body>
static inline float sum_of_deviations(const T* x, float mean, int64_t width, const Body& body) {
  float sum[1];
  sum_over_row(width, sum, [&](int64_t i, auto part, F32* sums) {
    sums[0] += body(i, zero_beyond(load(x + i, part) - mean, part));
  });
  return sum[0];
}

struct RowStatistics {
  float mean;
  float rstd;
};

// Statistics of a row with the given sum; the mean is 0 with `rms`. If the mean's rounding error is large
// compared with the deviations, their mean is added. Calls meanwhile(offset) for every vector, to prefetch
// the next row.
template <class T, class Body>
static inline RowStatistics row_statistics(const T* x, float sum, float eps, bool rms, int64_t width,
                                           const Body& meanwhile) {
  const float count = static_cast<float>(width);
  float mean = rms ? 0.0f : sum / count;
  float squares = sum_of_deviations(x, mean, width, [&](int64_t i, F32 deviation) {
    meanwhile(i);
    return deviation * deviation;
  });
  if (mean * mean * count > 100.0f * squares) {
    mean += sum_of_deviations(x, mean, width, [](int64_t, F32 deviation) { return deviation; }) / count;
    squares = sum_of_deviations(x, mean, width, [](int64_t, F32 deviation) { return deviation * deviation; });
  }
  return {mean, 1.0f / __builtin_sqrtf(squares / count + eps)};
}

// Gradient of a norm: dx = (g - shift - normalised * slope) * rstd, with g the gradient of the normalised
// row. g is rounded (no FMA) before it is summed and subtracted: in a row of one element the terms cancel,
// and rstd = 1 / sqrt(eps) would amplify a rounding difference.
struct RowGradient {
  float mean;
  float rstd;
  float shift;  // mean of g; 0 without a mean
  float slope;  // mean of g times the normalised row

  F32 normalised(F32 x) const { return (x - mean) * rstd; }
  F32 of_x(F32 gradient, F32 normalised) const {
    return (rounded(gradient) - shift - normalised * slope) * rstd;
  }
};

// g = dy * weight. mean is null for a norm without one.
template <class D, class T>
static inline RowGradient row_gradient(const D* dy, const T* x, const float* weight, const float* mean,
                                       float rstd, int64_t width) {
  RowGradient row = {mean ? *mean : 0.0f, rstd, 0.0f, 0.0f};
  float sum[2];
  sum_over_row(width, sum, [&](int64_t i, auto part, F32* sums) {
    const F32 gradient = rounded(load(dy + i, part) * load(weight + i, part));
    sums[0] += gradient;
    sums[1] += gradient * row.normalised(load(x + i, part));
  });
  if (mean) row.shift = sum[0] / static_cast<float>(width);
  row.slope = sum[1] / static_cast<float>(width);
  return row;
}

}  // namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE
