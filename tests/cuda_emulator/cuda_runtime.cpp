#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "cuda_emulator.h"

namespace {

constexpr int kDevices = 2;
constexpr size_t kWithoutLeave = 48 * 1024;  // of shared memory

char contexts[kDevices];  // of which the addresses stand for contexts
thread_local void* current_context = nullptr;
std::atomic<int> last_device = -1;  // that was set
std::atomic<int> queries = 0;

std::mutex guards_shared_memory;
std::map<const void*, size_t> shared_memory_of;

int get_context(void** context) {
  *context = current_context;
  return 0;
}

int set_context(void* context) {
  current_context = context;
  return 0;
}

}  // namespace

namespace cuda_emulator {

size_t max_shared_memory() {
  const char* const text = std::getenv("EVAKERNELS_EMULATOR_SHARED_KB");
  return (text ? std::strtoull(text, nullptr, 10) : kSharedMemoryKb) * 1024;
}

size_t allowed_shared_memory(const void* kernel) {
  const std::lock_guard lock(guards_shared_memory);
  const auto found = shared_memory_of.find(kernel);
  return found == shared_memory_of.end() ? kWithoutLeave : found->second;
}

}  // namespace cuda_emulator

cudaError_t cudaGetDevice(int* device) {
  *device = current_context ? static_cast<int>(static_cast<char*>(current_context) - contexts) : 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return cudaErrorInvalidValue;
  current_context = &contexts[device];
  last_device = device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  ++queries;
  const size_t values[] = {cuda_emulator::kMultiprocessors, cuda_emulator::max_shared_memory(),
                           cuda_emulator::kCacheBytes};
  *value = static_cast<int>(values[attribute]);
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  ++queries;
  if (static_cast<size_t>(value) > cuda_emulator::max_shared_memory()) return cudaErrorInvalidValue;
  const std::lock_guard lock(guards_shared_memory);
  shared_memory_of[kernel] = static_cast<size_t>(value);
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  ++queries;
  *blocks = cuda_emulator::kBlocksPerMultiprocessor;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  ++queries;
  const char* const text = std::getenv("EVAKERNELS_EMULATOR_DRIVER");
  *version = text ? std::atoi(text) : CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned,
                                             unsigned long long, cudaDriverEntryPointQueryResult* found) {
  *found = cudaDriverEntryPointSuccess;
  *function = std::strcmp(symbol, "cuCtxGetCurrent") == 0 ? reinterpret_cast<void*>(&get_context)
                                                          : reinterpret_cast<void*>(&set_context);
  return cudaSuccess;
}

cudaError_t cudaMallocAsync(void** memory, size_t bytes, cudaStream_t) {
  constexpr size_t kAlignment = 256;  // as on a GPU
  *memory = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  return *memory ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaFreeAsync(void* memory, cudaStream_t) {
  std::free(memory);
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t code) {
  return code == cudaErrorMemoryAllocation ? "out of memory" : "invalid argument";
}

// What tests ask: how often the runtime was asked for what doesn't change; the calling thread's current
// device, -1 if it has none; and the one that was set last.
extern "C" {
__attribute__((visibility("default"))) int emulated_queries() { return queries; }

__attribute__((visibility("default"))) int emulated_device() {
  int device = -1;
  if (current_context) cudaGetDevice(&device);
  return device;
}

__attribute__((visibility("default"))) int emulated_last_device() { return last_device; }

__attribute__((visibility("default"))) void emulated_set_device(int device) { cudaSetDevice(device); }
}
