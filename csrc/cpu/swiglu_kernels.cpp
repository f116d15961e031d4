// Compiled once for each instruction set.
//
// With a norm, intermediate values stay in a scratch row in the L1 cache: gate and up are read once, and the
// exponential is computed once.
#include "cpu/norm_rows.h"
#include "include/swiglu.h"

namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE {
namespace {

template <class T>
const T* row_of(const SwigluRows& matrix, int64_t row) {
  return static_cast<const T*>(matrix.data) + row * matrix.stride;
}

template <class T>
void product_rows(const SwigluForward& params, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = row_of<T>(params.gate, row);
    const T* up = row_of<T>(params.up, row);
    T* out = static_cast<T*>(params.out) + row * params.width;
    for_each_vector(params.width, [&](int64_t i, auto part) {
      const F32 g = load(gate + i, part);
      store(out + i, g * sigmoid(g) * load(up + i, part), part);
    });
  }
}

template <class T>
void normalised_rows(const SwigluForward& params, const float* weight, const float* bias, float* hidden,
                     int64_t begin, int64_t end) {
  const int64_t width = params.width;
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = row_of<T>(params.gate, row);
    const T* up = row_of<T>(params.up, row);
    T* out = static_cast<T*>(params.out) + row * width;

    float sum[1];
    sum_over_row(width, sum, [&](int64_t i, auto part, F32* sums) {
      const F32 g = load(gate + i, part);
      const F32 value = g * sigmoid(g) * load(up + i, part);
      store(hidden + i, value, part);
      sums[0] += value;
    });
    const RowStatistics statistics =
        row_statistics(hidden, sum[0], params.eps, false, width - params.padding, [](int64_t) {});
    for_each_vector(width, [&](int64_t i, auto part) {
      const F32 normalised = (load(hidden + i, part) - statistics.mean) * statistics.rstd;
      store(out + i, normalised * load(weight + i, part) + load(bias + i, part), part);
    });
    params.mean[row] = statistics.mean;
    params.rstd[row] = statistics.rstd;
  }
}

// The gradients of gate and up from hidden's gradient; s = sigmoid(g).
template <class T, class Part>
inline void store_gradients(T* dgate, T* dup, F32 dhidden, F32 g, F32 u, F32 s, Part part) {
  store(dgate, dhidden * u * s * (1.0f + g * (1.0f - s)), part);
  store(dup, dhidden * (g * s), part);  // dhidden * g may be infinite where s is 0
}

template <class T>
void product_rows_backward(const SwigluBackward& params, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t start = row * params.width;
    const T* dout = static_cast<const T*>(params.dout) + start;
    const T* gate = row_of<T>(params.gate, row);
    const T* up = row_of<T>(params.up, row);
    for_each_vector(params.width, [&](int64_t i, auto part) {
      const F32 g = load(gate + i, part);
      store_gradients(static_cast<T*>(params.dgate) + start + i, static_cast<T*>(params.dup) + start + i,
                      load(dout + i, part), g, load(up + i, part), sigmoid(g), part);
    });
  }
}

template <class T>
void normalised_rows_backward(const SwigluBackward& params, const float* weight, float* dweight, float* dbias,
                              float* scratch, int64_t begin, int64_t end) {
  const int64_t width = params.width;
  float* sigmoids = scratch;
  float* normalised = scratch + width;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t start = row * width;
    const T* dout = static_cast<const T*>(params.dout) + start;
    const T* gate = row_of<T>(params.gate, row);
    const T* up = row_of<T>(params.up, row);
    const float mean = params.mean[row];
    const float rstd = params.rstd[row];

    float sum[2];  // of the normalised row's gradient g, and of g * normalised
    sum_over_row(width, sum, [&](int64_t i, auto part, F32* sums) {
      const F32 g = load(gate + i, part);
      const F32 s = sigmoid(g);
      // Rounded as in forward: in a row of one element it cancels with the mean.
      const F32 value = (rounded(g * s * load(up + i, part)) - mean) * rstd;
      store(sigmoids + i, s, part);
      store(normalised + i, value, part);
      const F32 gradient = rounded(load(dout + i, part) * load(weight + i, part));
      sums[0] += gradient;
      sums[1] += gradient * value;
    });
    const float count = static_cast<float>(width - params.padding);
    const float shift = sum[0] / count;
    const float slope = sum[1] / count;

    for_each_vector(width, [&](int64_t i, auto part) {
      const F32 upstream = load(dout + i, part);
      const F32 value = load(normalised + i, part);
      // Rounded as above: in a row of one element it cancels, and rstd would amplify the difference.
      const F32 dhidden = (rounded(upstream * load(weight + i, part)) - shift - value * slope) * rstd;
      store_gradients(static_cast<T*>(params.dgate) + start + i, static_cast<T*>(params.dup) + start + i,
                      dhidden, load(gate + i, part), load(up + i, part), load(sigmoids + i, part), part);
      if (dweight) store(dweight + i, load(dweight + i, part) + upstream * value, part);
      if (dbias) store(dbias + i, load(dbias + i, part) + upstream, part);
    });
  }
}

void forward(const SwigluForward& params, const float* weight, const float* bias, float* scratch,
             int64_t begin, int64_t end) {
  with_element_type(params.dtype, [&]<class T>(T) {
    if (weight == nullptr) return product_rows<T>(params, begin, end);
    normalised_rows<T>(params, weight, bias, scratch, begin, end);
  });
}

void backward(const SwigluBackward& params, const float* weight, float* dweight, float* dbias, float* scratch,
              int64_t begin, int64_t end) {
  with_element_type(params.dtype, [&]<class T>(T) {
    if (weight == nullptr) return product_rows_backward<T>(params, begin, end);
    normalised_rows_backward<T>(params, weight, dweight, dbias, scratch, begin, end);
  });
}

}  // namespace

const SwigluKernels swiglu = {forward, backward};

}  // namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE
