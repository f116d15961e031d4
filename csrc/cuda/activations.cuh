// Activation functions of one element.
#pragma once

#include "cuda/device.h"
#include "include/gelu.h"

namespace evakernels::cuda {

// __fdividef errs by 2 units in the last place, for a fraction of the division's instructions; for a large
// divisor it gives 0, where silu and its derivative are below the normal numbers.
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + expf(-x)); }

// silu(gate) * up. Rounded before anything is added, so that backward finds the very value whose mean forward
// took.
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

// x P(x), where P is the normal distribution.
struct ExactGelu {
  static __device__ __forceinline__ float of(float x) {
    const float z = magnitude(x);
    return (x > 0.0f ? x : 0.0f) - z * tail(z);
  }

  static __device__ __forceinline__ float derivative(float x) {
    const float z = magnitude(x);
    const float slope = z * kNormalDensityAtZero * exp2_approximated(-kHalfLog2E * z * z);
    return 0.5f + copysignf(0.5f - tail(z) + slope, x);
  }

 private:
  // From here on the tail is 0, and an infinity times it would be no number. Not by fmin, which would lose a
  // NaN.
  static __device__ __forceinline__ float magnitude(float x) { return fabsf(x) > 16.0f ? 16.0f : fabsf(x); }

  static __device__ __forceinline__ float tail(float z) {
    constexpr auto kPolynomial = kLog2NormalTail;  // a global one is the host's
    float exponent = kPolynomial.coefficients[0];
#pragma unroll
    for (int i = 1; i < 9; ++i) exponent = exponent * z + kPolynomial.coefficients[i];
    return exp2_approximated(exponent);
  }
};

// x sigmoid(u) for the polynomial u of x that Curve gives.
template <class Curve>
struct SigmoidOf {
  static __device__ __forceinline__ float of(float x) { return x * sigmoid(Curve::of(x)); }

  static __device__ __forceinline__ float derivative(float x) {
    const float u = Curve::of(x);
    const float e = expf(-u);
    const float s = __fdividef(1.0f, 1.0f + e);
    // 1 - s, which would cancel where s is close to 1; e overflows only where it isn't.
    const float rest = u > 0.0f ? e * s : 1.0f - s;
    return s + x * s * rest * Curve::slope(x);
  }
};

struct TanhCurve {
  static __device__ __forceinline__ float of(float x) {
    return x * (kTanhGeluLinear + kTanhGeluCubic * x * x);
  }
  static __device__ __forceinline__ float slope(float x) {
    return kTanhGeluLinear + 3.0f * kTanhGeluCubic * x * x;
  }
};

struct SigmoidCurve {
  static __device__ __forceinline__ float of(float x) { return kSigmoidGeluSlope * x; }
  static __device__ __forceinline__ float slope(float) { return kSigmoidGeluSlope; }
};

struct TanhGelu : SigmoidOf<TanhCurve> {};
struct SigmoidGelu : SigmoidOf<SigmoidCurve> {};

}  // namespace evakernels::cuda
