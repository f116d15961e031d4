// total = residual + layer_scale * row_scale * x, y = norm(total), with total unrounded.
//
// Traffic: inputs and outputs once; the sum stays in registers.
#include "cuda/norm_launch.h"
#include "cuda/norm_rows.cuh"
#include "include/layer_norm.h"

namespace evakernels::cuda {
namespace {

template <class Residual, class Branch, class Y, class L>
__global__ void __launch_bounds__(L::kThreads, L::kBlocks)
    add_norm_forward_kernel(const LayerNormForward params) {
  constexpr int E = L::E, V = L::V;
  const NormShape& shape = params.shape;
  const int vectors = static_cast<int>(shape.width / E);
  RegisterRow<Residual, E, V> residual;
  RegisterRow<Branch, E, V> branch;
  RowOutput<Residual, E> total;
  RowOutput<Y, E> y;
  RowSums row_sums;
  for (int64_t row = first_row(); row < shape.rows; row += row_step()) {
    const float row_scale = row_scale_of(params.parameters, row, shape.rows_per_sample);
    residual.set_row(params.residual, row, shape.width);
    branch.set_row(params.x, row, shape.width);
    total.set_row(params.total, row, shape.width);
    y.set_row(params.y, row, shape.width);
    for_each_vector<V>(vectors, [&](int vector, int slot) {
      residual.fetch(vector, slot);
      branch.fetch(vector, slot);
    });

    float held[V > 0 ? V : 1][E];
    const auto add = [&](int vector, int slot, float (&values)[E]) {
      branch.get(vector, slot, values);
      multiply_by(params.parameters.layer_scale, vector, values);
      float carried[E];
      residual.get(vector, slot, carried);
#pragma unroll
      for (int i = 0; i < E; ++i) values[i] = carried[i] + values[i] * row_scale;
    };
    const auto get_total = [&](int vector, int slot, float (&values)[E]) {
      if constexpr (V == 0) {
        add(vector, slot, values);
      } else {
#pragma unroll
        for (int i = 0; i < E; ++i) values[i] = held[slot][i];
      }
    };
    for_each_vector<V>(vectors, [&](int vector, int slot) {
      add(vector, slot, held[slot]);
      total.put(vector, held[slot]);
    });

    const RowStatistics statistics =
        row_statistics<E, V>(shape.width, params.eps, shape.rms, row_sums, get_total);
    write_statistics(statistics, row, shape.rms, params.mean, params.rstd);
    for_each_vector<V>(vectors, [&](int vector, int slot) {
      float values[E];
      get_total(vector, slot, values);
#pragma unroll
      for (int i = 0; i < E; ++i) values[i] = (values[i] - statistics.mean) * statistics.rstd;
      transform(params.parameters, vector, values);
      y.put(vector, values);
    });
  }
}

template <class Residual, class Branch, class Y>
struct Kernels : RowKernels<kForwardLimits, 0, Residual, Branch, Y> {
  template <class L>
  static auto kernel() {
    return add_norm_forward_kernel<Residual, Branch, Y, L>;
  }
};

}  // namespace

Error add_norm_forward(const LayerNormForward& params, Stream stream) {
  const NormShape& shape = params.shape;
  const NormParameters& parameters = params.parameters;
  const auto plan = plan_add_norm<Kernels>(shape, {{params.residual, shape.dtype},
                                                   {params.x, shape.branch_dtype},
                                                   {params.y, shape.y_dtype},
                                                   {params.total, shape.dtype},
                                                   buffer_of(parameters.weight),
                                                   buffer_of(parameters.bias),
                                                   buffer_of(parameters.layer_scale)});
  return plan.launch(stream, params);
}

}  // namespace evakernels::cuda
