#include "drive.h"
#include "include/swiglu.h"

namespace evakernels::drive {
namespace {

// Gate and up as halves of one packed matrix, or each by itself.
struct Inputs {
  Buffer gate_buffer, up_buffer;
  SwigluRows gate, up;

  Inputs(const Case& c, bool packed, int64_t before)
      : gate_buffer(Buffer::random(c.dtype, c.rows * c.width * (packed ? 2 : 1), before)),
        up_buffer(Buffer::random(c.dtype, packed ? 0 : c.rows * c.width)) {
    const int64_t bytes = c.width * (c.dtype == DType::Float32 ? 4 : 2);
    gate = {gate_buffer.data(), packed ? 2 * c.width : c.width};
    up = {packed ? static_cast<char*>(gate_buffer.data()) + bytes : up_buffer.data(), gate.stride};
  }
};

// `before`: 0, or the buffers begin so many elements after a word of 16 bytes, and others farther.
void drive(const Case& c, bool packed, bool with_norm, int64_t before = 0) {
  const int64_t size = c.rows * c.width;
  const std::string name = std::string(packed ? "packed " : "") +
                           (with_norm ? "swiglu with a norm" : "swiglu") + (before ? ", shifted" : "");
  const auto shifted = [&](int64_t more) { return before ? before + more : 0; };
  const auto called = [&](const char* what) { return name_of(c, (name + ", " + what).c_str()); };
  Inputs in(c, packed, before);
  Buffer weight = Buffer::random(DType::Float32, c.width), bias = Buffer::random(DType::Float32, c.width);
  Buffer out(c.dtype, size, shifted(2)), mean(DType::Float32, c.rows), rstd(DType::Float32, c.rows);
  const void* const norm_weight = with_norm ? weight.data() : nullptr;
  const SwigluForward forward = {.gate = in.gate,
                                 .up = in.up,
                                 .norm_weight = norm_weight,
                                 .norm_bias = with_norm ? bias.data() : nullptr,
                                 .out = out.data(),
                                 .mean = mean.floats(),
                                 .rstd = rstd.floats(),
                                 .rows = c.rows,
                                 .width = c.width,
                                 .padding = 0,
                                 .eps = kEps,
                                 .dtype = c.dtype,
                                 .weight_dtype = DType::Float32};
  run(cuda::swiglu_forward(forward, nullptr), called("forward"));
  check_written(out, called("out"));

  Buffer dout = Buffer::random(c.dtype, size, shifted(4));
  Buffer dgate(c.dtype, size, shifted(6)), dup(c.dtype, size, shifted(10));
  Buffer dweight(DType::Float32, c.width), dbias(DType::Float32, c.width);
  const SwigluBackward backward = {.dout = dout.data(),
                                   .gate = in.gate,
                                   .up = in.up,
                                   .norm_weight = norm_weight,
                                   .mean = mean.floats(),
                                   .rstd = rstd.floats(),
                                   .dgate = dgate.data(),
                                   .dup = dup.data(),
                                   .dweight = with_norm ? dweight.data() : nullptr,
                                   .dbias = with_norm ? dbias.data() : nullptr,
                                   .rows = c.rows,
                                   .width = c.width,
                                   .padding = 0,
                                   .dtype = c.dtype,
                                   .weight_dtype = DType::Float32};
  Scratch scratch;
  run(cuda::swiglu_backward(backward, scratch, nullptr), called("backward"));
  check_written(dgate, called("dgate"));
  check_written(dup, called("dup"));
  if (!with_norm) return;
  check_written(dweight, called("dweight"));
  check_written(dbias, called("dbias"));
}

}  // namespace

void drive_swiglu(const Case& c) {
  for (const bool packed : {false, true}) {
    for (const bool with_norm : {false, true}) drive(c, packed, with_norm);
  }
  for (const int64_t before : shifts_of(c)) {
    if (before) drive(c, true, true, before);
  }
}

}  // namespace evakernels::drive
