// Parameters of the gelu launchers: gelu(x + bias), elementwise.
#pragma once

#include "include/launcher.h"

namespace evakernels {

constexpr float kNormalDensityAtZero = 0.398942280f;  // 1 / sqrt(2 pi)
constexpr float kHalfLog2E = 0.721347520f;            // so that 2^(-z^2 kHalfLog2E) = exp(-z^2 / 2)

struct DegreeEight {
  float coefficients[9];  // the highest power first
};

// The tail 1 - P(z) of the normal CDF P is 2^(this polynomial of z) for z >= 0. Fitted so that z times the
// tail's error is below 1.6e-8: more accurate than 0.5 + 0.5 erf(x / sqrt(2)), which cancels for negative x,
// and half as expensive.
constexpr DegreeEight kLog2NormalTail = {{-2.334947112e-06f, 3.373779327e-05f, -1.612937194e-04f,
                                          -1.917038608e-04f, 7.126865443e-03f, -5.253361166e-02f,
                                          -4.591982961e-01f, -1.151106000e+00f, -1.0f}};

// 0.5 x (1 + tanh(u)) with u = sqrt(2 / pi) (x + 0.044715 x^3) is x sigmoid(2 u), and 2 u is
// x (kTanhGeluLinear + kTanhGeluCubic x^2).
constexpr float kTanhGeluLinear = 1.595769122f;  // 2 sqrt(2 / pi)
constexpr float kTanhGeluCubic = kTanhGeluLinear * 0.044715f;

constexpr float kSigmoidGeluSlope = 1.702f;  // x sigmoid(1.702 x)

enum class GeluForm { Exact, Tanh, Sigmoid };
constexpr int kGeluForms = 3;

struct GeluForward {
  const void* x;     // [rows, width], dtype
  const void* bias;  // [width], bias_dtype; null: zeros
  void* out;         // [rows, width], dtype
  int64_t rows;
  int64_t width;
  DType dtype;
  DType bias_dtype;
  GeluForm form;
};

struct GeluBackward {
  const void* dout;  // [rows, width], dtype
  const void* x;     // [rows, width], dtype
  const void* bias;  // [width], bias_dtype; null: zeros
  void* dx;          // [rows, width], dtype
  void* dbias;       // [width], bias_dtype; null if not needed
  int64_t rows;
  int64_t width;
  DType dtype;
  DType bias_dtype;
  GeluForm form;
};

namespace cpu {

void gelu_forward(const GeluForward& params, Isa isa, ParallelFor parallel_for);

// The result doesn't depend on the number of threads.
void gelu_backward(const GeluBackward& params, Isa isa, ParallelFor parallel_for);

// The loops of one instruction set.
struct GeluKernels {
  // Rows [begin, end). bias: [width] floats, in place of params.bias.
  void (*forward)(const GeluForward& params, const float* bias, int64_t begin, int64_t end);

  // Writes dx for rows [begin, end) and adds their share to dbias, [width] or null.
  void (*backward)(const GeluBackward& params, const float* bias, float* dbias, int64_t begin, int64_t end);
};

EVAKERNELS_FOR_EACH_ISA(extern const GeluKernels gelu;)

}  // namespace cpu

namespace cuda {

Error gelu_forward(const GeluForward& params, Stream stream);

Error gelu_backward(const GeluBackward& params, Scratch& scratch, Stream stream);

}  // namespace cuda

}  // namespace evakernels
