// Stands in for the CUDA runtime under code that nvcc compiled, where there is no GPU. It is linked in its
// place, and serves what host code of kernels without __managed__ or __constant__ variables asks for.
// Launches go to the function that `ptx_serve` was given, with the fat binary in which the kernel's PTX is.
//
// It plays two equal GPUs, which `ptx_play` describes. By default they are so small that kernels loop: three
// multiprocessors with a block each and 1 MB of L2 cache. A block may have 99 KB of shared memory as on
// compute capability 8.6, or PTX_SHARED_KB. As in the CUDA runtime a kernel may have 48 KB until the host
// raises the limit.
#include <cuda_runtime_api.h>
#include <fatbinary_section.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {

constexpr size_t kWithoutLeave = 48 * 1024;  // of shared memory

// Arguments are pointers to the kernel's. Static and dynamic shared memory (`shared_bytes`) may have `limit`
// bytes. The message is of up to `size` bytes, for a code that isn't cudaSuccess.
using Serve = int (*)(const void* binary, const char* kernel, const unsigned* grid, const unsigned* block,
                      void** arguments, size_t shared_bytes, size_t limit, char* message, size_t size);

// Resident blocks of a multiprocessor.
using Occupancy = int (*)(const void* binary, const char* kernel, int threads, size_t shared_bytes);

size_t number_in(const char* variable, size_t otherwise) {
  const char* const text = std::getenv(variable);
  return text ? std::strtoull(text, nullptr, 10) : otherwise;
}

// The GPU that is played.
struct Gpu {
  int multiprocessors = 3;
  size_t shared_bytes = number_in("PTX_SHARED_KB", 99) * 1024;  // per block at most
  int l2_bytes = 1 << 20;
  Occupancy occupancy = nullptr;
};

struct Kernel {
  const void* binary = nullptr;
  const char* name = nullptr;
  size_t shared_bytes = kWithoutLeave;
};

Gpu gpu;
Serve serve = nullptr;
int queries = 0;
char message[1 << 14];
char contexts[2];         // of which the addresses stand for these GPUs
char* context = nullptr;  // the current one; as in a process that has used no GPU yet there is none
int last_device = -1;     // of the last launch
cudaStream_t last_stream = nullptr;

std::mutex guards_kernels;

// By the address of the function that stands for it on the host. Binaries register theirs before main.
std::map<const void*, Kernel>& kernels() {
  static std::map<const void*, Kernel> all;
  return all;
}

bool is_launchable(dim3 grid, dim3 block) {
  const auto within = [](dim3 size, unsigned x, unsigned y, unsigned z) {
    return size.x - 1 < x && size.y - 1 < y && size.z - 1 < z;
  };
  return within(grid, 0x7FFFFFFF, 0xFFFF, 0xFFFF) && within(block, 1024, 1024, 64) &&
         size_t{block.x} * block.y * block.z <= 1024;
}

}  // namespace

EXPORTED void ptx_serve(Serve function) { serve = function; }

// Before the first launch: programs keep what the runtime answered.
EXPORTED void ptx_play(int multiprocessors, size_t shared_bytes, int l2_bytes, Occupancy occupancy) {
  gpu = {multiprocessors, shared_bytes, l2_bytes, occupancy};
}

// How often the runtime was asked for what doesn't change.
EXPORTED int ptx_queries() { return queries; }

// The current device, or -1, and the one of the last launch.
EXPORTED int ptx_device() { return context ? static_cast<int>(context - contexts) : -1; }
EXPORTED int ptx_last_device() { return last_device; }
EXPORTED void* ptx_last_stream() { return last_stream; }
EXPORTED void ptx_set_device(int device) { context = device < 0 ? nullptr : contexts + device; }

// --- what nvcc's own code calls ----------------------------------------------------------------------------

extern "C" {
void** __cudaRegisterFatBinary(void* wrapper) {
  return static_cast<void**>(
      const_cast<void*>(static_cast<const void*>(static_cast<const __fatBinC_Wrapper_t*>(wrapper)->data)));
}

void __cudaRegisterFatBinaryEnd(void**) {}

void __cudaUnregisterFatBinary(void**) {}

char __cudaInitModule(void**) { return 0; }

// Of a kernel that several files have the first is taken, as of its function on the host.
void __cudaRegisterFunction(void** binary, const char* function, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  const std::lock_guard lock(guards_kernels);
  kernels().try_emplace(function, Kernel{binary, name});
}

unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, cudaStream_t) { std::abort(); }

cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { std::abort(); }

cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { std::abort(); }

cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { std::abort(); }
}

// --- what launchers call -----------------------------------------------------------------------------------

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                             size_t shared_bytes, cudaStream_t stream) {
  Kernel kernel;
  {
    const std::lock_guard lock(guards_kernels);
    const auto found = kernels().find(function);
    if (found == kernels().end()) return cudaErrorInvalidDeviceFunction;
    kernel = found->second;
  }
  if (!is_launchable(grid, block)) return cudaErrorInvalidConfiguration;
  if (shared_bytes > kernel.shared_bytes) return cudaErrorInvalidValue;
  if (!serve) return cudaErrorNoDevice;
  cudaGetDevice(&last_device);
  last_stream = stream;
  const unsigned blocks[] = {grid.x, grid.y, grid.z}, threads[] = {block.x, block.y, block.z};
  const size_t limit = kernel.shared_bytes > kWithoutLeave ? gpu.shared_bytes : kWithoutLeave;
  return static_cast<cudaError_t>(serve(kernel.binary, kernel.name, blocks, threads, arguments, shared_bytes,
                                        limit, message, sizeof message));
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  ++queries;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaErrorNotSupported;
  if (static_cast<size_t>(value) > gpu.shared_bytes) return cudaErrorInvalidValue;
  const std::lock_guard lock(guards_kernels);
  kernels()[function].shared_bytes = static_cast<size_t>(value);
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int threads,
                                                          size_t shared_bytes) {
  ++queries;
  *blocks = 1;
  if (!gpu.occupancy) return cudaSuccess;
  const std::lock_guard lock(guards_kernels);
  const auto found = kernels().find(function);
  if (found == kernels().end()) return cudaErrorInvalidDeviceFunction;
  *blocks = gpu.occupancy(found->second.binary, found->second.name, threads, shared_bytes);
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* function,
                                                                   int threads, size_t shared_bytes,
                                                                   unsigned) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, threads, shared_bytes);
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  ++queries;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = gpu.multiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(gpu.shared_bytes);
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = gpu.l2_bytes;
      return cudaSuccess;
    default:
      return cudaErrorNotSupported;
  }
}

cudaError_t cudaGetDevice(int* device) {
  *device = context ? ptx_device() : 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device > 1) return cudaErrorInvalidDevice;
  ptx_set_device(device);
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t code) {
  switch (code) {
    case cudaErrorLaunchFailure:
      return message;
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorInvalidDeviceFunction:
      return "invalid device function";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorNoDevice:
      return "nothing serves launches: ptx_serve wasn't called";
    case cudaErrorNotSupported:
      return "the stand-in for the CUDA runtime doesn't know of this";
    default:
      return "invalid argument";
  }
}
