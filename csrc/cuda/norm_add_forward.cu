// x = residual + layer_scale * row_scale * norm(branch); without a residual the plain norm.
//
// Traffic: branch, residual and x once.
#include "cuda/norm_launch.h"
#include "cuda/staged_rows.cuh"
#include "include/layer_norm.h"
#include "include/residual_norm.h"

namespace evakernels::cuda {
namespace {

constexpr int kStages = 3;  // one per matrix

template <class Residual, class Branch, class L>
__global__ void __launch_bounds__(L::kThreads, kForwardBlocks<L>)
    norm_add_forward_kernel(const NormAddForward params) {
  constexpr int E = L::E, V = L::V;
  const ResidualNormShape& shape = params.shape;
  const int vectors = static_cast<int>(shape.width / E);
  InputRow<Branch, L> branch;
  ReadOnceInputRow<Residual, L> residual;
  OutputRow<Residual, L> x;
  assign_stages<L, kStages>(shape.width, branch, residual, x);
  RowSums row_sums;
  for (int64_t row = first_row(); row < shape.rows; row += row_step()) {
    branch.set_row(params.branch, row, shape.width);
    residual.set_row(params.residual, row, shape.width);
    x.set_row(params.x, row, shape.width);
    fetch_rows<L>(vectors, [&](int64_t ahead, auto... part) {
      branch.fetch(part..., ahead);
      if (params.residual) residual.fetch(part..., ahead);
    });
    wait_for_rows<L>(branch, residual);
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
      x.put(vector, values);
    });
    finish_rows<L>(x);
  }
}

template <class Residual, class Branch>
struct Kernels : RowKernels<kForwardLimits, kStages, 0, Residual, Branch> {
  template <class L>
  static auto kernel() {
    return norm_add_forward_kernel<Residual, Branch, L>;
  }
};

}  // namespace

Error norm_add_forward(const NormAddForward& params, Stream stream) {
  const ResidualNormShape& shape = params.shape;
  const ResidualNormParameters& parameters = params.parameters;
  const auto plan = plan_norm_add<Kernels>(shape, {{params.residual, shape.dtype},
                                                   {params.branch, shape.branch_dtype},
                                                   {params.x, shape.dtype},
                                                   buffer_of(parameters.weight),
                                                   buffer_of(parameters.bias),
                                                   buffer_of(parameters.layer_scale)});
  return plan.launch(stream, params);
}

Error layer_norm_forward(const LayerNormForward& params, Stream stream) {
  const NormAddForward norm_add = {
      .residual = nullptr,
      .branch = params.x,
      .x = params.y,
      .mean = params.mean,
      .rstd = params.rstd,
      .eps = params.eps,
      .parameters = {.weight = {params.weight, params.weight_dtype},
                     .bias = {params.bias, params.weight_dtype},
                     .layer_scale = {},
                     .row_scale = {}},
      .shape = plain_norm_shape(params),
  };
  return norm_add_forward(norm_add, stream);
}

}  // namespace evakernels::cuda
