// Shared by the launchers of all ops: dtypes, threads and instruction sets of a CPU, streams and memory of a
// GPU.
#pragma once

#include <cstdint>

// Kernels are compiled once per instruction set, in a namespace of its name. FOR_EACH_ISA declares something
// in each of them, OF_ISA selects one. Amx uses avx512_bf16's: only bfloat16 attention is compiled for AMX.
#ifdef EVAKERNELS_X86
#define EVAKERNELS_FOR_EACH_ISA(declaration) \
  namespace baseline {                       \
  declaration                                \
  }                                          \
  namespace avx2 {                           \
  declaration                                \
  }                                          \
  namespace avx512 {                         \
  declaration                                \
  }                                          \
  namespace avx512_bf16 {                    \
  declaration                                \
  }
#define EVAKERNELS_OF_ISA(isa, name)            \
  ((isa) >= Isa::Avx512Bf16 ? avx512_bf16::name \
   : (isa) == Isa::Avx512   ? avx512::name      \
   : (isa) == Isa::Avx2     ? avx2::name        \
                            : baseline::name)
#else
#define EVAKERNELS_FOR_EACH_ISA(declaration) \
  namespace baseline {                       \
  declaration                                \
  }
#define EVAKERNELS_OF_ISA(isa, name) (static_cast<void>(isa), baseline::name)
#endif

namespace evakernels {

enum class DType : int32_t { Float32, BFloat16, Float16 };

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

namespace cpu {

enum class Isa;  // cpu/isa.h

using RangeBody = void (*)(int64_t begin, int64_t end, void* context);

// Calls body on disjoint ranges that cover [0, count), none (but the last) shorter than grain.
using ParallelFor = void (*)(int64_t count, int64_t grain, RangeBody body, void* context);

inline void serial_for(int64_t count, int64_t, RangeBody body, void* context) {
  if (count > 0) body(0, count, context);
}

// Runs a callable body(begin, end) through a ParallelFor.
template <class Body>
void run_parallel(ParallelFor parallel_for, int64_t count, int64_t grain, Body&& body) {
  const auto call = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<Body*>(context))(begin, end);
  };
  parallel_for(count, grain, call, &body);
}

}  // namespace cpu

// A GPU launcher enqueues its kernels and returns without waiting. Results depend on the shape and the GPU
// alone.
namespace cuda {

using Stream = void*;  // a cudaStream_t

// Error message; null on success.
using Error = const char*;

// Allocator of a launcher's temporary memory. The owner frees it in stream order after the call.
class Scratch {
 public:
  // Uninitialised memory, aligned for any type. A launcher allocates at most once.
  virtual Error allocate(float** memory, int64_t floats) = 0;

 protected:
  ~Scratch() = default;
};

// Sets the current device of the CUDA runtime that is linked into this library; torch has another runtime.
Error use_device(int device);

}  // namespace cuda

}  // namespace evakernels
