// Stands in for torch's CUDA functions, which a CPU build of torch lacks or refuses: the current stream, and
// the device guard on the devices of the stand-in for the CUDA runtime. Without torch's headers, whose
// declarations export these names.
#include <cstdint>

#define HIDDEN extern "C" __attribute__((visibility("hidden")))
#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED int ptx_device();
EXPORTED void ptx_set_device(int device);

namespace {

void* stream = nullptr;

struct Guard {
  int previous;
};

}  // namespace

EXPORTED void torch_set_stream(void* current) { stream = current; }

HIDDEN int32_t aoti_torch_get_current_cuda_stream(int32_t, void** current) {
  *current = stream;
  return 0;
}

HIDDEN int32_t aoti_torch_create_device_guard(int32_t device, void** guard) {
  *guard = new Guard{ptx_device()};
  ptx_set_device(device);
  return 0;
}

HIDDEN int32_t aoti_torch_delete_device_guard(void* guard) {
  ptx_set_device(static_cast<Guard*>(guard)->previous);
  delete static_cast<Guard*>(guard);
  return 0;
}
