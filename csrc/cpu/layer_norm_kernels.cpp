// Compiled once for each instruction set.
#include "cpu/norm_rows.h"
#include "include/layer_norm.h"

namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE {
namespace {

// T: element type of x; Y: of y and dy.
template <class T, class Y>
void forward_rows(const LayerNormForward& params, const float* weight, const float* bias, int64_t begin,
                  int64_t end) {
  const int64_t width = params.width;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(params.x) + row * width;
    Y* y = static_cast<Y*>(params.y) + row * width;
    const float sum = params.rms ? 0.0f : row_sum(x, width);
    // Prefetches the next row while this one is in the cache.
    const T* next = row + 1 < end ? x + width : x;
    const RowStatistics statistics = row_statistics(x, sum, params.eps, params.rms, width,
                                                    [&](int64_t i) { __builtin_prefetch(next + i); });
    for_each_vector(width, [&](int64_t i, auto part) {
      const F32 normalised = (load(x + i, part) - statistics.mean) * statistics.rstd;
      store(y + i, normalised * load(weight + i, part) + load(bias + i, part), part);
    });
    if (!params.rms) params.mean[row] = statistics.mean;
    params.rstd[row] = statistics.rstd;
  }
}

template <class T, class Y>
void backward_rows(const LayerNormBackward& params, const float* weight, float* dweight, float* dbias,
                   int64_t begin, int64_t end) {
  const int64_t width = params.width;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(params.x) + row * width;
    const Y* dy = static_cast<const Y*>(params.dy) + row * width;
    T* dx = static_cast<T*>(params.dx) + row * width;
    const float* mean = params.rms ? nullptr : params.mean + row;
    const RowGradient gradient = row_gradient(dy, x, weight, mean, params.rstd[row], width);

    for_each_vector(width, [&](int64_t i, auto part) {
      const F32 upstream = load(dy + i, part);
      const F32 normalised = gradient.normalised(load(x + i, part));
      store(dx + i, gradient.of_x(upstream * load(weight + i, part), normalised), part);
      if (dweight) store(dweight + i, load(dweight + i, part) + upstream * normalised, part);
      if (dbias) store(dbias + i, load(dbias + i, part) + upstream, part);
    });
  }
}

// Calls body(T{}, Y{}) for the element types that norm_serves accepts.
template <class Params, class Body>
void with_element_types(const Params& params, const Body& body) {
  if (params.y_dtype == params.dtype) {
    with_element_type(params.dtype, [&](auto type) { body(type, type); });
  } else if (params.dtype == DType::Float32) {
    with_element_type(params.y_dtype, [&](auto y) { body(float{}, y); });
  } else {
    with_element_type(params.dtype, [&](auto x) { body(x, float{}); });
  }
}

void forward(const LayerNormForward& params, const float* weight, const float* bias, int64_t begin,
             int64_t end) {
  with_element_types(params,
                     [&]<class T, class Y>(T, Y) { forward_rows<T, Y>(params, weight, bias, begin, end); });
}

void backward(const LayerNormBackward& params, const float* weight, float* dweight, float* dbias,
              int64_t begin, int64_t end) {
  with_element_types(params, [&]<class T, class Y>(T, Y) {
    backward_rows<T, Y>(params, weight, dweight, dbias, begin, end);
  });
}

}  // namespace

const LayerNormKernels layer_norm = {forward, backward};

}  // namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE
