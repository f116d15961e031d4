// Parameters of the gelu launchers: gelu(x + bias), element by element.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace evakernels {

struct GeluForward {
  const void* x;     // [rows, width], dtype
  const void* bias;  // [width], bias_dtype; null: zeros
  void* out;         // [rows, width], dtype
  int64_t rows;
  int64_t width;
  DType dtype;
  DType bias_dtype;
  bool tanh;  // the approximation by a tanh instead of the exact form
};

struct GeluBackward {
  const void* dout;  // [rows, width], dtype
  const void* x;     // [rows, width], dtype
  const void* bias;  // [width], bias_dtype; null: zeros
  void* dx;          // [rows, width], dtype
  void* dbias;       // [width], bias_dtype; null: not wanted
  int64_t rows;
  int64_t width;
  DType dtype;
  DType bias_dtype;
  bool tanh;
};

}  // namespace evakernels
