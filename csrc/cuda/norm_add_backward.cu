// Backward of y = residual + layer_scale * row_scale * norm(x), and of the plain norm. The residual's
// gradient is dy.
//
// Traffic: dy, x and dx once.
#include "cuda/column_sums.cuh"
#include "cuda/norm_launch.h"
#include "include/layer_norm.h"

namespace evakernels::cuda {
namespace {

// Sums over rows: g = row_scale * dy, and g * normalised.
constexpr int kSums = 2;

constexpr RowLimits kLimits = {32, 192};
template <class Residual, class Branch, class L>
__global__ void __launch_bounds__(kBackwardThreads<L>, kBackwardBlocks<L>)
    norm_add_backward_kernel(const LayerNormBackward params, float* partials) {
  constexpr int E = L::E, V = L::V;
  const NormShape& shape = params.shape;
  const int vectors = static_cast<int>(shape.width / E);
  const int64_t step = row_step(), ahead = step * shape.width;
  ColumnSums<kSums, E, V> column_sums(partials, shape.width);
  RowSums row_sums;
  const auto gradient_of = [&](int64_t row) {
    return gradient_of_row(row, params.mean, params.rstd, shape.rms);
  };
  // Gradient of the normalised row, without row_scale.
  const auto times_weight = [&](int vector, const float (&upstream)[E], float (&g)[E]) {
    load_weight(params.parameters.weight, vector, g);
    multiply_by(params.parameters.layer_scale, vector, g);
#pragma unroll
    for (int i = 0; i < E; ++i) g[i] = __fmul_rn(upstream[i], g[i]);
  };

  int64_t row = first_row();
  if (row < shape.rows) {
    RegisterRow<Residual, E, V> dy;
    RegisterRow<Branch, E, V> x;
    RowOutput<Branch, E> dx;
    const auto set_row = [&](int64_t row) {
      dy.set_row(params.dy, row, shape.width);
      x.set_row(params.x, row, shape.width);
    };
    set_row(row);
    const auto fetch = [&](int64_t elements_ahead, int vector, int slot) {
      dy.fetch(vector, slot, elements_ahead);
      x.fetch(vector, slot, elements_ahead);
    };
    for_each_vector<V>(vectors, [&](int vector, int slot) { fetch(0, vector, slot); });
    RowGradient next = gradient_of(row);
    for (; row < shape.rows; row += step) {
      const bool more = row + step < shape.rows;
      RowGradient gradient = next;
      if (more) next = gradient_of(row + step);
      set_row(row);
      dx.set_row(params.dx, row, shape.width);
      const float row_scale = row_scale_of(params.parameters, row, shape.rows_per_sample);
      reduce_gradient<E, V>(gradient, shape.width, shape.rms, row_sums,
                            [&](int vector, int slot, float (&g)[E], float (&x_values)[E]) {
                              float upstream[E];
                              dy.get(vector, slot, upstream);
                              times_weight(vector, upstream, g);
                              x.get(vector, slot, x_values);
                            });

      for_each_vector<V>(vectors, [&](int vector, int slot) {
        float upstream[E], x_values[E], g[E];
        dy.get(vector, slot, upstream);
        x.get(vector, slot, x_values);
        if (more) fetch(ahead, vector, slot);
        times_weight(vector, upstream, g);
        float scaled[E], scaled_normalised[E];
#pragma unroll
        for (int i = 0; i < E; ++i) {
          const float normalised = gradient.normalised(x_values[i]);
          g[i] = gradient.of_x(g[i], normalised) * row_scale;
          scaled[i] = upstream[i] * row_scale;
          scaled_normalised[i] = scaled[i] * normalised;
        }
        dx.put(vector, g);
        column_sums.add(0, vector, slot, scaled);
        column_sums.add(1, vector, slot, scaled_normalised);
      });
    }
  }
  column_sums.write();
}

// dweight = layer_scale * sum(g n), dbias = layer_scale * sum(g), dlayer_scale = weight * sum(g n) + bias *
// sum(g), with n the normalised row.
struct WriteGradients {
  NormParameters parameters;
  NormGradients gradients;

  __device__ void operator()(int64_t column, const float (&sums)[kSums]) const {
    const float layer_scale = parameter_at(parameters.layer_scale, column, 1.0f);
    write_gradient(gradients.weight, column, layer_scale * sums[1]);
    write_gradient(gradients.bias, column, layer_scale * sums[0]);
    const float weight = parameter_at(parameters.weight, column, 1.0f),
                bias = parameter_at(parameters.bias, column, 0.0f);
    write_gradient(gradients.layer_scale, column, weight * sums[1] + bias * sums[0]);
  }
};

template <class Residual, class Branch>
struct Kernels : RowKernels<kLimits, kSums, Residual, Branch> {
  template <class L>
  static auto kernel() {
    return norm_add_backward_kernel<Residual, Branch, L>;
  }
};

}  // namespace

Error layer_norm_backward(const LayerNormBackward& params, Scratch& scratch, Stream stream) {
  if (params.shape.add_first) return add_norm_backward(params, scratch, stream);
  const NormShape& shape = params.shape;
  if (shape.width == 0) return nullptr;
  const auto plan = plan_norm_add<Kernels>(shape, {{params.dy, shape.dtype},
                                                   {params.x, shape.branch_dtype},
                                                   {params.dx, shape.branch_dtype},
                                                   buffer_of(params.parameters.weight),
                                                   buffer_of(params.parameters.layer_scale)});
  std::optional<WriteGradients> finish;
  if (params.gradients.any_wanted()) finish = {params.parameters, params.gradients};
  return launch_with_column_sums<kSums>(plan, shape.width, finish, scratch, stream, params);
}

}  // namespace evakernels::cuda
