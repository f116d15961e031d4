// From what is known at run time to the kernel that was compiled for it.
#pragma once

#include "cuda/elements.cuh"

namespace evakernels::cuda {

// Calls body with a value of the element type.
template <class Body>
Error with_element_type(DType dtype, const Body& body) {
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
