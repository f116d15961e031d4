// What the Python bindings of all ops share: the way from arrays to the kernels, for the CPU or for the GPU
// that they are on.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "bind/array_view.h"
#include "bind/build.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cuda/memory.h"

namespace evakernels {

using IsaName = std::optional<std::string>;

// Each adds the launchers of an op to the module.
void register_layer_norm(pybind11::module_& m);
void register_residual_norm(pybind11::module_& m);
void register_swiglu(pybind11::module_& m);
void register_token_dropout(pybind11::module_& m);
void register_lamb(pybind11::module_& m);
void register_adamw(pybind11::module_& m);
void register_gelu(pybind11::module_& m);
void register_rope_attention(pybind11::module_& m);

// What a launcher keeps in between, given back in the stream's order.
class Workspace {
 public:
  Workspace(int64_t floats, cuda::Stream stream) : stream_(stream) {
    if (floats > 0) error_ = cuda::allocate(&memory_, static_cast<size_t>(floats) * sizeof(float), stream);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() {
    if (memory_) cuda::release(memory_, stream_);
  }

  cuda::Error error() const { return error_; }
  float* data() const { return static_cast<float*>(memory_); }

 private:
  cuda::Stream stream_;
  void* memory_ = nullptr;
  cuda::Error error_ = nullptr;
};

template <auto Cuda, auto... WorkspaceOf, class Params>
cuda::Error launch_on_gpu(const Params& params, int device, cuda::Stream stream) {
  const cuda::DeviceGuard guard(device);
  if (guard.error()) return guard.error();
  if constexpr (sizeof...(WorkspaceOf) == 0) {
    return Cuda(params, stream);
  } else {
    const Workspace workspace((WorkspaceOf(params) + ...), stream);
    return workspace.error() ? workspace.error() : Cuda(params, workspace.data(), stream);
  }
}

template <auto Cuda, auto... WorkspaceOf, class Params>
void run_on_gpu(const char* op, const Arrays& arrays, const Params& params) {
  const auto stream = reinterpret_cast<cuda::Stream>(arrays.stream());
  const cuda::Error error = launch_on_gpu<Cuda, WorkspaceOf...>(params, arrays.device().number, stream);
  if (error) throw std::runtime_error(std::string(op) + ": CUDA error: " + error);
}

// For ops without CPU kernels.
template <auto Cuda, auto... WorkspaceOf, class Params>
void launch_only_on_gpu(const char* op, const Arrays& arrays, const Params& params) {
  const pybind11::gil_scoped_release unlocked;
  const bool on_gpu = kCudaIsInterpreted || arrays.device().is_gpu();
  require(on_gpu, std::string(op) + " has kernels for GPUs only; the arrays are on a CPU");
  if constexpr (kCudaIsBuilt) run_on_gpu<Cuda, WorkspaceOf...>(op, arrays, params);
}

// The launchers are template arguments: those of a device that this build leaves out needn't be linked. Of
// those for GPUs whose kernels keep floats in between, WorkspaceOf says how many.
template <auto Cpu, auto Cuda, auto... WorkspaceOf, class Params>
void launch(const char* op, const Arrays& arrays, const IsaName& isa, const Params& params) {
  const pybind11::gil_scoped_release unlocked;
  const bool on_gpu = kCudaIsInterpreted || arrays.device().is_gpu();
  require(!isa || !on_gpu, "isa is for arrays on the CPU");
  require(arrays.stream() == 0 || on_gpu, "stream is for arrays on a GPU");
  if constexpr (kCudaIsBuilt) {
    if (on_gpu) return run_on_gpu<Cuda, WorkspaceOf...>(op, arrays, params);
  }
  if constexpr (!kCudaIsInterpreted) {
    Cpu(params, isa ? cpu::parse_isa(*isa) : cpu::active_isa(), cpu::serial_for);
  }
}

}  // namespace evakernels
