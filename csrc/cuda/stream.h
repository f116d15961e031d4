// The stream and scratch memory of a GPU launcher, and the error that it returns.
//
// A launcher puts its kernels on the stream and returns without waiting for them. What its kernels keep in
// between lies in scratch memory. Results depend on the shape and the GPU alone.
#pragma once

#include <cstdint>

#include "common/api.h"

namespace evakernels::cuda {

using Stream = void*;  // a cudaStream_t

// What went wrong; null: nothing.
using Error = const char*;

// Where a launcher gets the memory that its kernels keep partial sums and tables in. It is for what that call
// puts on the stream, and is given back in the stream's order by whoever owns this.
class Scratch {
 public:
  // Uninitialised, aligned for any type; of no floats anything. A launcher asks once at most.
  virtual Error allocate(float** memory, int64_t floats) = 0;

 protected:
  ~Scratch() = default;
};

// Makes it the current one of the CUDA runtime that is linked into this library. torch has a runtime of its
// own, whose current device it sets itself.
EVAKERNELS_API Error use_device(int device);

// The same while the guard lives. Then the calling thread's context is again what it was, none too: to set
// the former device by its number would begin a context on one that the process may not use.
class EVAKERNELS_API DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard();

  Error error() const { return error_; }

 private:
  void* context_ = nullptr;
  bool restores_ = false;
  Error error_ = nullptr;
};

}  // namespace evakernels::cuda
