// Parameters of the row_quantization launchers: rows in 8 bits with a scale per row, and back from a matmul
// of them.
#pragma once

#include "include/launcher.h"

namespace evakernels {

// VNNI multiplies unsigned by signed bytes.
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

namespace cpu {

void quantize_rows(const QuantizeRows& params, Isa isa, ParallelFor parallel_for);

void dequantize_rows(const DequantizeRows& params, Isa isa, ParallelFor parallel_for);

// The loops of one instruction set.
struct RowQuantizationKernels {
  // Rows [begin, end).
  void (*quantize)(const QuantizeRows& params, int64_t begin, int64_t end);

  // Rows [begin, end). bias: [width] floats, in place of params.bias.
  void (*dequantize)(const DequantizeRows& params, const float* bias, int64_t begin, int64_t end);
};

EVAKERNELS_FOR_EACH_ISA(extern const RowQuantizationKernels row_quantization;)

}  // namespace cpu

}  // namespace evakernels
