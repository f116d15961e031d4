// Compiled once for each instruction set.
//
// Each row is read from memory once; further passes find it in the L1 cache.
#include "cpu/norm_rows.h"
#include "include/layer_norm.h"

namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE {
namespace {

// Null for a null matrix.
template <class T>
const T* input_row(const void* matrix, int64_t row, const NormShape& shape) {
  return matrix ? static_cast<const T*>(matrix) + row * shape.width : nullptr;
}

template <class T>
T* output_row(void* matrix, int64_t row, const NormShape& shape) {
  return matrix ? static_cast<T*>(matrix) + row * shape.width : nullptr;
}

// Prefetches the next row of both inputs, or with RESIDUAL false of x. Backward passes, which read more, are
// slower with it.
template <bool RESIDUAL, class X, class R>
struct NextRow {
  const X* x;
  const R* residual;

  void operator()(int64_t i) const {
    __builtin_prefetch(x + i);
    if constexpr (RESIDUAL) __builtin_prefetch(residual + i);
  }
};

// Buffer of the unrounded sum: x itself if x is float32.
inline float* unrounded(float* x, float*) { return x; }
template <class R>
float* unrounded(R*, float* scratch) {
  return scratch;
}

template <class Part>
inline void store_rounded(float*, F32, Part) {}
template <class R, class Part>
inline void store_rounded(R* x, F32 value, Part part) {
  store(x, value, part);
}

// Multiplies by layer_scale, if any, and by the sample's factor. A vector of ones instead would evict rows
// from the L1 cache.
template <class Part>
inline F32 scale(F32 value, const float* layer_scale, float sample_scale, Part part) {
  if (layer_scale) value *= load(layer_scale, part);
  return value * sample_scale;
}

float sample_scale_of(NormVectors vectors, int64_t row, const NormShape& shape) {
  return vectors.row_scale ? vectors.row_scale[row / shape.rows_per_sample] : 1.0f;
}

const float* offset(const float* vector, int64_t i) { return vector ? vector + i : nullptr; }

// Element types: X of the forward pass's x, R of residual and total, Y of y.
template <class X, class R, class Y>
void add_norm_rows(const LayerNormForward& params, NormVectors vectors, float* scratch, int64_t begin,
                   int64_t end) {
  const NormShape& shape = params.shape;
  for (int64_t row = begin; row < end; ++row) {
    const X* x = input_row<X>(params.x, row, shape);
    const R* residual = input_row<R>(params.residual, row, shape);
    R* total = output_row<R>(params.total, row, shape);
    float* sums = unrounded(total, scratch);
    Y* y = output_row<Y>(params.y, row, shape);
    const float sample_scale = sample_scale_of(vectors, row, shape);

    float sum[1];
    sum_over_row(shape.width, sum, [&](int64_t i, auto part, F32* sum_of) {
      const F32 scaled = scale(load(x + i, part), offset(vectors.layer_scale, i), sample_scale, part);
      const F32 value = load(residual + i, part) + scaled;
      store(sums + i, value, part);
      store_rounded(total + i, value, part);
      sum_of[0] += zero_beyond(value, part);
    });
    const int64_t ahead = row + 1 < end ? shape.width : 0;
    const NextRow<true, X, R> next = {x + ahead, residual + ahead};
    const RowStatistics statistics = row_statistics(sums, sum[0], params.eps, shape.rms, shape.width, next);
    for_each_vector(shape.width, [&](int64_t i, auto part) {
      const F32 normalised = (load(sums + i, part) - statistics.mean) * statistics.rstd;
      store(y + i, normalised * load(vectors.weight + i, part) + load(vectors.bias + i, part), part);
    });
    if (!shape.rms) params.mean[row] = statistics.mean;
    params.rstd[row] = statistics.rstd;
  }
}

// norm + add, or with RESIDUAL false the norm alone. A condition in the loops would change the compiler's
// choice of FMAs.
template <bool RESIDUAL, class X, class R>
void norm_rows(const LayerNormForward& params, NormVectors vectors, int64_t begin, int64_t end) {
  const NormShape& shape = params.shape;
  for (int64_t row = begin; row < end; ++row) {
    const X* x = input_row<X>(params.x, row, shape);
    const R* residual = input_row<R>(params.residual, row, shape);
    R* y = output_row<R>(params.y, row, shape);
    const float sample_scale = sample_scale_of(vectors, row, shape);

    const float sum = shape.rms ? 0.0f : row_sum(x, shape.width);
    const int64_t ahead = row + 1 < end ? shape.width : 0;
    const NextRow<RESIDUAL, X, R> next = {x + ahead, RESIDUAL ? residual + ahead : nullptr};
    const RowStatistics statistics = row_statistics(x, sum, params.eps, shape.rms, shape.width, next);
    for_each_vector(shape.width, [&](int64_t i, auto part) {
      const F32 normalised = (load(x + i, part) - statistics.mean) * statistics.rstd;
      const F32 normed = normalised * load(vectors.weight + i, part) + load(vectors.bias + i, part);
      if constexpr (RESIDUAL) {
        const F32 scaled = scale(normed, offset(vectors.layer_scale, i), sample_scale, part);
        store(y + i, load(residual + i, part) + scaled, part);
      } else {
        store(y + i, normed, part);
      }
    });
    if (!shape.rms) params.mean[row] = statistics.mean;
    params.rstd[row] = statistics.rstd;
  }
}

template <class Part>
inline void add_to(float* sum, F32 value, Part part) {
  store(sum, load(sum, part) + value, part);
}

template <class X, class R, class Y>
void add_norm_rows_backward(const LayerNormBackward& params, NormVectors vectors, NormSums sums,
                            int64_t begin, int64_t end) {
  const NormShape& shape = params.shape;
  for (int64_t row = begin; row < end; ++row) {
    const Y* dy = input_row<Y>(params.dy, row, shape);
    const R* dtotal = input_row<R>(params.dtotal, row, shape);
    const R* total = input_row<R>(params.x, row, shape);
    const X* branch = input_row<X>(params.branch, row, shape);
    R* dresidual = output_row<R>(params.dx, row, shape);
    X* dbranch = output_row<X>(params.dbranch, row, shape);
    const float* mean = shape.rms ? nullptr : params.mean + row;
    const float sample_scale = sample_scale_of(vectors, row, shape);
    const RowGradient gradient = row_gradient(dy, total, vectors.weight, mean, params.rstd[row], shape.width);

    for_each_vector(shape.width, [&](int64_t i, auto part) {
      const F32 upstream = load(dy + i, part);
      const F32 normalised = gradient.normalised(load(total + i, part));
      const F32 through_norm = gradient.of_x(upstream * load(vectors.weight + i, part), normalised);
      const F32 of_total = load(dtotal + i, part) + through_norm;
      store(dresidual + i, of_total, part);
      if (sums.weight) add_to(sums.weight + i, upstream * normalised, part);
      if (sums.bias) add_to(sums.bias + i, upstream, part);
      if (dbranch) {
        store(dbranch + i, scale(of_total, offset(vectors.layer_scale, i), sample_scale, part), part);
      }
      if (sums.layer_scale) {
        add_to(sums.layer_scale + i, of_total * sample_scale * load(branch + i, part), part);
      }
    });
  }
}

template <class X, class R>
void norm_rows_backward(const LayerNormBackward& params, NormVectors vectors, NormSums sums, int64_t begin,
                        int64_t end) {
  const NormShape& shape = params.shape;
  for (int64_t row = begin; row < end; ++row) {
    const R* dy = input_row<R>(params.dy, row, shape);
    const X* x = input_row<X>(params.x, row, shape);
    X* dx = output_row<X>(params.dx, row, shape);
    const float* mean = shape.rms ? nullptr : params.mean + row;
    const float sample_scale = sample_scale_of(vectors, row, shape);
    const RowGradient gradient = row_gradient(dy, x, vectors.weight, mean, params.rstd[row], shape.width);

    for_each_vector(shape.width, [&](int64_t i, auto part) {
      const F32 upstream = load(dy + i, part);
      const F32 normalised = gradient.normalised(load(x + i, part));
      const F32 through_norm = gradient.of_x(upstream * load(vectors.weight + i, part), normalised);
      store(dx + i, through_norm * sample_scale, part);
      const F32 scaled = rounded(upstream * sample_scale);  // no FMA, whichever sums are needed
      if (sums.weight) add_to(sums.weight + i, scaled * normalised, part);
      if (sums.bias) add_to(sums.bias + i, scaled, part);
    });
  }
}

// Calls body(X{}, R{}).
template <class Body>
void with_element_types(const NormShape& shape, const Body& body) {
  with_element_type(shape.dtype, [&](auto residual) {
    with_element_type(shape.branch_dtype, [&](auto x) { body(x, residual); });
  });
}

// Calls body(X{}, R{}, Y{}) for the types that norm_serves accepts with add_first.
template <class Body>
void with_types_of_y(const NormShape& shape, const Body& body) {
  if (shape.y_dtype == shape.dtype) {
    with_element_types(shape, [&](auto x, auto residual) { body(x, residual, residual); });
  } else if (shape.y_dtype == DType::BFloat16) {
    body(BFloat16{}, float{}, BFloat16{});
  } else {
    body(Float16{}, float{}, Float16{});
  }
}

void forward(const LayerNormForward& params, NormVectors vectors, float* scratch, int64_t begin,
             int64_t end) {
  if (params.shape.add_first) {
    with_types_of_y(params.shape, [&]<class X, class R, class Y>(X, R, Y) {
      add_norm_rows<X, R, Y>(params, vectors, scratch, begin, end);
    });
  } else {
    with_element_types(params.shape, [&]<class X, class R>(X, R) {
      const auto rows = params.residual ? norm_rows<true, X, R> : norm_rows<false, X, R>;
      rows(params, vectors, begin, end);
    });
  }
}

void backward(const LayerNormBackward& params, NormVectors vectors, NormSums sums, int64_t begin,
              int64_t end) {
  if (params.shape.add_first) {
    with_types_of_y(params.shape, [&]<class X, class R, class Y>(X, R, Y) {
      add_norm_rows_backward<X, R, Y>(params, vectors, sums, begin, end);
    });
  } else {
    with_element_types(params.shape, [&]<class X, class R>(X, R) {
      norm_rows_backward<X, R>(params, vectors, sums, begin, end);
    });
  }
}

}  // namespace

const LayerNormKernels layer_norm = {forward, backward};

}  // namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE
