// What device code includes: launches, and accesses to memory in the widths and ways that they are meant.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/dtype.h"
#include "cuda/runtime.h"

// Of <cassert>, which declares it only where asserts are compiled in.
extern "C" __host__ __device__ void __assert_fail(const char* assertion, const char* file, unsigned line,
                                                  const char* function) noexcept __attribute__((noreturn));

namespace evakernels::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kWholeWarp = ~0u;

template <class Integer>
__host__ __device__ constexpr Integer ceil_div(Integer a, std::type_identity_t<Integer> b) {
  return (a + b - 1) / b;
}

// The least that is not below `n`.
__host__ __device__ constexpr int power_of_two(int n) { return n <= 1 ? 1 : 2 * power_of_two((n + 1) / 2); }

template <class... Parameters>
const void* address_of(void (*kernel)(Parameters...)) {
  return reinterpret_cast<const void*>(kernel);
}

template <class... Parameters>
int resident_blocks(void (*kernel)(Parameters...), int threads, size_t shared_bytes = 0) {
  return resident_blocks(address_of(kernel), threads, shared_bytes);
}

// shared_bytes: of the memory that dynamic_shared_memory gives.
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

// A kernel and how to launch it: worked out once, and read by whoever sizes the scratch and by the launch.
template <class... Parameters>
struct LaunchPlan {
  void (*kernel)(Parameters...);
  dim3 grid;
  dim3 block;
  size_t shared_bytes;  // of dynamic shared memory

  int resident_blocks() const {
    return cuda::resident_blocks(address_of(kernel), static_cast<int>(block.x * block.y), shared_bytes);
  }

  // Nothing if the grid has no blocks.
  Error launch(Stream stream, const std::type_identity_t<Parameters>&... arguments) const {
    if (grid.x == 0) return nullptr;
    return launch_with_memory(kernel, grid, block, shared_bytes, stream, arguments...);
  }
};

// The block's one T in shared memory. Give each use a type of its own.
template <class T>
__device__ __forceinline__ T& shared_memory() {
  __shared__ T memory;
  return memory;
}

// The shared memory that the launch asked for, at a multiple of 16 bytes.
template <class T>
__device__ __forceinline__ T* dynamic_shared_memory() {
  extern __shared__ uint4 dynamic_memory[];
  return reinterpret_cast<T*>(dynamic_memory);
}

template <class Word>
__device__ __forceinline__ Word load(const Word* from) {
  return *from;
}

// Of what no later kernel reads from the cache, so that it stays free for what others do.
template <class Word>
__device__ __forceinline__ Word load_once(const Word* from) {
  return __ldcs(from);
}

template <class Word>
__device__ __forceinline__ void store(Word* to, Word word) {
  *to = word;
}

// To global memory, in one instruction; in some kernels the compiler splits what `store` does.
template <class Word>
__device__ __forceinline__ void store_whole(Word* to, Word word) {
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

// 16 or 4 bytes from global memory, or zeros, to shared memory, past the registers. They are there for the
// thread that copied them once it has waited.
template <int BYTES = 16>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool exists = true) {
  static_assert(BYTES == 16 || BYTES == 4);
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(exists ? 16 : 0)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(exists ? 4 : 0)
                 : "memory");
  }
}

__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Ends the launch with an error: for arguments that only the kernel sees. The driver prints op and what is
// wrong, as of an assertion. Never inlined: so it takes no registers from those who don't call it.
inline __device__ __noinline__ __attribute__((noreturn)) void refuse(const char* op, const char* what) {
  __assert_fail(what, "", 0, op);
}

// The same without words, for attention, whose kernels would take 2 to 68 registers more for the call
// (nvcc 13.0).
__device__ __forceinline__ void refuse_silently(const char*, const char*) { __trap(); }

// Tells the compiler what it doesn't know of a pointer that was itself read from memory. To store through the
// result won't do: it makes nvcc 13 cut a word into pieces; `store_whole` doesn't need it.
template <class T>
__device__ __forceinline__ T* in_global_memory(T* pointer) {
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}

// To 2 units in the last place, in one instruction; 0 where the result would be subnormal.
__device__ __forceinline__ float exp2_approximated(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Lets the compiler not know where the value comes from, so that it can't move what depends on it.
__device__ __forceinline__ void hide_origin(unsigned& value) { asm volatile("" : "+r"(value)); }

__device__ __forceinline__ float to_float(BFloat16 value) {
  return __uint_as_float(uint32_t{value.bits} << 16);
}
__device__ __forceinline__ float to_float(Float16 value) {
  return __half2float(__ushort_as_half(value.bits));
}

// To the nearest, ties to even; one instruction for both.
__device__ __forceinline__ uint32_t round_pair(float low, float high, BFloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}
__device__ __forceinline__ uint32_t round_pair(float low, float high, Float16) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

}  // namespace evakernels::cuda
