// The statistics of a row and of its gradient that the kernels of all norms take.
//
// A row is read two or three times (mean, squared deviations, output) instead of once with a running mean: it
// stays in the L1 cache, and the two-pass variance is accurate when the mean is large.
#pragma once

#include "cpu/simd.h"

namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE {

template <class T>
static inline float row_sum(const T* x, int64_t width) {
  float sum[1];
  sum_over_row(width, sum, [&](int64_t i, auto part, F32* sums) { sums[0] += load(x + i, part); });
  return sum[0];
}

// Sums up body(offset, deviations from the mean), called for every vector.
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

// Of a row whose elements add up to `sum`; the mean is 0 with `rms`. Rounding moves the mean: if that is
// large against the deviations, and all there is of them if the elements are equal, their own mean corrects
// it. Calls meanwhile(offset) for every vector: the pass over a row that is in the cache is the time to fetch
// another.
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

// The backward pass of a norm for one row: with g the gradient of the normalised row, that of x is
// (g - shift - normalised * slope) * rstd. g is rounded before it is summed and before the sums are
// subtracted: in a row of one element they cancel, and rstd, then 1 / sqrt(eps), would make what is left of a
// fused product large.
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
