#include "bind/array_view.h"

#include <optional>

#include "bind/launch.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace evakernels {
namespace {

// What a DLPack "dltensor" capsule points to (the unversioned protocol, which every library still exports).
namespace dlpack {
constexpr uint8_t kInt = 0;
constexpr uint8_t kFloat = 2;
constexpr uint8_t kBFloat = 4;

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  uint8_t type_code;
  uint8_t type_bits;
  uint16_t type_lanes;
  int64_t* shape;
  int64_t* strides;  // in elements; null: dense
  uint64_t byte_offset;
};

std::optional<DType> dtype_of(const Tensor& tensor, Content content) {
  const auto is = [&](uint8_t code, uint8_t bits) {
    return tensor.type_lanes == 1 && tensor.type_code == code && tensor.type_bits == bits;
  };
  if (content == Content::Indices) return is(kInt, 64) ? std::optional(DType::Float32) : std::nullopt;
  if (is(kFloat, 32)) return DType::Float32;
  if (is(kBFloat, 16)) return DType::BFloat16;
  return is(kFloat, 16) ? std::optional(DType::Float16) : std::nullopt;
}
}  // namespace dlpack

std::optional<DType> dtype_of(const std::string& format, Content content) {
  if (content == Content::Indices) {
    const bool is_int64 = (format == "l" && sizeof(long) == 8) || format == "q";
    return is_int64 ? std::optional(DType::Float32) : std::nullopt;
  }
  if (format == "f") return DType::Float32;
  return format == "e" ? std::optional(DType::Float16) : std::nullopt;
}

const char* accepted(Content content) {
  return content == Content::Indices ? "int64" : "float32, bfloat16 and float16";
}

std::vector<int64_t> dense_strides(const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * shape[i];
  return strides;
}

}  // namespace

ArrayView::ArrayView(const py::object& array, const char* name, Access access, Content content,
                     uintptr_t stream)
    : name_(name) {
  if (py::isinstance<py::buffer>(array)) {
    view_buffer(py::reinterpret_borrow<py::buffer>(array), access, content);
  } else if (py::hasattr(array, "__dlpack__") && py::hasattr(array, "__dlpack_device__")) {
    view_dlpack(array, content, stream);
  } else {
    throw py::type_error(std::string(name) + " must be a NumPy array, a torch tensor or the like, not " +
                         std::string(py::str(py::type::of(array))));
  }
}

void ArrayView::view_buffer(const py::buffer& buffer, Access access, Content content) {
  // Kept by Python's own memoryview, which releases the buffer when it dies.
  auto view = py::reinterpret_steal<py::object>(PyMemoryView_FromObject(buffer.ptr()));
  if (!view) throw py::error_already_set();
  const Py_buffer* info = PyMemoryView_GET_BUFFER(view.ptr());
  const std::string name = name_, format = info->format == nullptr ? "B" : info->format;
  const auto dtype = dtype_of(format, content);
  if (!dtype) {
    throw py::type_error(name + " has buffer format '" + format + "'; accepted are " + accepted(content) +
                         " (bfloat16 only through DLPack)");
  }
  if (access == Access::Write && info->readonly) throw py::value_error(name + " is read-only");
  dtype_ = *dtype;
  shape_.assign(info->shape, info->shape + info->ndim);
  for (int axis = 0; axis < info->ndim; ++axis) {
    if (info->strides[axis] % info->itemsize) throw py::value_error(name + " has uneven strides");
    strides_.push_back(info->strides[axis] / info->itemsize);
  }
  data_ = info->buf;
  owner_ = std::move(view);
}

void ArrayView::view_dlpack(const py::object& array, Content content, uintptr_t stream) {
  const auto where = array.attr("__dlpack_device__")().cast<std::pair<int32_t, int32_t>>();
  const std::string name = name_;
  device_ = {where.first, where.second};
  constexpr bool kServesGpus = kCudaIsBuilt && !kCudaIsInterpreted;
  if (device_.type != Device{}.type && !(kServesGpus && device_.is_gpu())) {
    throw py::value_error(name + " must be on the CPU" + (kServesGpus ? " or on a GPU" : ""));
  }
  // In DLPack's words 1 is the default stream.
  py::object capsule = device_.is_gpu() ? array.attr("__dlpack__")("stream"_a = stream == 0 ? 1 : stream)
                                        : array.attr("__dlpack__")();
  const auto* tensor = static_cast<const dlpack::Tensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
  if (tensor == nullptr) throw py::error_already_set();
  const auto dtype = dlpack::dtype_of(*tensor, content);
  if (!dtype) throw py::type_error(name + " has an unsupported dtype; accepted are " + accepted(content));
  dtype_ = *dtype;
  shape_.assign(tensor->shape, tensor->shape + tensor->ndim);
  strides_ = dense_strides(shape_);
  if (tensor->strides != nullptr) strides_.assign(tensor->strides, tensor->strides + tensor->ndim);
  data_ = static_cast<char*>(tensor->data) + tensor->byte_offset;
  // The capsule was not renamed to "used_dltensor", so its own destructor gives the tensor back.
  owner_ = std::move(capsule);
}

bool ArrayView::is_dense() const {
  if (product(shape_) == 0) return true;
  const std::vector<int64_t> dense = dense_strides(shape_);
  for (size_t i = 0; i < shape_.size(); ++i) {
    if (shape_[i] > 1 && strides_[i] != dense[i]) return false;
  }
  return true;
}

}  // namespace evakernels
