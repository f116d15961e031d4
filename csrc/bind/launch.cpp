// Lets evakernels._C choose the memory of an operator's results, and the instruction set.
#include "bind/binding.h"

namespace evakernels {
namespace {

// Applies to the thread's operators until the next call. With neither they run as for torch.
void set_launch_options(const std::vector<OptionalTensor>& out, const std::optional<std::string>& isa) {
  static thread_local LaunchOptions options;
  options = {out, isa ? std::optional(cpu::parse_isa(*isa)) : std::nullopt};
  launch_options = &options;
}

}  // namespace
}  // namespace evakernels

STABLE_TORCH_LIBRARY_FRAGMENT(evakernels_native, m) {
  m.def("set_launch_options(Tensor?[] out, str? isa) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(evakernels_native, CompositeExplicitAutograd, m) {
  m.impl("set_launch_options", TORCH_BOX(&evakernels::set_launch_options));
}
