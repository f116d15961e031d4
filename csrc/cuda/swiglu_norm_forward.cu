// out = norm(silu(gate) * up). Traffic: gate, up and out once; the product stays in registers, unrounded.
#include "cuda/activations.cuh"
#include "cuda/norm_launch.h"
#include "cuda/norm_rows.cuh"
#include "include/swiglu.h"

namespace evakernels::cuda {
namespace {

template <class T, class L>
constexpr int kThreads = kThreadsFor<L, 1024 / int{sizeof(T)}>;

template <class T, class L>
__global__ void __launch_bounds__(kThreads<T, L>, kBlocksFor<L>)
    swiglu_norm_forward_kernel(const SwigluForward params) {
  constexpr int E = L::E, V = L::V;
  const int vectors = static_cast<int>(params.width / E);
  const NormParameters parameters = {
      {params.norm_weight, params.weight_dtype}, {params.norm_bias, params.weight_dtype}, {}, {}};
  RegisterRow<T, E, V> gate, up;
  RowOutput<T, E> out;
  RowSums row_sums;
  for (int64_t row = first_row(); row < params.rows; row += row_step()) {
    gate.set_row(params.gate.data, row, params.gate.stride);
    up.set_row(params.up.data, row, params.up.stride);
    out.set_row(params.out, row, params.width);
    for_each_vector<V>(vectors, [&](int vector, int slot) {
      gate.fetch(vector, slot);
      up.fetch(vector, slot);
    });

    float held[V > 0 ? V : 1][E];
    const auto multiply = [&](int vector, int slot, float (&values)[E]) {
      float g[E];
      gate.get(vector, slot, g);
      up.get(vector, slot, values);
#pragma unroll
      for (int i = 0; i < E; ++i) values[i] = gated(g[i], sigmoid(g[i]), values[i]);
    };
    const auto get_product = [&](int vector, int slot, float (&values)[E]) {
      if constexpr (V == 0) {
        multiply(vector, slot, values);
      } else {
#pragma unroll
        for (int i = 0; i < E; ++i) values[i] = held[slot][i];
      }
    };
    if constexpr (V > 0) {
      for_each_vector<V>(vectors, [&](int vector, int slot) { multiply(vector, slot, held[slot]); });
    }

    const RowStatistics statistics =
        row_statistics<E, V>(params.width, params.eps, false, row_sums, get_product, params.padding);
    write_statistics(statistics, row, false, params.mean, params.rstd);
    for_each_vector<V>(vectors, [&](int vector, int slot) {
      float values[E];
      get_product(vector, slot, values);
#pragma unroll
      for (int i = 0; i < E; ++i) values[i] = (values[i] - statistics.mean) * statistics.rstd;
      transform(parameters, vector, values);
      out.put(vector, values);
    });
  }
}

template <class T>
struct Kernels : RowKernels<kForwardLimits, 0, T> {
  template <class L>
  static auto kernel() {
    return swiglu_norm_forward_kernel<T, L>;
  }
};

}  // namespace

Error swiglu_norm_forward(const SwigluForward& params, Stream stream) {
  const auto plan = plan_swiglu_norm<Kernels>(params, {{params.gate.data, params.dtype},
                                                       {params.up.data, params.dtype},
                                                       {params.out, params.dtype},
                                                       {params.norm_weight, params.weight_dtype},
                                                       {params.norm_bias, params.weight_dtype}});
  return plan.launch(stream, params);
}

}  // namespace evakernels::cuda
