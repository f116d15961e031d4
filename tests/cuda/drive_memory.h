// Memory that kernels and the host reach, for the program that drives launchers: the managed memory of a GPU
// (gpu_memory.cpp), or the CPU's, where kernels are interpreted (cpu_memory.cpp).
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "include/launcher.h"

namespace evakernels::drive {

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

template <class T>
using Vector = std::vector<T, Allocator<T>>;

template <class T>
void settle(Vector<T>& values) {
  settle(values.data(), values.size() * sizeof(T));
}

}  // namespace evakernels::drive
