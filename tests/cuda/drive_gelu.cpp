#include "drive.h"
#include "include/gelu.h"

namespace evakernels::drive {
namespace {

struct Value {
  double of, derivative;
};

Value gelu(double x, GeluForm form) {
  if (form == GeluForm::Exact) {
    const double cdf = 0.5 * std::erfc(-x / std::sqrt(2.0));
    return {x * cdf, cdf + x * std::exp(-x * x / 2.0) / std::sqrt(2.0 * M_PI)};
  }
  if (form == GeluForm::Sigmoid) {
    const double s = 1.0 / (1.0 + std::exp(-1.702 * x));
    return {x * s, s + 1.702 * x * s * (1.0 - s)};
  }
  const double root = std::sqrt(2.0 / M_PI), t = std::tanh(root * (x + 0.044715 * x * x * x));
  const double slope = root * (1.0 + 3.0 * 0.044715 * x * x);
  return {0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * slope};
}

void drive(const Case& c, bool with_bias, GeluForm form) {
  constexpr const char* kNames[] = {"", ", tanh", ", sigmoid"};
  const int64_t size = c.rows * c.width;
  const std::string name =
      std::string(with_bias ? "gelu with a bias" : "gelu") + kNames[static_cast<int>(form)];
  const auto called = [&](const char* what) { return name_of(c, (name + ", " + what).c_str()); };
  Buffer x = Buffer::random(c.dtype, size), dout = Buffer::random(c.dtype, size);
  Buffer bias = Buffer::random(DType::Float32, c.width);
  std::vector<double> expected(size), expected_dx(size), expected_dbias(c.width);
  for (int64_t i = 0; i < size; ++i) {
    const Value value = gelu(x.at(i) + (with_bias ? bias.at(i % c.width) : 0.0), form);
    expected[i] = value.of;
    expected_dx[i] = value.derivative * dout.at(i);
    expected_dbias[i % c.width] += expected_dx[i];
  }

  Buffer out(c.dtype, size), dx(c.dtype, size), dbias(DType::Float32, c.width);
  const void* const added = with_bias ? bias.data() : nullptr;
  const GeluForward forward = {x.data(), added, out.data(), c.rows, c.width, c.dtype, DType::Float32, form};
  run(cuda::gelu_forward(forward, nullptr), called("forward"));
  compare(out, expected, called("out"), c.dtype);

  const GeluBackward backward = {
      dout.data(), x.data(), added,   dx.data(),      with_bias ? dbias.data() : nullptr,
      c.rows,      c.width,  c.dtype, DType::Float32, form};
  Scratch scratch;
  run(cuda::gelu_backward(backward, scratch, nullptr), called("backward"));
  compare(dx, expected_dx, called("dx"), c.dtype);
  if (with_bias) compare(dbias, expected_dbias, called("dbias"), DType::Float32);
}

}  // namespace

void drive_gelu(const Case& c) {
  drive(c, true, GeluForm::Exact);
  drive(c, false, GeluForm::Tanh);
  drive(c, true, GeluForm::Sigmoid);
}

}  // namespace evakernels::drive
