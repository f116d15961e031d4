// torch's matrix products, for the bindings of ops that need some.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "bind/torch_arguments.h"

namespace evakernels {

// out = a @ b.
inline void multiply_into(const Tensor& out, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

// sum += a @ b.
inline void add_product(const Tensor& sum, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(sum.get(), sum.get(), a.get(), b.get(), 1.0, 1.0));
}

// a * b, the dtype that of torch.
inline Tensor product_of_elements(const Tensor& a, const Tensor& b) {
  AtenTensorHandle result = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mul_Tensor(a.get(), b.get(), &result));
  return Tensor(result);
}

inline Tensor transposed(const Tensor& matrices) {
  return torch::stable::transpose(matrices, matrices.dim() - 2, matrices.dim() - 1);
}

}  // namespace evakernels
