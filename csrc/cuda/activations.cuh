// Activation functions of one element.
#pragma once

#include "cuda/device.h"

namespace evakernels::cuda {

// __fdividef errs by 2 units in the last place, for a fraction of the division's instructions; for a large
// divisor it gives 0, where silu and its derivative are below the normal numbers.
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + expf(-x)); }

// x P(x), where P is the normal distribution. Its tail 1 - P(z) is 2^(-1 + a polynomial of z) for z >= 0: one
// of degree 8, fitted so that z times the error of the tail is below 1.6e-8 everywhere. That is closer than
// 0.5 + 0.5 erff(x / sqrt(2)), which cancels for negative x, for half of its instructions.
struct ExactGelu {
  static constexpr float kDensityAtZero = 0.398942280f;  // 1 / sqrt(2 pi)
  static constexpr float kHalfLog2E = 0.721347520f;      // so that 2^(-z^2 kHalfLog2E) = exp(-z^2 / 2)

  static __device__ __forceinline__ float of(float x) {
    const float z = magnitude(x);
    return (x > 0.0f ? x : 0.0f) - z * tail(z);
  }

  static __device__ __forceinline__ float derivative(float x) {
    const float z = magnitude(x);
    const float slope = z * kDensityAtZero * exp2_approximated(-kHalfLog2E * z * z);
    return 0.5f + copysignf(0.5f - tail(z) + slope, x);
  }

 private:
  // From here on the tail is 0, and an infinity times it would be no number. Not by fmin, which would lose a
  // NaN.
  static __device__ __forceinline__ float magnitude(float x) { return fabsf(x) > 16.0f ? 16.0f : fabsf(x); }

  static __device__ __forceinline__ float tail(float z) {
    constexpr float kPolynomial[] = {-2.334947112e-06f, 3.373779327e-05f,  -1.612937194e-04f,
                                     -1.917038608e-04f, 7.126865443e-03f,  -5.253361166e-02f,
                                     -4.591982961e-01f, -1.151106000e+00f, -1.0f};
    float exponent = kPolynomial[0];
#pragma unroll
    for (int i = 1; i < 9; ++i) exponent = exponent * z + kPolynomial[i];
    return exp2_approximated(exponent);
  }
};

// 0.5 x (1 + tanh(u)) with u = sqrt(2 / pi) (x + 0.044715 x^3), which is x sigmoid(2 u).
struct TanhGelu {
  static constexpr float kLinear = 1.595769122f;  // 2 sqrt(2 / pi)
  static constexpr float kCubic = kLinear * 0.044715f;

  static __device__ __forceinline__ float of(float x) { return x * sigmoid(x * (kLinear + kCubic * x * x)); }

  static __device__ __forceinline__ float derivative(float x) {
    const float u = x * (kLinear + kCubic * x * x);
    const float e = expf(-u);
    const float s = __fdividef(1.0f, 1.0f + e);
    // 1 - s, which would cancel where s is close to 1; e overflows only where it isn't.
    const float rest = u > 0.0f ? e * s : 1.0f - s;
    return s + x * s * rest * (kLinear + 3.0f * kCubic * x * x);
  }
};

}  // namespace evakernels::cuda
