// Looks up torch's function for the current CUDA stream at run time: it is in libtorch_cuda, which this
// library isn't linked with, so that it also loads with a CPU build of torch.
#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <stdexcept>
#include <string>

// Weak: null if no linked library defines it.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace evakernels {

using StreamFunction = int32_t (*)(int32_t device, void** stream);

// Throws an error that lists the searched libraries.
inline StreamFunction find_stream_function() {
  constexpr const char *kName = "aoti_torch_get_current_cuda_stream", *kLibrary = "libtorch_cuda.so";
  if (aoti_torch_get_current_cuda_stream) return aoti_torch_get_current_cuda_stream;
  if (void* const found = dlsym(RTLD_DEFAULT, kName)) return reinterpret_cast<StreamFunction>(found);
  // Python loads torch's libraries with RTLD_LOCAL, which hides them from the line above.
  void* const library = dlopen(kLibrary, RTLD_LAZY | RTLD_NOLOAD);
  void* const found = library ? dlsym(library, kName) : nullptr;
  if (found) return reinterpret_cast<StreamFunction>(found);
  throw std::runtime_error(
      std::string("torch's current CUDA stream can't be asked for: there is no ") + kName +
      " in the libraries that _ops.so was loaded with, in what the process loaded globally, or in " +
      kLibrary + (library ? ", which is loaded but lacks it" : ", which isn't loaded"));
}

}  // namespace evakernels
