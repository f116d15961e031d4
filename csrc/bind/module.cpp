// evakernels._C: build information, and the launchers on raw buffers.
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#include "bind/binding.h"

namespace evakernels {
namespace {

std::vector<std::string> names(const std::vector<cpu::Isa>& isas) {
  std::vector<std::string> result;
  for (cpu::Isa isa : isas) result.emplace_back(cpu::name(isa));
  return result;
}

std::vector<std::string> words(const char* text) {
  std::istringstream stream(text);
  return {std::istream_iterator<std::string>(stream), {}};
}

py::dict build_info() {
  return py::dict("version"_a = EVAKERNELS_VERSION, "compiler"_a = EVAKERNELS_COMPILER,
                  "isas_built"_a = names(cpu::built_isas()),
                  "isas_available"_a = names(cpu::available_isas()),
                  "cuda_archs"_a = words(EVAKERNELS_CUDA_ARCHS));
}

constexpr const char* kDoc = R"(What was built, what this machine can run, and the launchers on raw buffers.

The launchers write into arrays that the caller allocated: a way to profile a kernel without torch's dispatcher,
and to use it on arrays that are not torch's. An array is anything with the buffer protocol or DLPack; dense unless said
otherwise; float32, float16, or bfloat16 (through DLPack only). All arrays of a call are on one device.

On the CPU a launcher runs on the calling thread alone. isa: "baseline", "avx2", "avx512", "avx512_bf16", "amx",
or None for the active one. On a GPU, if this build has kernels for it, it returns before they have run; stream: the
address of the cudaStream_t that they are put on, 0 for the default one.

The contrastive losses have launchers of the statistics and gradients of their logits, for GPUs only. Wrong arrays raise
a ValueError or a TypeError that names them.)";

}  // namespace
}  // namespace evakernels

PYBIND11_MODULE(_C, m) {
  using namespace evakernels;
  m.doc() = kDoc;
  m.def("build_info", &build_info,
        "Version, compiler, instruction sets built and available, GPUs built for.");
  m.def(
      "active_isa", [] { return std::string(cpu::name(cpu::active_isa())); },
      "The instruction set in use: $EVAKERNELS_ISA, else the best available one; ValueError "
      "if that one is unavailable.");
  for (const Registration add_ops : registrations()) add_ops(m);
}
