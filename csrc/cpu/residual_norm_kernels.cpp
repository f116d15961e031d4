// Compiled once for each instruction set.
//
// Each row is read from memory once; further passes find it in the L1 cache.
#include "cpu/norm_rows.h"
#include "include/residual_norm.h"

namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE {
namespace {

// Null for a null matrix.
template <class T>
const T* input_row(const void* matrix, int64_t row, const ResidualNormShape& shape) {
  return matrix ? static_cast<const T*>(matrix) + row * shape.width : nullptr;
}

template <class T>
T* output_row(void* matrix, int64_t row, const ResidualNormShape& shape) {
  return matrix ? static_cast<T*>(matrix) + row * shape.width : nullptr;
}

// Prefetches the next row of both inputs. Backward passes, which read more, are slower with it.
template <class R, class B>
struct NextRow {
  const R* residual;
  const B* branch;

  void operator()(int64_t i) const {
    __builtin_prefetch(residual + i);
    __builtin_prefetch(branch + i);
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

const float* offset(const float* vector, int64_t i) { return vector ? vector + i : nullptr; }

// Element types: R of residual, B of branch, Y of y.
template <class R, class B, class Y>
void add_norm_rows(const AddNormForward& params, const ResidualNormVectors& vectors, float* scratch,
                   int64_t begin, int64_t end) {
  const ResidualNormShape& shape = params.shape;
  for (int64_t row = begin; row < end; ++row) {
    const R* residual = input_row<R>(params.residual, row, shape);
    const B* branch = input_row<B>(params.branch, row, shape);
    R* x = output_row<R>(params.x, row, shape);
    float* total = unrounded(x, scratch);
    Y* y = output_row<Y>(params.y, row, shape);
    const float sample_scale = vectors.row_scale[row / shape.rows_per_sample];

    float sum[1];
    sum_over_row(shape.width, sum, [&](int64_t i, auto part, F32* sums) {
      const F32 scaled = scale(load(branch + i, part), offset(vectors.layer_scale, i), sample_scale, part);
      const F32 value = load(residual + i, part) + scaled;
      store(total + i, value, part);
      store_rounded(x + i, value, part);
      sums[0] += zero_beyond(value, part);
    });
    const int64_t ahead = row + 1 < end ? shape.width : 0;
    const NextRow<R, B> next = {residual + ahead, branch + ahead};
    const RowStatistics statistics = row_statistics(total, sum[0], params.eps, shape.rms, shape.width, next);
    for_each_vector(shape.width, [&](int64_t i, auto part) {
      const F32 normalised = (load(total + i, part) - statistics.mean) * statistics.rstd;
      store(y + i, normalised * load(vectors.weight + i, part) + load(vectors.bias + i, part), part);
    });
    if (!shape.rms) params.mean[row] = statistics.mean;
    params.rstd[row] = statistics.rstd;
  }
}

template <class R, class B>
void norm_add_rows(const NormAddForward& params, const ResidualNormVectors& vectors, int64_t begin,
                   int64_t end) {
  const ResidualNormShape& shape = params.shape;
  for (int64_t row = begin; row < end; ++row) {
    const R* residual = input_row<R>(params.residual, row, shape);
    const B* branch = input_row<B>(params.branch, row, shape);
    R* x = output_row<R>(params.x, row, shape);
    const float sample_scale = vectors.row_scale[row / shape.rows_per_sample];

    const float sum = shape.rms ? 0.0f : row_sum(branch, shape.width);
    const int64_t ahead = row + 1 < end ? shape.width : 0;
    const NextRow<R, B> next = {residual + ahead, branch + ahead};
    const RowStatistics statistics = row_statistics(branch, sum, params.eps, shape.rms, shape.width, next);
    for_each_vector(shape.width, [&](int64_t i, auto part) {
      const F32 normalised = (load(branch + i, part) - statistics.mean) * statistics.rstd;
      const F32 normed = normalised * load(vectors.weight + i, part) + load(vectors.bias + i, part);
      const F32 scaled = scale(normed, offset(vectors.layer_scale, i), sample_scale, part);
      store(x + i, load(residual + i, part) + scaled, part);
    });
    if (!shape.rms) params.mean[row] = statistics.mean;
    params.rstd[row] = statistics.rstd;
  }
}

template <class Part>
inline void add_to(float* sum, F32 value, Part part) {
  store(sum, load(sum, part) + value, part);
}

template <class R, class B, class Y>
void add_norm_rows_backward(const AddNormBackward& params, const ResidualNormVectors& vectors,
                            const AddNormSums& sums, int64_t begin, int64_t end) {
  const ResidualNormShape& shape = params.shape;
  for (int64_t row = begin; row < end; ++row) {
    const Y* dy = input_row<Y>(params.dy, row, shape);
    const R* dx = input_row<R>(params.dx, row, shape);
    const R* x = input_row<R>(params.x, row, shape);
    const B* branch = input_row<B>(params.branch, row, shape);
    R* dresidual = output_row<R>(params.dresidual, row, shape);
    B* dbranch = output_row<B>(params.dbranch, row, shape);
    const float* mean = shape.rms ? nullptr : params.mean + row;
    const float sample_scale = vectors.row_scale[row / shape.rows_per_sample];
    const RowGradient gradient = row_gradient(dy, x, vectors.weight, mean, params.rstd[row], shape.width);

    for_each_vector(shape.width, [&](int64_t i, auto part) {
      const F32 upstream = load(dy + i, part);
      const F32 normalised = gradient.normalised(load(x + i, part));
      const F32 through_norm = gradient.of_x(upstream * load(vectors.weight + i, part), normalised);
      const F32 dtotal = load(dx + i, part) + through_norm;
      store(dresidual + i, dtotal, part);
      if (sums.weight) add_to(sums.weight + i, upstream * normalised, part);
      if (sums.bias) add_to(sums.bias + i, upstream, part);
      if (dbranch) {
        store(dbranch + i, scale(dtotal, offset(vectors.layer_scale, i), sample_scale, part), part);
      }
      if (sums.layer_scale) {
        add_to(sums.layer_scale + i, dtotal * sample_scale * load(branch + i, part), part);
      }
    });
  }
}

template <class R, class B>
void norm_add_rows_backward(const NormAddBackward& params, const float* scaled_weight, const float* row_scale,
                            const NormAddSums& sums, int64_t begin, int64_t end) {
  const ResidualNormShape& shape = params.shape;
  for (int64_t row = begin; row < end; ++row) {
    const R* dx = input_row<R>(params.dx, row, shape);
    const B* branch = input_row<B>(params.branch, row, shape);
    B* dbranch = output_row<B>(params.dbranch, row, shape);
    const float* mean = shape.rms ? nullptr : params.mean + row;
    const float sample_scale = row_scale[row / shape.rows_per_sample];
    const RowGradient gradient = row_gradient(dx, branch, scaled_weight, mean, params.rstd[row], shape.width);

    for_each_vector(shape.width, [&](int64_t i, auto part) {
      const F32 upstream = load(dx + i, part);
      const F32 normalised = gradient.normalised(load(branch + i, part));
      const F32 through_norm = gradient.of_x(upstream * load(scaled_weight + i, part), normalised);
      store(dbranch + i, through_norm * sample_scale, part);
      if (sums.gradient) {
        const F32 scaled = upstream * sample_scale;
        add_to(sums.gradient + i, scaled, part);
        add_to(sums.gradient_normalised + i, scaled * normalised, part);
      }
    });
  }
}

// Calls body(R{}, B{}).
template <class Body>
void with_element_types(const ResidualNormShape& shape, const Body& body) {
  with_element_type(shape.dtype, [&](auto residual) {
    with_element_type(shape.branch_dtype, [&](auto branch) { body(residual, branch); });
  });
}

// Calls body(R{}, B{}, Y{}) for the types that add_norm_serves accepts.
template <class Body>
void with_types_of_y(const ResidualNormShape& shape, const Body& body) {
  if (shape.y_dtype == shape.dtype) {
    with_element_types(shape, [&](auto residual, auto branch) { body(residual, branch, residual); });
  } else if (shape.y_dtype == DType::BFloat16) {
    body(float{}, BFloat16{}, BFloat16{});
  } else {
    body(float{}, Float16{}, Float16{});
  }
}

void add_norm_forward(const AddNormForward& params, const ResidualNormVectors& vectors, float* scratch,
                      int64_t begin, int64_t end) {
  with_types_of_y(params.shape, [&]<class R, class B, class Y>(R, B, Y) {
    add_norm_rows<R, B, Y>(params, vectors, scratch, begin, end);
  });
}

void norm_add_forward(const NormAddForward& params, const ResidualNormVectors& vectors, int64_t begin,
                      int64_t end) {
  with_element_types(params.shape,
                     [&]<class R, class B>(R, B) { norm_add_rows<R, B>(params, vectors, begin, end); });
}

void add_norm_backward(const AddNormBackward& params, const ResidualNormVectors& vectors,
                       const AddNormSums& sums, int64_t begin, int64_t end) {
  with_types_of_y(params.shape, [&]<class R, class B, class Y>(R, B, Y) {
    add_norm_rows_backward<R, B, Y>(params, vectors, sums, begin, end);
  });
}

void norm_add_backward(const NormAddBackward& params, const float* scaled_weight, const float* row_scale,
                       const NormAddSums& sums, int64_t begin, int64_t end) {
  with_element_types(params.shape, [&]<class R, class B>(R, B) {
    norm_add_rows_backward<R, B>(params, scaled_weight, row_scale, sums, begin, end);
  });
}

}  // namespace

const ResidualNormKernels residual_norm = {add_norm_forward, norm_add_forward, add_norm_backward,
                                           norm_add_backward};

}  // namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE
