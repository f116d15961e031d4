// What the torch bindings share: checks, dtypes, and torch's threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "common/dtype.h"
#include "cpu/parallel.h"

namespace evakernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

inline void torch_parallel(int64_t count, int64_t grain, cpu::RangeBody body, void* context) {
  torch::stable::parallel_for(0, count, grain,
                              [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

inline DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::Float32;
    case ScalarType::BFloat16:
      return DType::BFloat16;
    case ScalarType::Half:
      return DType::Float16;
    default:
      throw std::invalid_argument(std::string(name) +
                                  ": the compiled kernels accept float32, bfloat16 and float16 only");
  }
}

inline void require_same_shape(const Tensor& a, const Tensor& b, const char* names) {
  require(a.sizes().equals(b.sizes()), std::string(names) + " must have the same shape");
}

inline std::vector<int64_t> leading_sizes(const Tensor& x) {
  require(x.dim() > 0, "x must have at least one dimension");
  return {x.sizes().begin(), x.sizes().end() - 1};
}

inline int64_t product(const std::vector<int64_t>& sizes) {
  int64_t total = 1;
  for (int64_t size : sizes) total *= size;
  return total;
}

inline std::optional<Tensor> contiguous_vector(const std::optional<Tensor>& vector, int64_t width,
                                               DType dtype, const char* name) {
  if (!vector) return std::nullopt;
  require(vector->dim() == 1 && vector->size(0) == width,
          std::string(name) + " must have one element for each of the " + std::to_string(width) + " columns");
  const DType own = dtype_of(*vector, name);
  require(own == dtype || own == DType::Float32, std::string(name) + " must be float32 or of x's dtype");
  return torch::stable::contiguous(*vector);
}

inline const void* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

inline Tensor new_float32(const Tensor& like, const std::vector<int64_t>& sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

}  // namespace evakernels
