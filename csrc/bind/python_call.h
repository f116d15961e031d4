// A call of a function of evakernels._C: its inputs and outputs as arrays, and the way to the kernels.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <deque>
#include <optional>
#include <string>
#include <vector>

#include "bind/array_view.h"
#include "bind/launch.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cuda/memory.h"

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

// Memory of the CUDA runtime, given back in the stream's order.
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
  // Of any dtype.
  Array output(Output array, const char* name, const Array& x, OutputDType) {
    const Array given = update(array, name);
    require_sizes(given, x.sizes);
    return given;
  }
  Array output_if(bool, Output array, const char* name, Sizes sizes, DType dtype, DType /*otherwise*/) {
    return array.is_none() ? no_array(name) : output(array, name, sizes, dtype);
  }
  // The binding checks these two.
  Array statistic(bool, Output array, const char* name, const Array& /*x*/) {
    return array.is_none() ? no_array(name) : update(array, name);
  }
  Array gradient(bool, Output array, const char* name, const Array& /*parameter*/, DType = DType::Float32) {
    return array.is_none() ? no_array(name) : update(array, name);
  }

  bool is_on_gpu() const { return kCudaIsInterpreted || device().is_gpu(); }

  // The launchers are template arguments: those of a device that this build leaves out needn't be linked.
  template <auto Cpu, auto Cuda, class Params>
  void launch(const char* op, const Params& params) {
    const py::gil_scoped_release unlocked;
    require(!isa_ || !is_on_gpu(), "isa is for arrays on the CPU");
    require(stream_ == 0 || is_on_gpu(), "stream is for arrays on a GPU");
    if constexpr (kCudaIsBuilt) {
      if (is_on_gpu()) return launch_on_gpu<Cuda>(op, params);
    }
    if constexpr (!kCudaIsInterpreted) {
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

  // All on one device; they live as long as the call.
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

// What the module adds to itself, one function for each family of ops.
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
#define EVAKERNELS_OP(m, op, ...) \
  m.def(#op, &Bound<&op>::Function<>::call, __VA_ARGS__, "isa"_a = py::none(), "stream"_a = 0)
