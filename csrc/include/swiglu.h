// Parameters of the swiglu launchers: silu(gate) * up, and optionally its LayerNorm.
//
// The last `padding` channels are zero in gate, up, norm_weight and norm_bias; the statistics don't count
// them.
#pragma once

#include "include/launcher.h"

namespace evakernels {

// Dense rows, `stride` elements apart, such as a half of a packed projection.
struct SwigluRows {
  const void* data;
  int64_t stride;
};

struct SwigluForward {
  SwigluRows gate;          // [rows, width], dtype
  SwigluRows up;            // [rows, width], dtype
  const void* norm_weight;  // [width], weight_dtype; null: no norm
  const void* norm_bias;    // [width], weight_dtype; null: zeros
  void* out;                // [rows, width], dtype, dense
  float* mean;              // [rows]; null without a norm
  float* rstd;              // [rows]; null without a norm
  int64_t rows;
  int64_t width;
  int64_t padding;
  float eps;
  DType dtype;
  DType weight_dtype;
};

struct SwigluBackward {
  const void* dout;         // [rows, width], dtype, dense
  SwigluRows gate;          // [rows, width], dtype
  SwigluRows up;            // [rows, width], dtype
  const void* norm_weight;  // [width], weight_dtype; null: no norm
  const float* mean;        // [rows]
  const float* rstd;        // [rows]
  void* dgate;              // [rows, width], dtype, dense
  void* dup;                // [rows, width], dtype, dense
  void* dweight;            // [width], weight_dtype; null: not needed
  void* dbias;              // [width], weight_dtype; null: not needed
  int64_t rows;
  int64_t width;
  int64_t padding;
  DType dtype;
  DType weight_dtype;
};

namespace cpu {

void swiglu_forward(const SwigluForward& params, Isa isa, ParallelFor parallel_for);

// The result doesn't depend on the number of threads.
void swiglu_backward(const SwigluBackward& params, Isa isa, ParallelFor parallel_for);

// Scratch floats per column.
constexpr int64_t kSwigluScratch = 2;

// The loops of one instruction set.
struct SwigluKernels {
  // Rows [begin, end). weight, bias: [width] floats, in place of the parameters'; null without a norm.
  // scratch: kSwigluScratch * width floats.
  void (*forward)(const SwigluForward& params, const float* weight, const float* bias, float* scratch,
                  int64_t begin, int64_t end);

  // Writes dgate and dup for rows [begin, end) and adds their share to dweight and dbias, [width] or null.
  void (*backward)(const SwigluBackward& params, const float* weight, float* dweight, float* dbias,
                   float* scratch, int64_t begin, int64_t end);
};

EVAKERNELS_FOR_EACH_ISA(extern const SwigluKernels swiglu;)

}  // namespace cpu

namespace cuda {

Error swiglu_forward(const SwigluForward& params, Stream stream);

Error swiglu_backward(const SwigluBackward& params, Scratch& scratch, Stream stream);

// Without and with the norm.
Error swiglu_product_forward(const SwigluForward& params, Stream stream);
Error swiglu_product_backward(const SwigluBackward& params, Stream stream);
Error swiglu_norm_forward(const SwigluForward& params, Stream stream);
Error swiglu_norm_backward(const SwigluBackward& params, Scratch& scratch, Stream stream);

}  // namespace cuda

}  // namespace evakernels
