#include "drive.h"
#include "include/gelu.h"

namespace evakernels::drive {
namespace {

void drive(const Case& c, bool with_bias, GeluForm form) {
  constexpr const char* kNames[] = {"", ", tanh", ", sigmoid"};
  const int64_t size = c.rows * c.width;
  const std::string name =
      std::string(with_bias ? "gelu with a bias" : "gelu") + kNames[static_cast<int>(form)];
  const auto called = [&](const char* what) { return name_of(c, (name + ", " + what).c_str()); };
  Buffer x = Buffer::random(c.dtype, size), dout = Buffer::random(c.dtype, size);
  Buffer bias = Buffer::random(DType::Float32, c.width);
  Buffer out(c.dtype, size), dx(c.dtype, size), dbias(DType::Float32, c.width);
  const void* const added = with_bias ? bias.data() : nullptr;
  const GeluForward forward = {x.data(), added, out.data(), c.rows, c.width, c.dtype, DType::Float32, form};
  run(cuda::gelu_forward(forward, nullptr), called("forward"));
  check_written(out, called("out"));

  const GeluBackward backward = {
      dout.data(), x.data(), added,   dx.data(),      with_bias ? dbias.data() : nullptr,
      c.rows,      c.width,  c.dtype, DType::Float32, form};
  Scratch scratch;
  run(cuda::gelu_backward(backward, scratch, nullptr), called("backward"));
  check_written(dx, called("dx"));
  if (with_bias) check_written(dbias, called("dbias"));
}

}  // namespace

void drive_gelu(const Case& c) {
  drive(c, true, GeluForm::Exact);
  drive(c, false, GeluForm::Tanh);
  drive(c, true, GeluForm::Sigmoid);
}

}  // namespace evakernels::drive
