// Compiled once for each instruction set.
#include "cpu/simd.h"
#include "include/gelu.h"

namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE {
namespace {

inline F32 magnitude(F32 x) { return __builtin_bit_cast(F32, __builtin_bit_cast(U32, x) & 0x7FFFFFFFu); }

// The normal tail 1 - P(z), and gelu'(-z) = tail - z density, for 0 <= z <= kNoTail and results of type T.
// Both are 0 from kNoTail on; inf * 0 would be NaN.
constexpr float kNoTail = 16.0f;

template <class T>
struct Normal {
  static F32 tail(F32 z) { return exp2_of_negative<T>(polynomial(kLog2NormalTail.coefficients, z)); }

  static F32 falling(F32 z) {
    return tail(z) - z * kNormalDensityAtZero * exp2_of_negative<T>(-kHalfLog2E * z * z);
  }
};

// For 16-bit results: relative error 2^-17 up to z = 6, absolute error 2^-29 beyond.
struct NormalOf16Bits {
  static F32 tail(F32 z) {
    constexpr float kLog2Tail[] = {-1.793765136e-06f, 6.072589531e-05f,  -9.231839795e-04f, 8.476841263e-03f,
                                   -5.389092863e-02f, -4.585416019e-01f, -1.151214361e+00f, -1.0f};
    return exp2_of_negative<BFloat16>(polynomial(kLog2Tail, z));
  }

  // Divided by exp(-z^2 / 2) it is nearly linear.
  static F32 falling(F32 z) {
    constexpr float kOverDensity[] = {
        -1.671528480e-06f, 4.539497604e-05f,  -5.368781858e-04f, 3.674663370e-03f,  -1.645081118e-02f,
        5.228684843e-02f,  -1.267204285e-01f, 2.479667813e-01f,  -7.976295352e-01f, 0.5f};
    return polynomial(kOverDensity, z) * exp2_of_negative<BFloat16>(-kHalfLog2E * z * z);
  }
};
template <>
struct Normal<BFloat16> : NormalOf16Bits {};
template <>
struct Normal<Float16> : NormalOf16Bits {};

// x P(x), with the normal CDF P.
template <class T>
struct ExactGelu {
  static F32 of(F32 x) {
    const F32 z = at_most(magnitude(x), kNoTail);
    return x - at_most(x, 0.0f) - z * Normal<T>::tail(z);  // NaN for -inf, as in torch
  }

  static F32 derivative(F32 x) {
    const F32 falling = Normal<T>::falling(at_most(magnitude(x), kNoTail));
    return x > 0.0f ? 1.0f - falling : falling;
  }
};

// x sigmoid(u) with u = Curve::of(x).
template <class T, class Curve>
struct SigmoidOf {
  static F32 of(F32 x) { return x / (1.0f + exp<T>(-Curve::of(x))); }

  static F32 derivative(F32 x) {
    const F32 u = Curve::of(x);
    const F32 e = exp<T>(-u);
    const F32 s = 1.0f / (1.0f + e);
    // 1 - s without cancellation for s close to 1.
    const F32 rest = u > 0.0f ? e * s : 1.0f - s;
    return s + x * s * rest * Curve::slope(x);
  }
};

struct TanhCurve {
  static F32 of(F32 x) { return x * (kTanhGeluLinear + kTanhGeluCubic * x * x); }
  static F32 slope(F32 x) { return kTanhGeluLinear + 3.0f * kTanhGeluCubic * x * x; }
};

struct SigmoidCurve {
  static F32 of(F32 x) { return kSigmoidGeluSlope * x; }
  static F32 slope(F32) { return broadcast(kSigmoidGeluSlope); }
};

template <class Gelu, class T>
void forward_rows(const GeluForward& params, const float* bias, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(params.x) + row * params.width;
    T* out = static_cast<T*>(params.out) + row * params.width;
    for_several_vectors(
        params.width,
        [&](int64_t i, auto part) { return Gelu::of(load(x + i, part) + load(bias + i, part)); },
        [&](int64_t i, F32 value, auto part) { store(out + i, value, part); });
  }
}

template <class Gelu, class T>
void backward_rows(const GeluBackward& params, const float* bias, float* dbias, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t start = row * params.width;
    const T* dout = static_cast<const T*>(params.dout) + start;
    const T* x = static_cast<const T*>(params.x) + start;
    T* dx = static_cast<T*>(params.dx) + start;
    for_several_vectors(
        params.width,
        [&](int64_t i, auto part) {
          return load(dout + i, part) * Gelu::derivative(load(x + i, part) + load(bias + i, part));
        },
        [&](int64_t i, F32 gradient, auto part) {
          store(dx + i, gradient, part);
          if (dbias) store(dbias + i, load(dbias + i, part) + gradient, part);
        });
  }
}

// Calls body(Gelu{}) for the form.
template <class T, class Body>
void with_form(GeluForm form, const Body& body) {
  switch (form) {
    case GeluForm::Exact:
      return body(ExactGelu<T>{});
    case GeluForm::Tanh:
      return body(SigmoidOf<T, TanhCurve>{});
    case GeluForm::Sigmoid:
      return body(SigmoidOf<T, SigmoidCurve>{});
  }
}

void forward(const GeluForward& params, const float* bias, int64_t begin, int64_t end) {
  with_element_type(params.dtype, [&]<class T>(T) {
    with_form<T>(params.form, [&]<class Gelu>(Gelu) { forward_rows<Gelu, T>(params, bias, begin, end); });
  });
}

void backward(const GeluBackward& params, const float* bias, float* dbias, int64_t begin, int64_t end) {
  with_element_type(params.dtype, [&]<class T>(T) {
    with_form<T>(params.form,
                 [&]<class Gelu>(Gelu) { backward_rows<Gelu, T>(params, bias, dbias, begin, end); });
  });
}

}  // namespace

const GeluKernels gelu = {forward, backward};

}  // namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE
