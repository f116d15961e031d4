// The arrays that Python hands over in a call: anything with the buffer protocol (NumPy) or DLPack (torch,
// JAX, CuPy).
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "bind/array.h"

namespace evakernels {

// As DLPack numbers them.
struct Device {
  int32_t type = 1;
  int32_t number = 0;

  bool is_gpu() const { return type == 2; }
  bool operator==(const Device&) const = default;
};

enum class Access { Read, Write };
enum class Content { Numbers, Indices };  // float32, bfloat16 or float16; int64

// Holds an array alive and unchanged in place for as long as the view exists.
class ArrayView {
 public:
  // Throws TypeError or ValueError, naming the argument, unless it is an array of such content on a CPU, or
  // on a GPU that this build has kernels for. What was put on the stream comes after what fills the array.
  ArrayView(const pybind11::object& array, const char* name, Access access, Content content,
            uintptr_t stream);

  Array array() const { return {name_, data_, dtype_, shape_, strides_, true}; }
  const Device& device() const { return device_; }
  bool is_dense() const;

 private:
  void view_buffer(const pybind11::buffer& buffer, Access access, Content content);
  void view_dlpack(const pybind11::object& array, Content content, uintptr_t stream);

  const char* name_;
  void* data_ = nullptr;
  DType dtype_ = DType::Float32;
  std::vector<int64_t> shape_;
  std::vector<int64_t> strides_;  // in elements
  Device device_;
  pybind11::object owner_;
};

}  // namespace evakernels
