// Compiled once for each instruction set.
//
// A row is read two or three times (mean, squared deviations, output) instead of once with a running mean: it
// stays in the L1 cache, and the two-pass variance is accurate when the mean is large.
#include "cpu/layer_norm_kernels.h"

#include "cpu/simd.h"

namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE {
namespace {

template <class T>
float row_mean(const T* x, int64_t width) {
  float sum[1];
  sum_over_row(width, sum, [&](int64_t i, auto part, F32* sums) { sums[0] += load(x + i, part); });
  return sum[0] / static_cast<float>(width);
}

template <class T>
float row_variance(const T* x, float mean, int64_t width) {
  float sum[1];
  sum_over_row(width, sum, [&](int64_t i, auto part, F32* sums) {
    const F32 deviation = zero_beyond(load(x + i, part) - mean, part);
    sums[0] += deviation * deviation;
  });
  return sum[0] / static_cast<float>(width);
}

template <class T>
void forward_rows(const LayerNormForward& params, const float* weight, const float* bias, int64_t begin,
                  int64_t end) {
  const int64_t width = params.width;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(params.x) + row * width;
    T* y = static_cast<T*>(params.y) + row * width;
    const float mean = params.rms ? 0.0f : row_mean(x, width);
    const float rstd = 1.0f / __builtin_sqrtf(row_variance(x, mean, width) + params.eps);
    for_each_vector(width, [&](int64_t i, auto part) {
      const F32 normalised = (load(x + i, part) - mean) * rstd;
      store(y + i, normalised * load(weight + i, part) + load(bias + i, part), part);
    });
    if (!params.rms) params.mean[row] = mean;
    params.rstd[row] = rstd;
  }
}

template <class T>
void backward_rows(const LayerNormBackward& params, const float* weight, float* dweight, float* dbias,
                   int64_t begin, int64_t end) {
  const int64_t width = params.width;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(params.x) + row * width;
    const T* dy = static_cast<const T*>(params.dy) + row * width;
    T* dx = static_cast<T*>(params.dx) + row * width;
    const float mean = params.rms ? 0.0f : params.mean[row];
    const float rstd = params.rstd[row];

    float sum[2];  // of the gradient with respect to the normalised row: as it is, and times that row
    sum_over_row(width, sum, [&](int64_t i, auto part, F32* sums) {
      const F32 gradient = load(dy + i, part) * load(weight + i, part);
      sums[0] += gradient;
      sums[1] += gradient * ((load(x + i, part) - mean) * rstd);
    });
    const float shift = params.rms ? 0.0f : sum[0] / static_cast<float>(width);
    const float slope = sum[1] / static_cast<float>(width);

    for_each_vector(width, [&](int64_t i, auto part) {
      const F32 upstream = load(dy + i, part);
      const F32 normalised = (load(x + i, part) - mean) * rstd;
      const F32 gradient = upstream * load(weight + i, part);
      store(dx + i, (gradient - shift - normalised * slope) * rstd, part);
      if (dweight) store(dweight + i, load(dweight + i, part) + upstream * normalised, part);
      if (dbias) store(dbias + i, load(dbias + i, part) + upstream, part);
    });
  }
}

void forward(const LayerNormForward& params, const float* weight, const float* bias, int64_t begin,
             int64_t end) {
  switch (params.dtype) {
    case DType::Float32:
      return forward_rows<float>(params, weight, bias, begin, end);
    case DType::BFloat16:
      return forward_rows<BFloat16>(params, weight, bias, begin, end);
    case DType::Float16:
      return forward_rows<Float16>(params, weight, bias, begin, end);
  }
}

void backward(const LayerNormBackward& params, const float* weight, float* dweight, float* dbias,
              int64_t begin, int64_t end) {
  switch (params.dtype) {
    case DType::Float32:
      return backward_rows<float>(params, weight, dweight, dbias, begin, end);
    case DType::BFloat16:
      return backward_rows<BFloat16>(params, weight, dweight, dbias, begin, end);
    case DType::Float16:
      return backward_rows<Float16>(params, weight, dweight, dbias, begin, end);
  }
}

}  // namespace

const LayerNormKernels layer_norm = {forward, backward};

}  // namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE
