// To be preloaded: keeps where aligned memory was allocated, to the byte, so that accesses past the end of a
// tensor are seen. torch's memory on a CPU is all of it; what Python itself allocates is not. New memory is
// filled with kUnwritten, so that what nobody has written shows. With ALLOCATIONS_STAY in the environment
// nothing else comes to lie where it was.
#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <mutex>

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {

constexpr size_t kAlignment = 64;        // of torch
constexpr uint16_t kUnwritten = 0x7FFE;  // NaN in every float format; no index, and not the -1 of "no index"

std::mutex guards_sizes;

// By address. Never destroyed: memory is freed until the very end.
std::map<uintptr_t, size_t>& sizes() {
  static auto* const all = new std::map<uintptr_t, size_t>;
  return *all;
}

void keep(void* memory, size_t bytes) {
  std::fill_n(static_cast<uint16_t*>(memory), bytes / 2, kUnwritten);
  if (bytes % 2) static_cast<uint8_t*>(memory)[bytes - 1] = kUnwritten & 0xFF;
  const std::lock_guard lock(guards_sizes);
  sizes()[reinterpret_cast<uintptr_t>(memory)] = bytes;
}

// No static of a function: to find it may free something, which would ask for it again.
int (*next_posix_memalign)(void**, size_t, size_t) = nullptr;
void (*next_free)(void*) = nullptr;

template <class Function>
Function& found(Function& function, const char* name) {
  if (!function) function = reinterpret_cast<Function>(dlsym(RTLD_NEXT, name));
  return function;
}

}  // namespace

EXPORTED int posix_memalign(void** memory, size_t alignment, size_t bytes) noexcept {
  const int code = found(next_posix_memalign, "posix_memalign")(memory, alignment, bytes);
  if (code == 0 && alignment >= kAlignment) keep(*memory, bytes);
  return code;
}

EXPORTED void free(void* memory) noexcept {
  if (memory && reinterpret_cast<uintptr_t>(memory) % kAlignment == 0) {
    std::unique_lock lock(guards_sizes);
    const auto forgotten = sizes().extract(reinterpret_cast<uintptr_t>(memory));
    lock.unlock();  // as the node is freed here
    if (!forgotten.empty() && std::getenv("ALLOCATIONS_STAY")) return;
  }
  found(next_free, "free")(memory);
}

// Writes where at most `most` allocations begin and end, in the order of their addresses; returns how many.
EXPORTED int allocations(int64_t* begins, int64_t* ends, int most) {
  const std::lock_guard lock(guards_sizes);
  int count = 0;
  for (const auto& [address, bytes] : sizes()) {
    if (count == most) break;
    begins[count] = static_cast<int64_t>(address);
    ends[count++] = static_cast<int64_t>(address + bytes);
  }
  return count;
}
