// What the torch bindings share: checks, dtypes, and torch's threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bind/array.h"
#include "cpu/parallel.h"

namespace evakernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

inline Sizes sizes_of(const Tensor& tensor) { return {tensor.sizes().data(), tensor.sizes().size()}; }

inline Sizes strides_of(const Tensor& tensor) { return {tensor.strides().data(), tensor.strides().size()}; }

// Valid as long as the tensor is.
inline Array array_of(const Tensor& tensor, const char* name) {
  return {name,
          const_cast<void*>(tensor.const_data_ptr()),
          dtype_of(tensor, name),
          sizes_of(tensor),
          strides_of(tensor),
          true};
}

inline Array array_of(const std::optional<Tensor>& tensor, const char* name) {
  return tensor ? array_of(*tensor, name) : no_array(name);
}

// For tensors of no elements that stand for none.
inline Array array_if(bool exists, const Tensor& tensor, const char* name) {
  return exists ? array_of(tensor, name) : no_array(name);
}

// torch::stable::contiguous and new_empty look their operators up by name: 0.7 us each (AMD EPYC, Zen 4), and
// a call of an op needs six of them.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Uninitialised and contiguous, of the dtype of `like` if none is given.
inline Tensor new_tensor(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                         std::optional<ScalarType> dtype = std::nullopt) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t axis = sizes.size(); axis-- > 1;) {
    strides[axis - 1] = strides[axis] * std::max<int64_t>(1, sizes[axis]);
  }
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const auto value = torch::stable::detail::from(dtype.value_or(like.scalar_type()));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), torch::stable::detail::to<int32_t>(value),
                                                  device_type, device_index, &handle));
  return Tensor(handle);
}

inline std::optional<Tensor> contiguous_or_none(const std::optional<Tensor>& tensor) {
  if (!tensor) return std::nullopt;
  return as_contiguous(*tensor);
}

inline const void* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

// For gradients, of which those that nobody wants have no elements.
inline Array array_unless_empty(const Tensor& tensor, const char* name) {
  return array_if(tensor.numel() > 0, tensor, name);
}

// Of the gradients that an op may leave out, which it shall give: in the order of its results.
using Wanted = std::vector<bool>;

// The gradient of a parameter of a row; without elements, and of the dtype of `otherwise`, where there is
// none or none is wanted.
inline Tensor new_gradient(const std::optional<Tensor>& parameter, const Tensor& otherwise, bool wanted) {
  return parameter && wanted ? new_tensor(*parameter, {parameter->size(-1)}) : new_tensor(otherwise, {0});
}

inline Tensor new_float32(const Tensor& like, const std::vector<int64_t>& sizes) {
  return new_tensor(like, sizes, ScalarType::Float);
}

}  // namespace evakernels
