// silu(gate) * up and its gradients, of one element.
#pragma once

#include <numeric>

#include "common/swiglu.h"
#include "cuda/activations.cuh"
#include "cuda/dispatch.h"
#include "cuda/norm_launch.h"

namespace evakernels::cuda {

// Rounded before anything is added, so that backward finds the very value whose mean forward took.
__device__ __forceinline__ float gated(float gate, float sigmoid_of_gate, float up) {
  return __fmul_rn(__fmul_rn(gate, sigmoid_of_gate), up);
}

struct GatedGradient {
  float gate;
  float up;
};

__device__ __forceinline__ GatedGradient gradient_of_gated(float upstream, float gate, float sigmoid_of_gate,
                                                           float up) {
  const float s = sigmoid_of_gate;
  return {upstream * up * s * (1.0f + gate * (1.0f - s)), upstream * gate * s};
}

// What __launch_bounds__ is told: a block of THREADS, though most have fewer. So no thread takes more
// registers than leave room for as many on a multiprocessor, which hide the latency of the memory.
template <class L, int THREADS>
constexpr int kThreadsFor = L::V == 0 ? L::kThreads : THREADS;
template <class L>
constexpr int kBlocksFor = L::V == 0 ? L::kBlocks : 1;

// What all rows of gate and up have in common that decides how many elements can be accessed at a time.
inline int64_t common_step(int64_t width, const SwigluRows& gate, const SwigluRows& up) {
  return std::gcd(width, std::gcd(gate.stride, up.stride));
}

// Of a kernel with a norm, whose table has the element type.
template <template <class T> class Kernels, class Params>
auto plan_swiglu_norm(const Params& params, const std::vector<Buffer>& buffers) {
  const int64_t step = common_step(params.width, params.gate, params.up);
  return with_element_type(params.dtype, [&](auto element) {
    return plan_rows<Kernels<decltype(element)>>(params.rows, params.width, step, buffers);
  });
}

}  // namespace evakernels::cuda
