// Torch's current CUDA stream, of a function that only libtorch_cuda has. This library isn't linked with
// that, so that it also loads beside a torch without CUDA, and looks for the function when it needs it.
#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <stdexcept>
#include <string>

// Weak: null where none of the libraries that this one was loaded with has it.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace evakernels {

using StreamFunction = int32_t (*)(int32_t device, void** stream);

// Throws an error that says where it was looked for.
inline StreamFunction find_stream_function() {
  constexpr const char *kName = "aoti_torch_get_current_cuda_stream", *kLibrary = "libtorch_cuda.so";
  if (aoti_torch_get_current_cuda_stream) return aoti_torch_get_current_cuda_stream;
  if (void* const found = dlsym(RTLD_DEFAULT, kName)) return reinterpret_cast<StreamFunction>(found);
  // Python loads torch's libraries for themselves, which hides them from the line above.
  void* const library = dlopen(kLibrary, RTLD_LAZY | RTLD_NOLOAD);
  void* const found = library ? dlsym(library, kName) : nullptr;
  if (found) return reinterpret_cast<StreamFunction>(found);
  throw std::runtime_error(
      std::string("torch's current CUDA stream can't be asked for: there is no ") + kName +
      " in the libraries that _ops.so was loaded with, in what the process loaded globally, or in " +
      kLibrary + (library ? ", which is loaded but lacks it" : ", which isn't loaded"));
}

}  // namespace evakernels
