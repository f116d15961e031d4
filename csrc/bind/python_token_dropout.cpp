// The launchers of token_dropout on arrays.
#include "bind/python_launch.h"
#include "bind/token_dropout.h"
#include "cpu/token_dropout.h"
#include "cuda/token_dropout.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace evakernels {
namespace {

void token_dropout_forward(const py::object& patches, const py::object& token_index, const py::object& prefix,
                           const py::object& pos_embed, const py::object& out, const IsaName& isa,
                           uintptr_t stream) {
  Arrays arrays(stream);
  const TokenDropoutInputs inputs = {
      arrays.read_strided(patches, "patches"), arrays.read_index_if(token_index, "token_index"),
      arrays.read_if(prefix, "prefix"), arrays.read_if(pos_embed, "pos_embed")};
  const TokenDropoutForward params = token_dropout_forward_params(inputs, arrays.write(out, "out"));
  launch<cpu::token_dropout_forward, cuda::token_dropout_forward>("token_dropout_forward", arrays, isa,
                                                                  params);
}

void token_dropout_backward(const py::object& dout, const py::object& token_index, int64_t num_prefix,
                            int64_t num_tokens, const py::object& dpatches, const py::object& dprefix,
                            const py::object& dpos_embed, const IsaName& isa, uintptr_t stream) {
  Arrays arrays(stream);
  const TokenDropoutBackward params = token_dropout_backward_params(
      arrays.read(dout, "dout"), arrays.read_index_if(token_index, "token_index"), num_prefix, num_tokens,
      arrays.write_if(dpatches, "dpatches"), arrays.write_if(dprefix, "dprefix"),
      arrays.write_if(dpos_embed, "dpos_embed"));
  launch<cpu::token_dropout_backward, cuda::token_dropout_backward>("token_dropout_backward", arrays, isa,
                                                                    params);
}

}  // namespace

void register_token_dropout(py::module_& m) {
  m.def(
      "token_dropout_forward", &token_dropout_forward, "patches"_a, "token_index"_a, "prefix"_a,
      "pos_embed"_a, "out"_a, py::kw_only(), "isa"_a = py::none(), "stream"_a = 0,
      R"(Writes out [B, P + K, C]: the prefix, then the patches that token_index names, each plus its position.

patches: [B, N, C], the channels of a patch or the patches of a channel side by side. token_index: [B, K] int64,
distinct in a row, all of them below N, which the CPU kernel doesn't check; None: all patches. prefix: [P, C], pos_embed:
[P + N, C], or None. out: of their common dtype, float32 if they have several.)");
  m.def("token_dropout_backward", &token_dropout_backward, "dout"_a, "token_index"_a, "num_prefix"_a,
        "num_tokens"_a, "dpatches"_a, "dprefix"_a, "dpos_embed"_a, py::kw_only(), "isa"_a = py::none(),
        "stream"_a = 0,
        R"(Writes dpatches [B, N, C], dprefix [P, C] and dpos_embed [P + N, C] unless None.

All of dout's dtype.)");
}

}  // namespace evakernels
