// Kernel launches, and loads and stores of a given width and cache policy.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/runtime.h"
#include "include/launcher.h"

// <cassert> declares it only where asserts are compiled in.
extern "C" __host__ __device__ void __assert_fail(const char* assertion, const char* file, unsigned line,
                                                  const char* function) noexcept __attribute__((noreturn));

namespace evakernels::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = ~0u;

template <class Integer>
__host__ __device__ constexpr Integer ceil_div(Integer a, std::type_identity_t<Integer> b) {
  return (a + b - 1) / b;
}

// The smallest power of two that is at least `n`.
__host__ __device__ constexpr int power_of_two(int n) { return n <= 1 ? 1 : 2 * power_of_two((n + 1) / 2); }

template <class... Parameters>
const void* address_of(void (*kernel)(Parameters...)) {
  return reinterpret_cast<const void*>(kernel);
}

template <class... Parameters>
int resident_blocks(void (*kernel)(Parameters...), int threads, size_t shared_bytes = 0) {
  return resident_blocks(address_of(kernel), threads, shared_bytes);
}

// shared_bytes: size of dynamic_shared_memory().
template <class... Parameters>
Error launch_with_memory(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                         [[maybe_unused]] Stream stream,
                         const std::type_identity_t<Parameters>&... arguments) {
  if (const Error error = allow_shared_memory(address_of(kernel), shared_bytes)) return error;
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  return error_of(cudaLaunchKernel(address_of(kernel), grid, block, pointers, shared_bytes,
                                   static_cast<cudaStream_t>(stream)));
}

template <class... Parameters>
Error launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, Stream stream,
             const std::type_identity_t<Parameters>&... arguments) {
  return launch_with_memory(kernel, grid, block, 0, stream, arguments...);
}

// A kernel with its launch configuration; the grid also determines the scratch size.
template <class... Parameters>
struct LaunchPlan {
  void (*kernel)(Parameters...);
  dim3 grid;
  dim3 block;
  size_t shared_bytes;  // dynamic
  Error error = nullptr;

  // At least 1. If no block fits or the query fails, launch() returns an error.
  int resident_blocks() {
    const int blocks =
        cuda::resident_blocks(address_of(kernel), static_cast<int>(block.x * block.y), shared_bytes);
    if (blocks == 0) error = "no block of the kernel fits the GPU, or its occupancy can't be queried";
    return blocks == 0 ? 1 : blocks;
  }

  // No-op for an empty grid.
  Error launch(Stream stream, const std::type_identity_t<Parameters>&... arguments) const {
    if (error || grid.x == 0) return error;
    return launch_with_memory(kernel, grid, block, shared_bytes, stream, arguments...);
  }
};

// The block's T in static shared memory. Each use needs its own type.
template <class T>
__device__ __forceinline__ T& shared_memory() {
  __shared__ T memory;
  return memory;
}

// The launch's dynamic shared memory, aligned to 16 bytes.
template <class T>
__device__ __forceinline__ T* dynamic_shared_memory() {
  extern __shared__ uint4 dynamic_memory[];
  return reinterpret_cast<T*>(dynamic_memory);
}

template <class Word>
__device__ __forceinline__ Word load(const Word* from) {
  return *from;
}

// Evict-first, for data that no later kernel reads from the cache.
template <class Word>
__device__ __forceinline__ Word load_once(const Word* from) {
  return __ldcs(from);
}

template <class Word>
__device__ __forceinline__ void store(Word* to, Word word) {
  *to = word;
}

// Stores to global memory in one instruction; the compiler may split `store`.
template <class Word>
__device__ __forceinline__ void store_vector(Word* to, Word word) {
  if constexpr (sizeof(Word) == sizeof(uint4)) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(word.x), "r"(word.y), "r"(word.z),
                 "r"(word.w)
                 : "memory");
  } else if constexpr (sizeof(Word) == sizeof(uint2)) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(word.x), "r"(word.y) : "memory");
  } else {
    *to = word;
  }
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// cp.async of 16 bytes from global to shared memory; zeros if `exists` is false. Visible to this thread after
// wait_for_copies.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool exists = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(exists ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Fails the launch for arguments that only the kernel sees; the driver prints op and message like an
// assertion. Not inlined, so that it costs callers no registers.
inline __device__ __noinline__ __attribute__((noreturn)) void fail_launch(const char* op, const char* what) {
  __assert_fail(what, "", 0, op);
}

// 2^x to 2 ulp in one instruction; subnormal results are 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Keeps the compiler from hoisting what depends on the value.
__device__ __forceinline__ void optimization_barrier(unsigned& value) { asm volatile("" : "+r"(value)); }

__device__ __forceinline__ float to_float(BFloat16 value) {
  return __uint_as_float(uint32_t{value.bits} << 16);
}
__device__ __forceinline__ float to_float(Float16 value) {
  return __half2float(__ushort_as_half(value.bits));
}

// Rounds two values to nearest even in one instruction.
__device__ __forceinline__ uint32_t pack_pair(float low, float high, BFloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}
__device__ __forceinline__ uint32_t pack_pair(float low, float high, Float16) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

}  // namespace evakernels::cuda
