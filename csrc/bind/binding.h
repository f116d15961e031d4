// Torch operators: inputs as arrays, results, the launch of the kernels, and registration.
//
// A binding is a function of tensors and numbers, in the order of the op's schema. Its `Call` reads the
// inputs and makes the results, in the order in which the op returns them:
//
//   Tensor gelu_forward(Input x_in, OptionalInput bias_in, int64_t form) {
//     Call call;
//     const Array x = call.read(x_in, "x"), bias = call.read_optional(bias_in, "bias");
//     const GeluForward params = {..., .out = call.output("out", x.sizes, x.dtype).data, ...};
//     call.launch<cpu::gelu_forward, cuda::gelu_forward>("gelu_forward", params);
//     return call.results<1>();
//   }
//
// EVAKERNELS_OPS(family, m) { EVAKERNELS_OP(m, gelu_forward); } registers it.
//
// EVAKERNELS_CUDA: the build includes the kernels of csrc/cuda. EVAKERNELS_INTERPRETED: a test build, in
// which an interpreter runs the PTX of these kernels on CPU tensors instead of the CPU kernels.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <list>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "bind/array.h"
#include "bind/torch_stream.h"
#include "cpu/isa.h"
#include "include/launcher.h"

namespace evakernels {

#ifdef EVAKERNELS_CUDA
constexpr bool kCudaIsBuilt = true;
#else
constexpr bool kCudaIsBuilt = false;
#endif
#ifdef EVAKERNELS_INTERPRETED
constexpr bool kCudaIsInterpreted = true;
#else
constexpr bool kCudaIsInterpreted = false;
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using OptionalTensor = std::optional<Tensor>;
using Input = const Tensor&;
using OptionalInput = const OptionalTensor&;
using Inputs = const std::vector<Tensor>&;
using NeedsGrad = const std::vector<bool>&;
using OutputDType = std::optional<ScalarType>;

// How evakernels._C runs the thread's next operator.
struct LaunchOptions {
  std::vector<OptionalTensor> out;  // memory of the results; allocated where there is none
  std::optional<cpu::Isa> isa;
};

// Null for calls by torch.
inline thread_local const LaunchOptions* launch_options = nullptr;

inline void raise_if_any(const char* op, cuda::Error error) {
  if (error) throw std::runtime_error(std::string(op) + ": CUDA error: " + error);
}

// Calls a GPU launcher, with or without scratch memory, and raises its error.
template <auto Cuda, class Params>
void call_launcher(const char* op, const Params& params, cuda::Scratch& scratch, cuda::Stream stream) {
  if constexpr (std::is_invocable_v<decltype(Cuda), const Params&, cuda::Stream>) {
    raise_if_any(op, Cuda(params, stream));
  } else {
    raise_if_any(op, Cuda(params, scratch, stream));
  }
}

inline void torch_parallel(int64_t count, int64_t grain, cpu::RangeBody body, void* context) {
  torch::stable::parallel_for(0, count, grain,
                              [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

inline DType dtype_of(ScalarType type, const char* name) {
  switch (type) {
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

inline DType dtype_of(const Tensor& tensor, const char* name) { return dtype_of(tensor.scalar_type(), name); }

inline ScalarType scalar_type_of(DType dtype) {
  switch (dtype) {
    case DType::BFloat16:
      return ScalarType::BFloat16;
    case DType::Float16:
      return ScalarType::Half;
    default:
      return ScalarType::Float;
  }
}

// torch::stable::contiguous looks its operator up by name, which costs more than the rest of a call.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

struct TorchDevice {
  int32_t type, index;

  explicit TorchDevice(const Tensor& tensor) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &index));
  }
};

// Uninitialised, contiguous.
inline Tensor new_tensor(const TorchDevice& device, Sizes sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t axis = sizes.size(); axis-- > 1;) {
    strides[axis - 1] = strides[axis] * std::max<int64_t>(1, sizes[axis]);
  }
  const auto value = torch::stable::detail::from(dtype);
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), torch::stable::detail::to<int32_t>(value),
                                                  device.type, device.index, &handle));
  return Tensor(handle);
}

inline cuda::Stream current_stream(int32_t device) {
  static const StreamFunction torch_stream = find_stream_function();
  cuda::Stream stream = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_stream(device, &stream));
  return stream;
}

// Stream-ordered memory of torch's allocator.
class TensorScratch final : public cuda::Scratch {
 public:
  explicit TensorScratch(const TorchDevice& device) : device_(device) {}

  cuda::Error allocate(float** memory, int64_t floats) override {
    memory_ = new_tensor(device_, {&floats, 1}, ScalarType::Float);
    *memory = static_cast<float*>(memory_->mutable_data_ptr());
    return nullptr;
  }

 private:
  const TorchDevice& device_;
  std::optional<Tensor> memory_;
};

class Call {
 public:
  // The tensor, or a contiguous copy.
  Array read(const Tensor& tensor, const char* name) {
    return read_strided(tensor, name, [](const Tensor& given) { return given.is_contiguous(); });
  }
  Array read_optional(OptionalInput tensor, const char* name) {
    return tensor ? read(*tensor, name) : no_array(name);
  }
  // A tensor that doesn't exist has no elements in the schema.
  Array read_if(bool exists, const Tensor& tensor, const char* name) {
    return exists ? read(tensor, name) : no_array(name);
  }
  // The tensor, or a contiguous copy if the kernels can't read its strides.
  Array read_readable(const Tensor& tensor, const char* name, bool (*is_readable)(Sizes, Sizes)) {
    return read_strided(tensor, name, [&](const Tensor& given) {
      return is_readable(span_of(given.sizes()), span_of(given.strides()));
    });
  }
  Array read_index(OptionalInput index, const char* name, bool accepts_int32 = false) {
    if (!index) return no_array(name);
    const ScalarType type = index->scalar_type();
    require(type == ScalarType::Long || (accepts_int32 && type == ScalarType::Int),
            std::string(name) + " must be int64" + (accepts_int32 ? " or int32" : ""));
    Array array = view(keep(*index, index->is_contiguous()), name, DType::Float32);
    array.is_int32 = type == ScalarType::Int;
    return array;
  }
  // uint8 [height, width, 1 to 4 channels], channels adjacent, 4 bytes a pixel at most; otherwise a copy.
  Array read_pixels(const Tensor& image, const char* name) {
    require(image.scalar_type() == ScalarType::Byte, name, " must be uint8");
    require(image.dim() == 3 && image.size(2) >= 1 && image.size(2) <= 4 && image.numel() > 0, name,
            " must have shape [height, width, 1 to 4 channels]");
    const bool is_readable = image.stride(2) == 1 && image.stride(1) >= image.size(2) && image.stride(1) <= 4;
    return view(keep(image, is_readable), name, DType::Float32);
  }
  // Converted if necessary, without a host sync.
  Array read_float32(const Tensor& tensor, const char* name) {
    if (tensor.scalar_type() == ScalarType::Float) return read(tensor, name);
    return read(copies_.emplace_back(torch::stable::to(tensor, ScalarType::Float)), name);
  }
  Array read_float32_optional(OptionalInput tensor, const char* name) {
    return tensor ? read_float32(*tensor, name) : no_array(name);
  }
  // Updated in place; a contiguous copy is copied back after the launch.
  Array update(const Tensor& tensor, const char* name) {
    const bool is_dense = tensor.is_contiguous();
    const Tensor& dense = keep(tensor, is_dense);
    if (!is_dense) updated_.emplace_back(tensor, dense);
    Array array = array_of(dense, name);
    array.data = dense.mutable_data_ptr();  // a lazy clone gets its own memory
    return array;
  }

  Array output(const char* name, Sizes sizes, DType dtype) {
    return array_of(add_result(name, sizes, scalar_type_of(dtype)), name);
  }
  // dtype: default x's.
  Array output(const char* name, const Array& x, OutputDType dtype) {
    return array_of(add_result(name, x.sizes, dtype.value_or(scalar_type_of(x.dtype))), name);
  }
  float* output_floats(const char* name, int64_t count) {
    return output(name, {&count, 1}, DType::Float32).floats();
  }
  uint8_t* output_bytes(const char* name, Sizes sizes) {
    return static_cast<uint8_t*>(add_result(name, sizes, ScalarType::Byte).mutable_data_ptr());
  }
  // Undefined, None in Python, if `exists` is false.
  Array output_if(bool exists, const char* name, Sizes sizes, DType dtype) {
    if (exists) return output(name, sizes, dtype);
    require(!memory_of_result(), name, " must be None, as it isn't computed");
    results_.at(made_++).emplace();
    return no_array(name);
  }
  // One float per row of `x`.
  Array statistic(bool exists, const char* name, const Array& x) {
    return output_if(exists, name, x.sizes.first(x.sizes.size() - 1), DType::Float32);
  }
  // Like the parameter, if there is one and its gradient is needed.
  Array gradient(bool needed, const char* name, const Array& parameter) {
    return output_if(parameter && needed, name, parameter.sizes, parameter.dtype);
  }
  template <size_t Count>
  auto results() {
    if constexpr (Count == 1) {
      return std::move(*results_[0]);
    } else {
      return [this]<size_t... I>(std::index_sequence<I...>) {
        return std::make_tuple(std::move(*results_[I])...);
      }(std::make_index_sequence<Count>());
    }
  }

  static cpu::Isa isa() {
    return launch_options && launch_options->isa ? *launch_options->isa : cpu::active_isa();
  }

  bool is_on_gpu() const { return kCudaIsInterpreted || (kCudaIsBuilt && first_->is_cuda()); }

  // Launchers are template arguments, so that those of a device without kernels needn't be linked; nullptr
  // for a device without kernels of the op.
  template <auto Cpu, auto Cuda, class Params>
  void launch(const char* op, const Params& params) {
    if constexpr (kCudaIsBuilt && !std::is_null_pointer_v<decltype(Cuda)>) {
      if (is_on_gpu()) launch_on_gpu<Cuda>(op, params);
    }
    if constexpr (!kCudaIsInterpreted && !std::is_null_pointer_v<decltype(Cpu)>) {
      if (!is_on_gpu()) Cpu(params, isa(), torch_parallel);
    }
    for (auto& [tensor, dense] : updated_) torch::stable::copy_(tensor, dense);
  }

 private:
  static Sizes span_of(torch::headeronly::IntHeaderOnlyArrayRef numbers) {
    return {numbers.data(), numbers.size()};
  }

  static Array view(const Tensor& tensor, const char* name, DType dtype) {
    return {.name = name,
            .data = const_cast<void*>(tensor.const_data_ptr()),
            .dtype = dtype,
            .sizes = span_of(tensor.sizes()),
            .strides = span_of(tensor.strides()),
            .exists = true};
  }
  static Array array_of(const Tensor& tensor, const char* name) {
    return view(tensor, name, dtype_of(tensor, name));
  }

  template <class IsReadable>
  Array read_strided(const Tensor& tensor, const char* name, const IsReadable& is_readable) {
    return array_of(keep(tensor, is_readable(tensor)), name);
  }

  // Arrays point into tensors: the caller's outlive the call, copies are kept by it.
  const Tensor& keep(const Tensor& tensor, bool is_readable) {
    if (!first_) first_ = &tensor;
    return is_readable ? tensor : copies_.emplace_back(torch::stable::contiguous(tensor));
  }

  // The memory for the next result, if the caller has some.
  const Tensor* memory_of_result() const {
    if (!launch_options || made_ >= launch_options->out.size()) return nullptr;
    const OptionalTensor& memory = launch_options->out[made_];
    return memory ? &*memory : nullptr;
  }

  const Tensor& add_result(const char* name, Sizes sizes, ScalarType dtype) {
    const Tensor* const memory = memory_of_result();
    if (memory) require_memory(*memory, name, sizes, dtype);
    return results_.at(made_++).emplace(memory ? *memory : new_tensor(device(), sizes, dtype));
  }

  void require_memory(const Tensor& memory, const char* name, Sizes sizes, ScalarType dtype) {
    const TorchDevice place(memory);
    require(memory.scalar_type() == dtype, name, " must be ", toString(dtype), ", got ",
            toString(memory.scalar_type()));
    require(same(span_of(memory.sizes()), sizes), name, " must have shape ", text_of(sizes), ", got ",
            text_of(span_of(memory.sizes())));
    require(memory.is_contiguous(), name, " must be contiguous");
    require(place.type == device().type && place.index == device().index, name,
            " must be on the device of the inputs");
  }

  const TorchDevice& device() {
    require(first_ != nullptr, "the op needs at least one tensor, got none");
    return device_ ? *device_ : device_.emplace(*first_);
  }

  template <auto Cuda, class Params>
  void launch_on_gpu(const char* op, const Params& params) {
    require(!launch_options || !launch_options->isa, "isa must be None for tensors on a GPU");
    TensorScratch scratch(device());
    const int32_t index = kCudaIsInterpreted ? 0 : device().index;
    const torch::stable::accelerator::DeviceGuard guard(index);
    raise_if_any(op, cuda::use_device(index));
    call_launcher<Cuda>(op, params, scratch, current_stream(index));
  }

  const Tensor* first_ = nullptr;
  std::optional<TorchDevice> device_;
  std::list<Tensor> copies_;
  std::array<OptionalTensor, 6> results_;
  size_t made_ = 0;
  std::vector<std::pair<Tensor, Tensor>> updated_;  // a tensor and its contiguous copy
};

// A float32 vector of `count` elements.
inline const float* read_floats(Call& call, Input input, const char* name, int64_t count) {
  const Array array = call.read(input, name);
  require_dtype(array, DType::Float32);
  require_sizes(array, {count});
  return array.floats();
}

}  // namespace evakernels

// Registers a family's ops for every device with kernels.
#define EVAKERNELS_CPU_OPS(family, m) STABLE_TORCH_LIBRARY_IMPL(evakernels_native, CPU, m)
#if defined(EVAKERNELS_CUDA) && !defined(EVAKERNELS_INTERPRETED)
#define EVAKERNELS_OPS(family, m)                                                 \
  static void register_##family(torch::stable::detail::StableLibrary& m);         \
  STABLE_TORCH_LIBRARY_IMPL(evakernels_native, CPU, m) { register_##family(m); }  \
  STABLE_TORCH_LIBRARY_IMPL(evakernels_native, CUDA, m) { register_##family(m); } \
  static void register_##family(torch::stable::detail::StableLibrary& m)
#else
#define EVAKERNELS_OPS(family, m) EVAKERNELS_CPU_OPS(family, m)
#endif
// Registers ops that have kernels for GPUs only in this file.
#if defined(EVAKERNELS_INTERPRETED)
#define EVAKERNELS_GPU_OPS(family, m) EVAKERNELS_CPU_OPS(family, m)
#elif defined(EVAKERNELS_CUDA)
#define EVAKERNELS_GPU_OPS(family, m) STABLE_TORCH_LIBRARY_IMPL(evakernels_native, CUDA, m)
#else
#define EVAKERNELS_GPU_OPS(family, m) \
  [[maybe_unused]] static void register_##family(torch::stable::detail::StableLibrary& m)
#endif
#define EVAKERNELS_OP(m, op) m.impl(#op, TORCH_BOX(&op))
