// Compiled once for each instruction set.
#include "cpu/gelu_kernels.h"

#include "cpu/dtype_dispatch.h"
#include "cpu/simd.h"

namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE {
namespace {

inline F32 magnitude(F32 x) { return __builtin_bit_cast(F32, __builtin_bit_cast(U32, x) & 0x7FFFFFFFu); }

inline F32 with_sign_of(F32 x, F32 size) {
  return __builtin_bit_cast(F32, __builtin_bit_cast(U32, size) ^ (__builtin_bit_cast(U32, x) & 0x80000000u));
}

// x P(x), where P is the normal distribution.
struct ExactGelu {
  static F32 of(F32 x) {
    const F32 z = at_most(magnitude(x), kNoTail);
    return at_least(x, 0.0f) - z * tail(z);
  }

  static F32 derivative(F32 x) {
    const F32 z = at_most(magnitude(x), kNoTail);
    const F32 slope = z * kNormalDensityAtZero * exp2_of_negative(-kHalfLog2E * z * z);
    return 0.5f + with_sign_of(x, 0.5f - tail(z) + slope);
  }

 private:
  // From here on the tail is 0, and an infinity times it would be no number.
  static constexpr float kNoTail = 16.0f;

  static F32 tail(F32 z) {
    F32 exponent = broadcast(kLog2NormalTail.coefficients[0]);
    for (int i = 1; i < 9; ++i) exponent = exponent * z + kLog2NormalTail.coefficients[i];
    return exp2_of_negative(exponent);
  }
};

// x sigmoid(2 u).
struct TanhGelu {
  static F32 of(F32 x) { return x * sigmoid(twice_u(x)); }

  static F32 derivative(F32 x) {
    const F32 u = twice_u(x);
    const F32 e = exp(-u);
    const F32 s = 1.0f / (1.0f + e);
    // 1 - s, which would cancel where s is close to 1; e overflows only where it isn't.
    const F32 rest = u > 0.0f ? e * s : 1.0f - s;
    return s + x * s * rest * (kTanhGeluLinear + 3.0f * kTanhGeluCubic * x * x);
  }

 private:
  static F32 twice_u(F32 x) { return x * (kTanhGeluLinear + kTanhGeluCubic * x * x); }
};

template <class Gelu, class T>
void forward_rows(const GeluForward& params, const float* bias, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(params.x) + row * params.width;
    T* out = static_cast<T*>(params.out) + row * params.width;
    for_each_vector(params.width, [&](int64_t i, auto part) {
      store(out + i, Gelu::of(load(x + i, part) + load(bias + i, part)), part);
    });
  }
}

template <class Gelu, class T>
void backward_rows(const GeluBackward& params, const float* bias, float* dbias, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t start = row * params.width;
    const T* dout = static_cast<const T*>(params.dout) + start;
    const T* x = static_cast<const T*>(params.x) + start;
    T* dx = static_cast<T*>(params.dx) + start;
    for_each_vector(params.width, [&](int64_t i, auto part) {
      const F32 gradient = load(dout + i, part) * Gelu::derivative(load(x + i, part) + load(bias + i, part));
      store(dx + i, gradient, part);
      if (dbias) store(dbias + i, load(dbias + i, part) + gradient, part);
    });
  }
}

void forward(const GeluForward& params, const float* bias, int64_t begin, int64_t end) {
  with_element_type(params.dtype, [&]<class T>(T) {
    params.tanh ? forward_rows<TanhGelu, T>(params, bias, begin, end)
                : forward_rows<ExactGelu, T>(params, bias, begin, end);
  });
}

void backward(const GeluBackward& params, const float* bias, float* dbias, int64_t begin, int64_t end) {
  with_element_type(params.dtype, [&]<class T>(T) {
    params.tanh ? backward_rows<TanhGelu, T>(params, bias, dbias, begin, end)
                : backward_rows<ExactGelu, T>(params, bias, dbias, begin, end);
  });
}

}  // namespace

const GeluKernels gelu = {forward, backward};

}  // namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE
