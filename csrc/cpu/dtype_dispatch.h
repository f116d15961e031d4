// From a dtype that is known at run time to code that is compiled for it.
#pragma once

#include "common/dtype.h"

namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE {

// Calls body with a value of the element type, of which only the type counts.
template <class Body>
static inline void with_element_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::Float32:
      return body(float{});
    case DType::BFloat16:
      return body(BFloat16{});
    case DType::Float16:
      return body(Float16{});
  }
}

}  // namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE
