#include "cuda/runtime.h"

#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <tuple>
#include <utility>

namespace evakernels::cuda {
namespace {

// Keys include shapes, of which a long process may see many.
constexpr size_t kMostAnswers = 4096;

// Cache of ask(int*) by key. A failed query returns 0 and is not cached.
template <class Key>
class Answers {
 public:
  template <class Ask>
  int get(const Key& key, const Ask& ask) {
    const std::lock_guard lock(mutex_);
    const auto found = answers_.find(key);
    if (found != answers_.end()) return found->second;
    int answer = 0;
    if (error_of(ask(&answer))) return 0;
    if (answers_.size() >= kMostAnswers) answers_.clear();
    answers_.emplace(key, answer);
    return answer;
  }

 private:
  std::mutex mutex_;
  std::map<Key, int> answers_;
};

int attribute_of(cudaDeviceAttr attribute, int device) {
  static Answers<std::pair<cudaDeviceAttr, int>> answers;
  return answers.get({attribute, device},
                     [&](int* value) { return cudaDeviceGetAttribute(value, attribute, device); });
}

size_t attribute_of_current_device(cudaDeviceAttr attribute) {
  int device = 0;
  return error_of(cudaGetDevice(&device)) ? 0 : static_cast<size_t>(attribute_of(attribute, device));
}

}  // namespace

Error error_of(int code) {
  if (code != cudaSuccess) cudaGetLastError();  // Clears the error for later checks by others.
  return code == cudaSuccess ? nullptr : cudaGetErrorString(static_cast<cudaError_t>(code));
}

Error allow_shared_memory(const void* kernel, size_t bytes) {
  // 48 KB need no attribute, and at most 16 are static.
  if (bytes <= 32 * 1024) return nullptr;
  int device = 0;
  if (const Error error = error_of(cudaGetDevice(&device))) return error;
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;
  // The attribute may shrink as well: only larger values are set, under a lock.
  const std::lock_guard lock(mutex);
  size_t& most = allowed[{kernel, device}];
  if (bytes <= most) return nullptr;
  const Error error = error_of(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  if (!error) most = bytes;
  return error;
}

int resident_blocks(const void* kernel, int threads, size_t shared_bytes) {
  int device = 0;
  if (error_of(cudaGetDevice(&device)) || allow_shared_memory(kernel, shared_bytes)) return 0;
  static Answers<std::tuple<const void*, int, int, size_t>> answers;
  const int blocks = answers.get({kernel, device, threads, shared_bytes}, [&](int* value) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(value, kernel, threads, shared_bytes);
  });
  return blocks * attribute_of(cudaDevAttrMultiProcessorCount, device);
}

size_t max_shared_memory() { return attribute_of_current_device(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

int multiprocessors() {
  return static_cast<int>(attribute_of_current_device(cudaDevAttrMultiProcessorCount));
}

Error use_device(int device) { return error_of(cudaSetDevice(device)); }

}  // namespace evakernels::cuda
