// From what is known at run time to the code that was compiled for it.
#pragma once

#include "cuda/device.h"

namespace evakernels::cuda {

// Calls body with a value of the element type and returns what it returns. Bodies are the host's or the
// device's: what nvcc would warn of is that one function has both.
#pragma nv_exec_check_disable
template <class Body>
__host__ __device__ __forceinline__ auto with_element_type(DType dtype, const Body& body) {
  if (dtype == DType::Float32) return body(float{});
  if (dtype == DType::BFloat16) return body(BFloat16{});
  return body(Float16{});
}

template <int N>
using Constant = std::integral_constant<int, N>;

// Calls body with the number of elements that are accessed at a time, as aligned_elements (norm_plan.h) found
// it.
template <int WIDE, class Body>
Error with_elements(int elements, const Body& body) {
  if constexpr (WIDE > 2) {
    if (elements == WIDE) return body(Constant<WIDE>{});
  }
  if constexpr (WIDE > 1) {
    if (elements == 2) return body(Constant<2>{});
  }
  return body(Constant<1>{});
}

}  // namespace evakernels::cuda
