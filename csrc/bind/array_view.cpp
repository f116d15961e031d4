#include "bind/array_view.h"

namespace py = pybind11;

namespace evakernels {
namespace {

// What a DLPack "dltensor" capsule points to (the unversioned protocol, which every library still exports).
namespace dlpack {
constexpr int32_t kCpu = 1;
constexpr uint8_t kFloat = 2;
constexpr uint8_t kBFloat = 4;

struct Tensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t type_code;
  uint8_t type_bits;
  uint16_t type_lanes;
  int64_t* shape;
  int64_t* strides;  // in elements; null: dense
  uint64_t byte_offset;
};
}  // namespace dlpack

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::BFloat16:
      return "bfloat16";
    case DType::Float16:
      return "float16";
    default:
      return "float32";
  }
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text;
  for (int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

// strides are in units of `unit` (1 for elements, the item's size for bytes).
template <class Strides>
bool is_dense(const std::vector<int64_t>& shape, const Strides& strides, int64_t unit) {
  int64_t expected = unit;
  for (size_t i = shape.size(); i-- > 0;) {
    if (shape[i] > 1 && strides[i] != expected) return false;
    expected *= shape[i];
  }
  return true;
}

}  // namespace

ArrayView::ArrayView(const py::object& array, Access access, std::string name) : name_(std::move(name)) {
  if (py::isinstance<py::buffer>(array)) {
    view_buffer(py::reinterpret_borrow<py::buffer>(array), access);
  } else if (py::hasattr(array, "__dlpack__")) {
    view_dlpack(array);
  } else {
    throw py::type_error(name_ + " must be a NumPy array, a torch CPU tensor or the like, not " +
                         std::string(py::str(py::type::of(array))));
  }
}

void ArrayView::view_buffer(const py::buffer& buffer, Access access) {
  // Kept by Python's own memoryview, which releases the buffer when it dies.
  auto view = py::reinterpret_steal<py::object>(PyMemoryView_FromObject(buffer.ptr()));
  if (!view) throw py::error_already_set();
  const Py_buffer* info = PyMemoryView_GET_BUFFER(view.ptr());
  const std::string format = info->format == nullptr ? "B" : info->format;
  if (format == "f") {
    dtype_ = DType::Float32;
  } else if (format == "e") {
    dtype_ = DType::Float16;
  } else {
    throw py::type_error(name_ + " has buffer format '" + format +
                         "'; accepted are float32 and float16 (bfloat16 only through DLPack)");
  }
  if (access == Access::Write && info->readonly) throw py::value_error(name_ + " is read-only");
  shape_.assign(info->shape, info->shape + info->ndim);
  if (!is_dense(shape_, info->strides, info->itemsize)) throw py::value_error(name_ + " must be dense");
  data_ = info->buf;
  owner_ = std::move(view);
}

void ArrayView::view_dlpack(const py::object& array) {
  auto capsule = array.attr("__dlpack__")();
  const auto* tensor = static_cast<const dlpack::Tensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
  if (tensor == nullptr) throw py::error_already_set();
  if (tensor->device_type != dlpack::kCpu) throw py::value_error(name_ + " must be on the CPU");
  if (tensor->type_lanes == 1 && tensor->type_code == dlpack::kFloat && tensor->type_bits == 32) {
    dtype_ = DType::Float32;
  } else if (tensor->type_lanes == 1 && tensor->type_code == dlpack::kFloat && tensor->type_bits == 16) {
    dtype_ = DType::Float16;
  } else if (tensor->type_lanes == 1 && tensor->type_code == dlpack::kBFloat && tensor->type_bits == 16) {
    dtype_ = DType::BFloat16;
  } else {
    throw py::type_error(name_ + " has an unsupported dtype; accepted are float32, bfloat16 and float16");
  }
  shape_.assign(tensor->shape, tensor->shape + tensor->ndim);
  if (tensor->strides != nullptr && !is_dense(shape_, tensor->strides, 1)) {
    throw py::value_error(name_ + " must be dense");
  }
  data_ = static_cast<char*>(tensor->data) + tensor->byte_offset;
  // The capsule was not renamed to "used_dltensor", so its own destructor gives the tensor back.
  owner_ = std::move(capsule);
}

int64_t ArrayView::size() const {
  int64_t total = 1;
  for (int64_t size : shape_) total *= size;
  return total;
}

void ArrayView::require_dtype(DType dtype) const {
  if (dtype_ == dtype) return;
  throw py::type_error(name_ + " is " + dtype_name(dtype_) + ", but must be " + dtype_name(dtype));
}

void ArrayView::require_shape(const std::vector<int64_t>& shape) const {
  if (shape_ == shape) return;
  throw py::value_error(name_ + " has shape " + shape_text(shape_) + ", but must have " + shape_text(shape));
}

}  // namespace evakernels
