// Backward of total = residual + layer_scale * row_scale * branch, y = norm(total).
//
// Traffic: dy, dtotal, total, dresidual and dbranch once; branch once if layer_scale needs a gradient.
#include "cuda/column_sums.cuh"
#include "cuda/norm_launch.h"
#include "include/layer_norm.h"

namespace evakernels::cuda {
namespace {

// SUMS over rows: dy * normalised, dy, and for layer_scale the gradient of the scaled branch * branch.
template <int SUMS>
constexpr RowLimits kLimits = {SUMS == 2 ? 24 : 16, SUMS == 2 ? 224 : 320};

template <int SUMS, class Residual, class Branch, class Y, class L>
__global__ void __launch_bounds__(SUMS == 2 ? kBackwardThreads<L> : L::kThreads,
                                  SUMS == 2 ? kBackwardBlocks<L> : L::kBlocks)
    add_norm_backward_kernel(const LayerNormBackward params, float* partials) {
  constexpr int E = L::E, V = L::V;
  const NormShape& shape = params.shape;
  const int vectors = static_cast<int>(shape.width / E);
  const int64_t step = row_step(), ahead = step * shape.width;
  ColumnSums<SUMS, E, V> column_sums(partials, shape.width);
  RowSums row_sums;
  const auto gradient_of = [&](int64_t row) {
    return gradient_of_row(row, params.mean, params.rstd, shape.rms);
  };
  // Gradient of the normalised row.
  const auto times_weight = [&](int vector, const float (&upstream)[E], float (&g)[E]) {
    load_weight(params.parameters.weight, vector, g);
#pragma unroll
    for (int i = 0; i < E; ++i) g[i] = __fmul_rn(upstream[i], g[i]);
  };

  int64_t row = first_row();
  if (row < shape.rows) {
    RegisterRow<Y, E, V> dy;
    RegisterRow<Residual, E, V> total;
    ReadOnceRow<Residual, E> dtotal;
    std::conditional_t<SUMS == 3, ReadOnceRow<Branch, E>, NoRow> branch;
    RowOutput<Residual, E> dresidual;
    RowOutput<Branch, E> dbranch;
    const auto set_row = [&](int64_t row) {
      dy.set_row(params.dy, row, shape.width);
      total.set_row(params.x, row, shape.width);
      dtotal.set_row(params.dtotal, row, shape.width);
      branch.set_row(params.branch, row, shape.width);
    };
    set_row(row);
    const auto fetch = [&](int64_t elements_ahead, int vector, int slot) {
      dy.fetch(vector, slot, elements_ahead);
      total.fetch(vector, slot, elements_ahead);
    };
    for_each_vector<V>(vectors, [&](int vector, int slot) { fetch(0, vector, slot); });
    RowGradient next = gradient_of(row);
    for (; row < shape.rows; row += step) {
      const bool more = row + step < shape.rows;
      RowGradient gradient = next;
      if (more) next = gradient_of(row + step);
      set_row(row);
      dresidual.set_row(params.dx, row, shape.width);
      dbranch.set_row(params.dbranch, row, shape.width);
      const float row_scale = row_scale_of(params.parameters, row, shape.rows_per_sample);
      reduce_gradient<E, V>(gradient, shape.width, shape.rms, row_sums,
                            [&](int vector, int slot, float (&g)[E], float (&x_values)[E]) {
                              float upstream[E];
                              dy.get(vector, slot, upstream);
                              times_weight(vector, upstream, g);
                              total.get(vector, slot, x_values);
                            });

      for_each_vector<V>(vectors, [&](int vector, int slot) {
        float upstream[E], x_values[E], sum[E], g[E];
        dtotal.get(vector, slot, sum);
        dy.get(vector, slot, upstream);
        total.get(vector, slot, x_values);
        if (more) fetch(ahead, vector, slot);
        times_weight(vector, upstream, g);
        float times_normalised[E];
#pragma unroll
        for (int i = 0; i < E; ++i) {
          const float normalised = gradient.normalised(x_values[i]);
          sum[i] += gradient.of_x(g[i], normalised);
          times_normalised[i] = upstream[i] * normalised;
        }
        dresidual.put(vector, sum);
        column_sums.add(0, vector, slot, times_normalised);
        column_sums.add(1, vector, slot, upstream);
        if (SUMS == 2 && !params.dbranch) return;
#pragma unroll
        for (int i = 0; i < E; ++i) sum[i] *= row_scale;
        if constexpr (SUMS == 3) {
          float times_branch[E];
          branch.get(vector, slot, times_branch);
#pragma unroll
          for (int i = 0; i < E; ++i) times_branch[i] *= sum[i];
          column_sums.add(2, vector, slot, times_branch);
        }
        if (!params.dbranch) return;
        multiply_by(params.parameters.layer_scale, vector, sum);
        dbranch.put(vector, sum);
      });
    }
  }
  column_sums.write();
}

template <int SUMS>
struct WriteGradients {
  NormGradients gradients;

  __device__ void operator()(int64_t column, const float (&sums)[SUMS]) const {
    write_gradient(gradients.weight, column, sums[0]);
    write_gradient(gradients.bias, column, sums[1]);
    if constexpr (SUMS == 3) write_gradient(gradients.layer_scale, column, sums[2]);
  }
};

template <int SUMS>
struct BackwardOf {
  template <class Residual, class Branch, class Y>
  struct Kernels : RowKernels<kLimits<SUMS>, SUMS, Residual, Branch, Y> {
    template <class L>
    static auto kernel() {
      return add_norm_backward_kernel<SUMS, Residual, Branch, Y, L>;
    }
  };
};

template <int SUMS>
Error launch_backward(const LayerNormBackward& params, Scratch& scratch, Stream stream) {
  const NormShape& shape = params.shape;
  const auto plan =
      plan_add_norm<BackwardOf<SUMS>::template Kernels>(shape, {{params.dy, shape.y_dtype},
                                                                {params.dtotal, shape.dtype},
                                                                {params.x, shape.dtype},
                                                                {params.branch, shape.branch_dtype},
                                                                {params.dx, shape.dtype},
                                                                {params.dbranch, shape.branch_dtype},
                                                                buffer_of(params.parameters.weight),
                                                                buffer_of(params.parameters.layer_scale)});
  std::optional<WriteGradients<SUMS>> finish;
  if (params.gradients.any_wanted()) finish = {params.gradients};
  return launch_with_column_sums<SUMS>(plan, shape.width, finish, scratch, stream, params);
}

}  // namespace

Error add_norm_backward(const LayerNormBackward& params, Scratch& scratch, Stream stream) {
  if (params.shape.width == 0) return nullptr;
  return params.gradients.layer_scale.data ? launch_backward<3>(params, scratch, stream)
                                           : launch_backward<2>(params, scratch, stream);
}

}  // namespace evakernels::cuda
