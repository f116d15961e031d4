// silu(gate) * up and its gradients, of one element.
#pragma once

#include <numeric>

#include "common/swiglu.h"
#include "cuda/activations.cuh"
#include "cuda/dispatch.h"
#include "cuda/norm_plan.h"

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

// What all rows of gate and up have in common that decides how many elements can be accessed at a time.
inline int64_t common_step(int64_t width, const SwigluRows& gate, const SwigluRows& up) {
  return std::gcd(width, std::gcd(gate.stride, up.stride));
}

}  // namespace evakernels::cuda
