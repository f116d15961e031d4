// Parameters of the row_quantization launchers: rows in 8 bits, each with a scale of its own, and back from
// what a product made of them.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace evakernels {

// Of products that multiply unsigned by signed bytes, as those of VNNI do.
constexpr float kUint8Zero = 128.0f;
constexpr float kInt8Largest = 127.0f;

struct QuantizeRows {
  const void* x;   // [rows, width], dtype
  uint8_t* codes;  // [rows, width]: x / scale, rounded to the nearest even, + 128
  float* scale;    // [rows]: the largest |x| / 127; NaN for a row that isn't finite
  int64_t rows;
  int64_t width;
  DType dtype;
};

struct DequantizeRows {
  const void* y;       // [rows, width], dtype
  const float* scale;  // [rows]
  const void* bias;    // [width], bias_dtype; null: zeros
  void* out;           // [rows, width], dtype: y scale + bias
  int64_t rows;
  int64_t width;
  DType dtype;
  DType bias_dtype;
};

}  // namespace evakernels
