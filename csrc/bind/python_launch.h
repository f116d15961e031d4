// What the Python bindings of all ops share: the way from arrays to the kernels, for the CPU or for the GPU
// that they are on.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "bind/array_view.h"
#include "bind/build.h"
#include "bind/gpu_launch.h"
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
void register_gelu(pybind11::module_& m);
void register_rope_attention(pybind11::module_& m);

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

template <auto Cuda, class Params>
void call_on_gpu(const char* op, const Arrays& arrays, const Params& params) {
  const cuda::DeviceGuard guard(arrays.device().number);
  raise_if_any(op, guard.error());
  const auto stream = reinterpret_cast<cuda::Stream>(arrays.stream());
  StreamScratch scratch(stream);
  call_launcher<Cuda>(op, params, scratch, stream);
}

// The launchers are template arguments: those of a device that this build leaves out needn't be linked.
template <auto Cpu, auto Cuda, class Params>
void launch(const char* op, const Arrays& arrays, const IsaName& isa, const Params& params) {
  const pybind11::gil_scoped_release unlocked;
  const bool on_gpu = kCudaIsInterpreted || arrays.device().is_gpu();
  require(!isa || !on_gpu, "isa is for arrays on the CPU");
  require(arrays.stream() == 0 || on_gpu, "stream is for arrays on a GPU");
  if constexpr (kCudaIsBuilt) {
    if (on_gpu) return call_on_gpu<Cuda>(op, arrays, params);
  }
  if constexpr (!kCudaIsInterpreted) {
    Cpu(params, isa ? cpu::parse_isa(*isa) : cpu::active_isa(), cpu::serial_for);
  }
}

}  // namespace evakernels
