// x = residual + layer_scale * row_scale * norm(branch); without a residual it is the plain norm.
//
// Each element of the branch and of the residual is read once and each of x written once.
#include "cuda/norm_launch.h"
#include "cuda/norm_parameters.cuh"
#include "cuda/norm_rows.cuh"
#include "cuda/residual_norm.h"

namespace evakernels::cuda {
namespace {

template <class Residual, class Branch, class L>
__global__ void __launch_bounds__(L::kThreads, L::kBlocks)
    norm_add_forward_kernel(const NormAddForward params) {
  constexpr int E = L::E, V = L::V;
  const ResidualNormShape& shape = params.shape;
  const int vectors = static_cast<int>(shape.width / E);
  RowSums row_sums;
  for (int64_t row = first_row(); row < shape.rows; row += row_step()) {
    RowPart<Branch, E, V> branch;
    branch.point_to(params.branch, row, shape.width);
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
      const int64_t first = row * shape.width + int64_t{vector} * E;
      float residual[E] = {};
      if (params.residual) {
        Packed<Residual, E>::load_once(static_cast<const Residual*>(params.residual) + first)
            .unpack(residual);
      }
#pragma unroll
      for (int i = 0; i < E; ++i) values[i] = residual[i] + values[i] * row_scale;
      store_floats(static_cast<Residual*>(params.x) + first, values);
    });
  }
}

}  // namespace

Error norm_add_forward(const NormAddForward& params, Stream stream) {
  const ResidualNormShape& shape = params.shape;
  const ResidualNormParameters& parameters = params.parameters;
  return launch_forward(
      params, stream,
      {{params.residual, shape.dtype},
       {params.branch, shape.branch_dtype},
       {params.x, shape.dtype},
       buffer_of(parameters.weight),
       buffer_of(parameters.bias),
       buffer_of(parameters.layer_scale)},
      [](auto types, auto layout) {
        using Types = decltype(types);
        return norm_add_forward_kernel<typename Types::Residual, typename Types::Branch, decltype(layout)>;
      });
}

}  // namespace evakernels::cuda
