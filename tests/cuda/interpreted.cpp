// Lets evakernels/_native.py know what it has loaded.
#include <torch/csrc/stable/library.h>

namespace {
void nothing() {}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(evakernels_native, CPU, m) { m.impl("interpreted", TORCH_BOX(&nothing)); }
