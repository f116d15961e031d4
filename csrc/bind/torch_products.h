// torch's matrix products, for the bindings of ops that need some.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "bind/torch_arguments.h"

namespace evakernels {

// out = a @ b.
inline void multiply_into(const Tensor& out, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

// sum += a @ b.
inline void add_product(const Tensor& sum, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(sum.get(), sum.get(), a.get(), b.get(), 1.0, 1.0));
}

}  // namespace evakernels
