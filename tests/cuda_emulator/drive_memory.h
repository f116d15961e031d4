// Memory that kernels and the host reach, for the programs that drive launchers: emulated, the CPU's; with
// EVAKERNELS_DRIVE_GPU the managed memory of a GPU (gpu_memory.cpp).
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "cuda/stream.h"

namespace evakernels::drive {

#ifdef EVAKERNELS_DRIVE_GPU

void* allocate(size_t bytes);
void release(void* memory);

// What the host has written there counts as written to whoever watches the GPU only.
void settle(void* memory, size_t bytes);

// Waits for what was launched; null, or what went wrong.
cuda::Error finish();

template <class T>
struct Allocator {
  using value_type = T;
  Allocator() = default;
  template <class U>
  Allocator(const Allocator<U>&) {}
  T* allocate(size_t count) { return static_cast<T*>(drive::allocate(count * sizeof(T))); }
  void deallocate(T* memory, size_t) { release(memory); }
  bool operator==(const Allocator&) const = default;
};

#else

inline void settle(void*, size_t) {}
inline cuda::Error finish() { return nullptr; }
template <class T>
using Allocator = std::allocator<T>;

#endif

template <class T>
using Vector = std::vector<T, Allocator<T>>;

template <class T>
void settle(Vector<T>& values) {
  settle(values.data(), values.size() * sizeof(T));
}

}  // namespace evakernels::drive
