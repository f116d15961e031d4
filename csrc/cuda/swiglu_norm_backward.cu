// Backward of out = norm(silu(gate) * up); the product is recomputed. Traffic: dout, gate, up, dgate and dup
// once.
#include "cuda/activations.cuh"
#include "cuda/column_sums.cuh"
#include "cuda/norm_launch.h"
#include "include/swiglu.h"

namespace evakernels::cuda {
namespace {

// Sums over rows: dout * normalised, and dout.
constexpr int kSums = 2;

constexpr RowLimits kLimits = {16, 384};
// Kernels with the most elements per thread need the registers of fewer threads.
template <class L>
constexpr int kThreads = kThreadsFor<L, (L::V * L::E == kLimits.elements ? kLimits.threads : 512)>;

template <class T, class L>
__global__ void __launch_bounds__(kThreads<L>, kBlocksFor<L>)
    swiglu_norm_backward_kernel(const SwigluBackward params, float* partials) {
  constexpr int E = L::E, V = L::V;
  const int64_t width = params.width, step = row_step();
  const int vectors = static_cast<int>(width / E);
  ColumnSums<kSums, E, V> column_sums(partials, width);
  RowSums row_sums;
  const auto times_weight = [&](int vector, const float (&upstream)[E], float (&g)[E]) {
    load_weight({params.norm_weight, params.weight_dtype}, vector, g);
#pragma unroll
    for (int i = 0; i < E; ++i) g[i] = __fmul_rn(upstream[i], g[i]);
  };

  int64_t row = first_row();
  if (row < params.rows) {
    RegisterRow<T, E, V> dout, gate, up;
    RowOutput<T, E> dgate, dup;
    const auto set_row = [&](int64_t row) {
      dout.set_row(params.dout, row, width);
      gate.set_row(params.gate.data, row, params.gate.stride);
      up.set_row(params.up.data, row, params.up.stride);
    };
    set_row(row);
    const auto fetch = [&](int64_t rows_ahead, int vector, int slot) {
      dout.fetch(vector, slot, rows_ahead * width);
      gate.fetch(vector, slot, rows_ahead * params.gate.stride);
      up.fetch(vector, slot, rows_ahead * params.up.stride);
    };
    for_each_vector<V>(vectors, [&](int vector, int slot) { fetch(0, vector, slot); });
    RowGradient next = gradient_of_row(row, params.mean, params.rstd, false);
    for (; row < params.rows; row += step) {
      const bool more = row + step < params.rows;
      RowGradient gradient = next;
      if (more) next = gradient_of_row(row + step, params.mean, params.rstd, false);
      set_row(row);
      dgate.set_row(params.dgate, row, width);
      dup.set_row(params.dup, row, width);
      float sigmoids[V > 0 ? V : 1][E];
      reduce_gradient<E, V>(
          gradient, width, false, row_sums,
          [&](int vector, int slot, float (&g)[E], float (&product)[E]) {
            float upstream[E], gates[E];
            dout.get(vector, slot, upstream);
            times_weight(vector, upstream, g);
            gate.get(vector, slot, gates);
            up.get(vector, slot, product);
#pragma unroll
            for (int i = 0; i < E; ++i) {
              sigmoids[slot][i] = sigmoid(gates[i]);
              product[i] = gated(gates[i], sigmoids[slot][i], product[i]);
            }
          },
          params.padding);

      for_each_vector<V>(vectors, [&](int vector, int slot) {
        float upstream[E], g[E], u[E], to_product[E];
        dout.get(vector, slot, upstream);
        gate.get(vector, slot, g);
        up.get(vector, slot, u);
        if (more) fetch(step, vector, slot);
        times_weight(vector, upstream, to_product);
        float times_normalised[E];
#pragma unroll
        for (int i = 0; i < E; ++i) {
          const float s = V > 0 ? sigmoids[slot][i] : sigmoid(g[i]);
          const float normalised = gradient.normalised(gated(g[i], s, u[i]));
          times_normalised[i] = upstream[i] * normalised;
          const GatedGradient of_inputs =
              gradient_of_gated(gradient.of_x(to_product[i], normalised), g[i], s, u[i]);
          g[i] = of_inputs.gate;
          u[i] = of_inputs.up;
        }
        dgate.put(vector, g);
        dup.put(vector, u);
        column_sums.add(0, vector, slot, times_normalised);
        column_sums.add(1, vector, slot, upstream);
      });
    }
  }
  column_sums.write();
}

struct WriteGradients {
  ParameterGradient weight;
  ParameterGradient bias;

  __device__ void operator()(int64_t column, const float (&sums)[kSums]) const {
    write_gradient(weight, column, sums[0]);
    write_gradient(bias, column, sums[1]);
  }
};

template <class T>
struct Kernels : RowKernels<kLimits, kSums, T> {
  template <class L>
  static auto kernel() {
    return swiglu_norm_backward_kernel<T, L>;
  }
};

}  // namespace

Error swiglu_norm_backward(const SwigluBackward& params, Scratch& scratch, Stream stream) {
  const auto plan = plan_swiglu_norm<Kernels>(params, {{params.dout, params.dtype},
                                                       {params.gate.data, params.dtype},
                                                       {params.up.data, params.dtype},
                                                       {params.dgate, params.dtype},
                                                       {params.dup, params.dtype},
                                                       {params.norm_weight, params.weight_dtype}});
  std::optional<WriteGradients> finish;
  if (params.dweight || params.dbias) {
    finish = {{params.dweight, params.weight_dtype}, {params.dbias, params.weight_dtype}};
  }
  return launch_with_column_sums<kSums>(plan, params.width, finish, scratch, stream, params);
}

}  // namespace evakernels::cuda
