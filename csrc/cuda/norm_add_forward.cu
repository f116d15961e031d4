// y = residual + layer_scale * row_scale * norm(x); without a residual the plain norm.
//
// Traffic: x, residual and y once.
#include "cuda/norm_launch.h"
#include "cuda/norm_rows.cuh"
#include "include/layer_norm.h"

namespace evakernels::cuda {
namespace {

template <class Residual, class Branch, class L>
__global__ void __launch_bounds__(L::kThreads, L::kBlocks)
    norm_add_forward_kernel(const LayerNormForward params) {
  constexpr int E = L::E, V = L::V;
  const NormShape& shape = params.shape;
  const int vectors = static_cast<int>(shape.width / E);
  RegisterRow<Branch, E, V> branch;
  ReadOnceRow<Residual, E> residual;
  RowOutput<Residual, E> y;
  RowSums row_sums;
  for (int64_t row = first_row(); row < shape.rows; row += row_step()) {
    branch.set_row(params.x, row, shape.width);
    residual.set_row(params.residual, row, shape.width);
    y.set_row(params.y, row, shape.width);
    for_each_vector<V>(vectors, [&](int vector, int slot) { branch.fetch(vector, slot); });
    const float row_scale = row_scale_of(params.parameters, row, shape.rows_per_sample);
    const RowStatistics statistics = row_statistics<E, V>(
        shape.width, params.eps, shape.rms, row_sums,
        [&](int vector, int slot, float (&values)[E]) { branch.get(vector, slot, values); });
    write_statistics(statistics, row, shape.rms, params.mean, params.rstd);

    for_each_vector<V>(vectors, [&](int vector, int slot) {
      float values[E];
      branch.get(vector, slot, values);
#pragma unroll
      for (int i = 0; i < E; ++i) values[i] = (values[i] - statistics.mean) * statistics.rstd;
      transform(params.parameters, vector, values);
      multiply_by(params.parameters.layer_scale, vector, values);
      float carried[E] = {};
      if (params.residual) residual.get(vector, slot, carried);
#pragma unroll
      for (int i = 0; i < E; ++i) values[i] = carried[i] + values[i] * row_scale;
      y.put(vector, values);
    });
  }
}

template <class Residual, class Branch>
struct Kernels : RowKernels<kForwardLimits, 0, Residual, Branch> {
  template <class L>
  static auto kernel() {
    return norm_add_forward_kernel<Residual, Branch, L>;
  }
};

}  // namespace

Error layer_norm_forward(const LayerNormForward& params, Stream stream) {
  if (params.shape.add_first) return add_norm_forward(params, stream);
  const NormShape& shape = params.shape;
  const NormParameters& parameters = params.parameters;
  const auto plan = plan_norm_add<Kernels>(shape, {{params.residual, shape.dtype},
                                                   {params.x, shape.branch_dtype},
                                                   {params.y, shape.dtype},
                                                   buffer_of(parameters.weight),
                                                   buffer_of(parameters.bias),
                                                   buffer_of(parameters.layer_scale)});
  return plan.launch(stream, params);
}

}  // namespace evakernels::cuda
