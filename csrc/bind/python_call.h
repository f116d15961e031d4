// Call of a function of evakernels._C: inputs and outputs as arrays, and the launch of the kernels.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <deque>
#include <optional>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "include/launcher.h"

namespace evakernels {

namespace py = pybind11;
using namespace pybind11::literals;

using Input = const py::object&;
using OptionalInput = const py::object&;
using Inputs = const std::vector<py::object>&;
using Output = const py::object&;
using OutputDType = Absent;
template <class Torch, class Python>
using Either = Python;

// Always true: an output is None where no gradient is needed.
struct NeedsGrad {
  bool at(size_t) const { return true; }
};

template <>
inline constexpr Source kSource<NeedsGrad> = Source::Nobody;

using IsaName = std::optional<std::string>;

// In DLPack's numbering.
struct Device {
  int32_t type = 1;
  int32_t number = 0;

  bool is_gpu() const { return type == 2; }
  bool operator==(const Device&) const = default;
};

enum class Access { Read, Write };
enum class Content { Numbers, Indices };  // float32, bfloat16 or float16; int64

// The struct in a DLPack "dltensor" capsule (the unversioned protocol, which every library still exports).
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

inline std::optional<DType> dtype_of(const Tensor& tensor, Content content) {
  const auto is = [&](uint8_t code, uint8_t bits) {
    return tensor.type_lanes == 1 && tensor.type_code == code && tensor.type_bits == bits;
  };
  if (content == Content::Indices) return is(kInt, 64) ? std::optional(DType::Float32) : std::nullopt;
  if (is(kFloat, 32)) return DType::Float32;
  if (is(kBFloat, 16)) return DType::BFloat16;
  return is(kFloat, 16) ? std::optional(DType::Float16) : std::nullopt;
}
}  // namespace dlpack

inline std::optional<DType> dtype_of(const std::string& format, Content content) {
  if (content == Content::Indices) {
    const bool is_int64 = (format == "l" && sizeof(long) == 8) || format == "q";
    return is_int64 ? std::optional(DType::Float32) : std::nullopt;
  }
  if (format == "f") return DType::Float32;
  return format == "e" ? std::optional(DType::Float16) : std::nullopt;
}

inline const char* accepted(Content content) {
  return content == Content::Indices ? "int64" : "float32, bfloat16 and float16";
}

inline std::vector<int64_t> dense_strides(const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * shape[i];
  return strides;
}

// Keeps an array alive and in place while the view exists.
class ArrayView {
 public:
  // Throws a TypeError or ValueError that names the argument unless it is an array of such content on the
  // CPU, or on a GPU that this build has kernels for. Work on `stream` is ordered after what fills the array.
  ArrayView(const py::object& array, const char* name, Access access, Content content, uintptr_t stream)
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

  Array array() const { return {name_, data_, dtype_, shape_, strides_, true}; }
  const Device& device() const { return device_; }
  bool is_dense() const {
    if (product(shape_) == 0) return true;
    const std::vector<int64_t> dense = dense_strides(shape_);
    for (size_t i = 0; i < shape_.size(); ++i) {
      if (shape_[i] > 1 && strides_[i] != dense[i]) return false;
    }
    return true;
  }

 private:
  void view_buffer(const py::buffer& buffer, Access access, Content content) {
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

  void view_dlpack(const py::object& array, Content content, uintptr_t stream) {
    const auto where = array.attr("__dlpack_device__")().cast<std::pair<int32_t, int32_t>>();
    const std::string name = name_;
    device_ = {where.first, where.second};
    constexpr bool kServesGpus = kCudaIsBuilt && !kCudaIsInterpreted;
    if (device_.type != Device{}.type && !(kServesGpus && device_.is_gpu())) {
      throw py::value_error(name + " must be on the CPU" + (kServesGpus ? " or on a GPU" : ""));
    }
    // DLPack's 1 is the default stream.
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

  const char* name_;
  void* data_ = nullptr;
  DType dtype_ = DType::Float32;
  std::vector<int64_t> shape_;
  std::vector<int64_t> strides_;  // in elements
  Device device_;
  py::object owner_;
};

// Stream-ordered memory of the CUDA runtime.
class StreamScratch final : public cuda::Scratch {
 public:
  explicit StreamScratch(cuda::Stream stream) : stream_(stream) {}
  StreamScratch(const StreamScratch&) = delete;
  StreamScratch& operator=(const StreamScratch&) = delete;
  ~StreamScratch() {
    if (memory_) cuda::release(memory_, stream_);
  }

  cuda::Error allocate(float** memory, int64_t floats) override {
    if (floats == 0) return nullptr;
    const cuda::Error error = cuda::allocate(&memory_, static_cast<size_t>(floats) * sizeof(float), stream_);
    *memory = static_cast<float*>(memory_);
    return error;
  }

 private:
  cuda::Stream stream_;
  void* memory_ = nullptr;
};

class Call {
 public:
  Call(const IsaName& isa, uintptr_t stream) : isa_(isa), stream_(stream) {}

  // Arrays must be dense unless a binding checks strides itself.
  Array read(Input array, const char* name) { return dense(array, name, Access::Read); }
  Array read_optional(OptionalInput array, const char* name) {
    return array.is_none() ? no_array(name) : read(array, name);
  }
  Array read_if(bool, Input array, const char* name) { return read_optional(array, name); }
  Array read_readable(Input array, const char* name, bool (*)(Sizes, Sizes)) {
    return view(array, name, Access::Read, Content::Numbers).array();
  }
  Array read_index(OptionalInput array, const char* name, bool /*accepts_int32*/ = false) {
    return array.is_none() ? no_array(name) : dense(array, name, Access::Read, Content::Indices);
  }
  Array read_float32(Input array, const char* name) {
    const Array given = read(array, name);
    require_dtype(given, DType::Float32);
    return given;
  }
  Array read_float32_optional(OptionalInput array, const char* name) {
    return array.is_none() ? no_array(name) : read_float32(array, name);
  }
  Array update(Input array, const char* name) { return dense(array, name, Access::Write); }

  Array output(Output array, const char* name, Sizes sizes, DType dtype) {
    const Array given = update(array, name);
    require_sizes(given, sizes);
    require_dtype(given, dtype);
    return given;
  }
  // Output of any dtype.
  Array output(Output array, const char* name, const Array& x, OutputDType) {
    const Array given = update(array, name);
    require_sizes(given, x.sizes);
    return given;
  }
  Array output_if(bool, Output array, const char* name, Sizes sizes, DType dtype, DType /*otherwise*/) {
    return array.is_none() ? no_array(name) : output(array, name, sizes, dtype);
  }
  // Shapes and dtypes of these two are checked by the binding.
  Array statistic(bool, Output array, const char* name, const Array& /*x*/) {
    return array.is_none() ? no_array(name) : update(array, name);
  }
  Array gradient(bool, Output array, const char* name, const Array& /*parameter*/, DType = DType::Float32) {
    return array.is_none() ? no_array(name) : update(array, name);
  }

  bool is_on_gpu() const { return kCudaIsInterpreted || device().is_gpu(); }

  // Launchers are template arguments, so that those of a device without kernels needn't be linked.
  template <auto Cpu, auto Cuda, class Params>
  void launch(const char* op, const Params& params) {
    const py::gil_scoped_release unlocked;
    require(!isa_ || !is_on_gpu(), "isa is for arrays on the CPU");
    require(stream_ == 0 || is_on_gpu(), "stream is for arrays on a GPU");
    if constexpr (kCudaIsBuilt) {
      if (is_on_gpu()) return launch_on_gpu<Cuda>(op, params);
    }
    if constexpr (std::is_null_pointer_v<decltype(Cpu)>) {
      require(false, op, " has kernels for GPUs only");
    } else if constexpr (!kCudaIsInterpreted) {
      Cpu(params, isa_ ? cpu::parse_isa(*isa_) : cpu::active_isa(), cpu::serial_for);
    }
  }

 private:
  Device device() const { return views_.empty() ? Device{} : views_.front().device(); }

  Array dense(Input array, const char* name, Access access, Content content = Content::Numbers) {
    const ArrayView& given = view(array, name, access, content);
    if (!given.is_dense()) throw py::value_error(std::string(name) + " must be dense");
    return given.array();
  }

  // Checks that all arrays are on one device; views live as long as the call.
  const ArrayView& view(Input array, const char* name, Access access, Content content) {
    const ArrayView& added = views_.emplace_back(array, name, access, content, stream_);
    if (added.device() != device()) {
      throw py::value_error(std::string(name) + " and " + views_.front().array().name +
                            " must be on the same device");
    }
    return added;
  }

  template <auto Cuda, class Params>
  void launch_on_gpu(const char* op, const Params& params) {
    const cuda::DeviceGuard guard(device().number);
    raise_if_any(op, guard.error());
    const auto stream = reinterpret_cast<cuda::Stream>(stream_);
    StreamScratch scratch(stream);
    call_launcher<Cuda>(op, params, scratch, stream);
  }

  const IsaName& isa_;
  uintptr_t stream_;
  std::deque<ArrayView> views_;
};

using Registration = void (*)(py::module_&);

// Functions that add the ops of a family to the module.
inline std::vector<Registration>& registrations() {
  static std::vector<Registration> all;
  return all;
}

}  // namespace evakernels

#define EVAKERNELS_OPS(family, m)                             \
  static void register_##family(py::module_& m);              \
  [[maybe_unused]] static const auto& family##_registration = \
      registrations().emplace_back(register_##family);        \
  static void register_##family(py::module_& m)
#define EVAKERNELS_GPU_OPS(family, m) EVAKERNELS_OPS(family, m)
#define EVAKERNELS_OP(m, op, ...) \
  m.def(#op, &Bound<&op>::Function<>::call, __VA_ARGS__, "isa"_a = py::none(), "stream"_a = 0)
