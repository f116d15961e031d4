// Activation functions and their derivatives.
#pragma once

#include "cuda/device.h"
#include "include/gelu.h"

namespace evakernels::cuda {

// __fdividef: 2 ulp for a fraction of a division's instructions; 0 for a huge divisor, where silu is
// subnormal.
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + expf(-x)); }

// silu(gate) * up, without FMA, so that forward and backward compute equal values.
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

// x P(x), with the normal CDF P.
struct ExactGelu {
  static __device__ __forceinline__ float of(float x) {
    const float z = magnitude(x);
    return x - fminf(x, 0.0f) - z * tail(z);  // NaN for -inf, as in torch
  }

  static __device__ __forceinline__ float derivative(float x) {
    const float z = magnitude(x);
    const float slope = z * kNormalDensityAtZero * exp2_approx(-kHalfLog2E * z * z);
    return 0.5f + copysignf(0.5f - tail(z) + slope, x);
  }

 private:
  // The tail is 0 from 16 on; inf * 0 would be NaN. Unlike fmin, keeps NaN.
  static __device__ __forceinline__ float magnitude(float x) { return fabsf(x) > 16.0f ? 16.0f : fabsf(x); }

  static __device__ __forceinline__ float tail(float z) {
    constexpr auto kPolynomial = kLog2NormalTail;  // a global constant is the host's
    float exponent = kPolynomial.coefficients[0];
#pragma unroll
    for (int i = 1; i < 9; ++i) exponent = exponent * z + kPolynomial.coefficients[i];
    return exp2_approx(exponent);
  }
};

// x sigmoid(u) with u = Curve::of(x).
template <class Curve>
struct SigmoidOf {
  static __device__ __forceinline__ float of(float x) { return x * sigmoid(Curve::of(x)); }

  static __device__ __forceinline__ float derivative(float x) {
    const float u = Curve::of(x);
    const float e = expf(-u);
    const float s = __fdividef(1.0f, 1.0f + e);
    // 1 - s without cancellation for s close to 1.
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
