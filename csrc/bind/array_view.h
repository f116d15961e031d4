// A view of a dense CPU array that Python hands over: anything with the buffer protocol (NumPy) or DLPack
// (torch, JAX).
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "common/dtype.h"

namespace evakernels {

enum class Access { Read, Write };

// Holds the array alive and unchanged in place for as long as the view exists.
class ArrayView {
 public:
  // Throws TypeError or ValueError, naming the argument, unless it is a dense CPU array of a supported dtype.
  ArrayView(const pybind11::object& array, Access access, std::string name);

  void* data() const { return data_; }
  DType dtype() const { return dtype_; }
  const std::vector<int64_t>& shape() const { return shape_; }
  int64_t size() const;

  void require_dtype(DType dtype) const;
  void require_shape(const std::vector<int64_t>& shape) const;

 private:
  void view_buffer(const pybind11::buffer& buffer, Access access);
  void view_dlpack(const pybind11::object& array);

  std::string name_;
  void* data_ = nullptr;
  DType dtype_ = DType::Float32;
  std::vector<int64_t> shape_;
  pybind11::object owner_;
};

}  // namespace evakernels
