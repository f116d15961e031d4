// Backward of x = residual + layer_scale * row_scale * norm(branch). The residual's gradient is dx.
//
// Traffic: dx, branch and dbranch once.
#include "cuda/column_sums.cuh"
#include "cuda/norm_launch.h"
#include "cuda/staged_rows.cuh"
#include "include/layer_norm.h"
#include "include/residual_norm.h"

namespace evakernels::cuda {
namespace {

// Sums over rows: g = row_scale * dx, and g * normalised.
constexpr int kSums = 2;

constexpr RowLimits kLimits = {32, 192};
constexpr int kStages = 5;  // two per input, one for the gradient

template <class Residual, class Branch, class L>
__global__ void __launch_bounds__(kBackwardThreads<L>, kBackwardBlocks<L>)
    norm_add_backward_kernel(const NormAddBackward params, float* partials) {
  constexpr int E = L::E, V = L::V;
  const ResidualNormShape& shape = params.shape;
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
    InputRow<Residual, L, 2> dx;
    InputRow<Branch, L, 2> branch;
    OutputRow<Branch, L> dbranch;
    assign_stages<L, kStages>(shape.width, dx, branch, dbranch);
    const auto set_row = [&](int64_t row) {
      dx.set_row(params.dx, row, shape.width);
      branch.set_row(params.branch, row, shape.width);
    };
    set_row(row);
    const auto fetch = [&](int64_t elements_ahead, auto... part) {
      dx.fetch(part..., elements_ahead);
      branch.fetch(part..., elements_ahead);
    };
    fetch_rows<L>(vectors, fetch);
    RowGradient next = gradient_of(row);
    for (; row < shape.rows; row += step) {
      const bool more = row + step < shape.rows;
      RowGradient gradient = next;
      if (more) next = gradient_of(row + step);
      set_row(row);
      dbranch.set_row(params.dbranch, row, shape.width);
      wait_for_rows<L>(dx, branch);  // #next-stage
      prefetch_row<L>(more, ahead, fetch);
      const float row_scale = row_scale_of(params.parameters, row, shape.rows_per_sample);
      reduce_gradient<E, V>(gradient, shape.width, shape.rms, row_sums,
                            [&](int vector, int slot, float (&g)[E], float (&x)[E]) {
                              float upstream[E];
                              dx.get(vector, slot, upstream);
                              times_weight(vector, upstream, g);
                              branch.get(vector, slot, x);
                            });

      for_each_vector<V>(vectors, [&](int vector, int slot) {
        float upstream[E], x[E], g[E];
        dx.get(vector, slot, upstream);
        branch.get(vector, slot, x);
        prefetch_vector<L>(more, ahead, vector, slot, fetch);
        times_weight(vector, upstream, g);
        float scaled[E], scaled_normalised[E];
#pragma unroll
        for (int i = 0; i < E; ++i) {
          const float normalised = gradient.normalised(x[i]);
          g[i] = gradient.of_x(g[i], normalised) * row_scale;
          scaled[i] = upstream[i] * row_scale;
          scaled_normalised[i] = scaled[i] * normalised;
        }
        dbranch.put(vector, g);
        column_sums.add(0, vector, slot, scaled);
        column_sums.add(1, vector, slot, scaled_normalised);
      });
      finish_rows<L>(dbranch);
    }
  }
  column_sums.write();
}

// dweight = layer_scale * sum(g n), dbias = layer_scale * sum(g), dlayer_scale = weight * sum(g n) + bias *
// sum(g), with n the normalised row.
struct WriteGradients {
  ResidualNormParameters parameters;
  ResidualNormGradients gradients;

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
struct Kernels : RowKernels<kLimits, kStages, kSums, Residual, Branch> {
  template <class L>
  static auto kernel() {
    return norm_add_backward_kernel<Residual, Branch, L>;
  }
};

}  // namespace

Error norm_add_backward(const NormAddBackward& params, Scratch& scratch, Stream stream) {
  const ResidualNormShape& shape = params.shape;
  if (shape.width == 0) return nullptr;
  const auto plan = plan_norm_add<Kernels>(shape, {{params.dx, shape.dtype},
                                                   {params.branch, shape.branch_dtype},
                                                   {params.dbranch, shape.branch_dtype},
                                                   buffer_of(params.parameters.weight),
                                                   buffer_of(params.parameters.layer_scale)});
  std::optional<WriteGradients> finish;
  if (params.gradients.any_wanted()) finish = {params.parameters, params.gradients};
  return launch_with_column_sums<kSums>(plan, shape.width, finish, scratch, stream, params);
}

Error layer_norm_backward(const LayerNormBackward& params, Scratch& scratch, Stream stream) {
  const NormAddBackward norm_add = {
      .dx = params.dy,
      .branch = params.x,
      .mean = params.mean,
      .rstd = params.rstd,
      .dbranch = params.dx,
      .parameters = {.weight = {params.weight, params.weight_dtype},
                     .bias = {},
                     .layer_scale = {},
                     .row_scale = {}},
      .gradients = {.weight = {params.dweight, params.weight_dtype},
                    .bias = {params.dbias, params.weight_dtype},
                    .layer_scale = {}},
      .shape = plain_norm_shape(params),
  };
  return norm_add_backward(norm_add, scratch, stream);
}

}  // namespace evakernels::cuda
