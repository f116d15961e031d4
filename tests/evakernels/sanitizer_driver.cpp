// Runs the layer_norm launchers over awkward shapes on buffers of exactly the right size, for the sanitizers
// to watch.
#include <cmath>
#include <cstdio>
#include <vector>

#include "cpu/layer_norm.h"
#include "sanitizer_buffers.h"

using namespace evakernels;

namespace {

// Every output of a row of ones is known: y = bias = 1, dx = 0, dweight = 0, dbias = rows.
bool check(cpu::Isa isa, DType dtype, DType weight_dtype, int64_t rows, int64_t width) {
  const auto x = ones(dtype, rows * width);
  const auto weight = ones(weight_dtype, width);
  auto y = ones(dtype, rows * width), dx = ones(dtype, rows * width);
  auto dweight = ones(weight_dtype, width), dbias = ones(weight_dtype, width);
  std::vector<float> mean(rows), rstd(rows);
  const LayerNormForward forward = {
      .x = x.data(),
      .weight = weight.data(),
      .bias = weight.data(),
      .y = y.data(),
      .mean = mean.data(),
      .rstd = rstd.data(),
      .rows = rows,
      .width = width,
      .eps = 1e-6f,
      .dtype = dtype,
      .weight_dtype = weight_dtype,
      .rms = false,
  };
  cpu::layer_norm_forward(forward, isa, halves);
  const LayerNormBackward backward = {
      .dy = x.data(),
      .x = x.data(),
      .weight = weight.data(),
      .mean = mean.data(),
      .rstd = rstd.data(),
      .dx = dx.data(),
      .dweight = dweight.data(),
      .dbias = dbias.data(),
      .rows = rows,
      .width = width,
      .dtype = dtype,
      .weight_dtype = weight_dtype,
      .rms = false,
  };
  cpu::layer_norm_backward(backward, isa, halves);
  for (unsigned char byte : dx) {
    if ((byte & 0x7F) != 0) return false;
  }
  return y == ones(dtype, rows * width);
}

}  // namespace

int main() {
  int checks = 0;
  for (cpu::Isa isa : cpu::available_isas()) {
    for (DType dtype : {DType::Float32, DType::BFloat16, DType::Float16}) {
      for (DType weight_dtype : {DType::Float32, dtype}) {
        for (int64_t rows : {0, 1, 16, 40, 1100}) {
          for (int64_t width : {1, 3, 7, 16, 63, 64, 65, 130}) {
            if (!check(isa, dtype, weight_dtype, rows, width)) {
              std::printf("wrong: %s, rows %lld, width %lld\n", cpu::name(isa), (long long)rows,
                          (long long)width);
              return 1;
            }
            ++checks;
          }
        }
      }
    }
  }
  std::printf("%d checks\n", checks);
}
