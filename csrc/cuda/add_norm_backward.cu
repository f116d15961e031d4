// The gradient of x = residual + layer_scale * row_scale * branch, y = norm(x).
//
// Each element of dy, dx, x and, where layer_scale has a gradient, of the branch is read once; each of
// dresidual and dbranch is written once.
#include "cuda/column_sums.cuh"
#include "cuda/norm_launch.h"
#include "cuda/norm_parameters.cuh"
#include "cuda/residual_norm.h"

namespace evakernels::cuda {
namespace {

// SUMS over the rows: of dy times the normalised row, of dy, and, where there is a layer_scale, of the
// gradient of the scaled branch times the branch.
template <int SUMS>
constexpr RowLimits kLimits = {SUMS == 2 ? 24 : 16, SUMS == 2 ? 224 : 192};

template <int SUMS, class Residual, class Branch, class L>
__global__ void __launch_bounds__(L::kThreads, L::kBlocks)
    add_norm_backward_kernel(const AddNormBackward params, float* partials) {
  constexpr int E = L::E, V = L::V;
  const ResidualNormShape& shape = params.shape;
  const int vectors = static_cast<int>(shape.width / E);
  const int64_t step = row_step(), ahead = step * shape.width;
  ColumnSums<SUMS, E, V> column_sums(partials, shape.width);
  RowSums row_sums;
  const auto gradient_of = [&](int64_t row) {
    return gradient_of_row(row, params.mean, params.rstd, shape.rms);
  };
  // The gradient of the normalised row.
  const auto through_weight = [&](int vector, const float (&upstream)[E], float (&g)[E]) {
    load_weight(params.parameters.weight, vector, g);
#pragma unroll
    for (int i = 0; i < E; ++i) g[i] = __fmul_rn(upstream[i], g[i]);
  };

  int64_t row = first_row();
  if (row < shape.rows) {
    RowPart<Residual, E, V> dy, x;
    dy.point_to(params.dy, row, shape.width);
    x.point_to(params.x, row, shape.width);
    for_each_vector<V>(vectors, [&](int vector, int slot) {
      dy.fetch(vector, slot);
      x.fetch(vector, slot);
    });
    RowGradient next = gradient_of(row);
    for (; row < shape.rows; row += step) {
      const bool more = row + step < shape.rows;
      RowGradient gradient = next;
      if (more) next = gradient_of(row + step);
      const float row_scale = row_scale_of(params.parameters, row, shape.rows_per_sample);
      complete<E, V>(gradient, shape.width, shape.rms, row_sums,
                     [&](int vector, int slot, float (&g)[E], float (&own)[E]) {
                       float upstream[E];
                       dy.get(vector, slot, upstream);
                       through_weight(vector, upstream, g);
                       x.get(vector, slot, own);
                     });

      for_each_vector<V>(vectors, [&](int vector, int slot) {
        const int64_t first = row * shape.width + int64_t{vector} * E;
        float upstream[E], own[E], total[E], g[E];
        Packed<Residual, E>::load_once(static_cast<const Residual*>(params.dx) + first).unpack(total);
        dy.get(vector, slot, upstream);
        x.get(vector, slot, own);
        // The next row is on its way into the registers that this one leaves.
        if (more) {
          dy.fetch(vector, slot, ahead);
          x.fetch(vector, slot, ahead);
        }
        through_weight(vector, upstream, g);
        float times_normalised[E];
#pragma unroll
        for (int i = 0; i < E; ++i) {
          const float normalised = gradient.normalised(own[i]);
          total[i] += gradient.of_x(g[i], normalised);
          times_normalised[i] = upstream[i] * normalised;
        }
        store_floats(static_cast<Residual*>(params.dresidual) + first, total);
        column_sums.add(0, vector, slot, times_normalised);
        column_sums.add(1, vector, slot, upstream);
        if (!params.dbranch) return;
#pragma unroll
        for (int i = 0; i < E; ++i) total[i] *= row_scale;
        if constexpr (SUMS == 3) {
          float times_branch[E];
          Packed<Branch, E>::load_once(static_cast<const Branch*>(params.branch) + first)
              .unpack(times_branch);
#pragma unroll
          for (int i = 0; i < E; ++i) times_branch[i] *= total[i];
          column_sums.add(2, vector, slot, times_branch);
        }
        multiply_by(params.parameters.layer_scale, vector, total);
        store_floats(static_cast<Branch*>(params.dbranch) + first, total);
      });
      dy.advance(ahead);
      x.advance(ahead);
    }
  }
  column_sums.write();
}

template <int SUMS>
struct WriteGradients {
  ResidualNormGradients gradients;

  __device__ void operator()(int64_t column, const float (&sums)[SUMS]) const {
    write_gradient(gradients.weight, column, sums[0]);
    write_gradient(gradients.bias, column, sums[1]);
    if constexpr (SUMS == 3) write_gradient(gradients.layer_scale, column, sums[2]);
  }
};

template <int SUMS>
constexpr auto kKernelOf = [](auto types, auto layout) {
  using Types = decltype(types);
  return add_norm_backward_kernel<SUMS, typename Types::Residual, typename Types::Branch, decltype(layout)>;
};

std::vector<Buffer> buffers_of(const AddNormBackward& params) {
  return {{params.dy, params.shape.dtype},        {params.dx, params.shape.dtype},
          {params.x, params.shape.dtype},         {params.branch, params.shape.branch_dtype},
          {params.dresidual, params.shape.dtype}, {params.dbranch, params.shape.branch_dtype},
          buffer_of(params.parameters.weight),    buffer_of(params.parameters.layer_scale)};
}

template <int SUMS>
Error run_backward(const AddNormBackward& params, float* workspace, Stream stream) {
  return launch_backward<kLimits<SUMS>>(params, workspace, stream, buffers_of(params), kKernelOf<SUMS>,
                                        [&](const float* partials, int64_t blocks) {
                                          const WriteGradients<SUMS> finish = {params.gradients};
                                          return launch_column_totals<SUMS>(
                                              partials, blocks, params.shape.width, finish, stream);
                                        });
}

}  // namespace

int64_t add_norm_backward_workspace(const AddNormBackward& params) {
  const std::vector<Buffer> buffers = buffers_of(params);
  return params.gradients.layer_scale.data ? backward_workspace<kLimits<3>>(params, 3, buffers, kKernelOf<3>)
                                           : backward_workspace<kLimits<2>>(params, 2, buffers, kKernelOf<2>);
}

Error add_norm_backward(const AddNormBackward& params, float* workspace, Stream stream) {
  return params.gradients.layer_scale.data ? run_backward<3>(params, workspace, stream)
                                           : run_backward<2>(params, workspace, stream);
}

}  // namespace evakernels::cuda
