// token_dropout as torch operators.
#include "bind/launch.h"
#include "bind/token_dropout.h"
#include "cpu/token_dropout.h"
#include "cuda/token_dropout.h"

namespace evakernels {
namespace {

// Strides that the kernels don't know are made dense.
Tensor readable_patches(const Tensor& patches) {
  require(patches.dim() == 3, "patches must be [B, N, C]");
  return has_readable_patches(sizes_of(patches), strides_of(patches)) ? patches : as_contiguous(patches);
}

std::optional<Tensor> dense_index(const std::optional<Tensor>& token_index) {
  require(!token_index || token_index->scalar_type() == ScalarType::Long, "token_index must be int64");
  return contiguous_or_none(token_index);
}

Array array_of_index(const std::optional<Tensor>& token_index) {
  if (!token_index) return no_array("token_index");
  return {"token_index",
          const_cast<void*>(token_index->const_data_ptr()),
          DType::Float32,
          sizes_of(*token_index),
          strides_of(*token_index),
          true};
}

Tensor token_dropout_forward(const Tensor& patches_any, std::optional<Tensor> token_index_any,
                             std::optional<Tensor> prefix_any, std::optional<Tensor> pos_embed_any) {
  const Tensor patches = readable_patches(patches_any);
  const auto token_index = dense_index(token_index_any);
  const auto prefix = contiguous_or_none(prefix_any), pos_embed = contiguous_or_none(pos_embed_any);
  const TokenDropoutInputs inputs = {array_of(patches, "patches"), array_of_index(token_index),
                                     array_of(prefix, "prefix"), array_of(pos_embed, "pos_embed")};
  const TokenDropoutShape shape = inputs.shape();
  const std::vector<int64_t> sizes = {shape.batch, shape.prefix_tokens + shape.kept_tokens, shape.channels};
  const bool same = inputs.out_dtype() == dtype_of(patches, "patches");
  const Tensor out = same ? new_tensor(patches, sizes) : new_float32(patches, sizes);
  const TokenDropoutForward params = token_dropout_forward_params(inputs, array_of(out, "out"));
  launch<cpu::token_dropout_forward, cuda::token_dropout_forward>("token_dropout_forward", patches, params);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> token_dropout_backward(const Tensor& dout_any,
                                                          std::optional<Tensor> token_index_any,
                                                          int64_t prefix_tokens, int64_t tokens,
                                                          Wanted wanted) {
  require(dout_any.dim() == 3, "dout must be [B, P + K, C]");
  require(prefix_tokens >= 0 && tokens >= 0, "num_prefix and num_tokens must not be negative");
  const Tensor dout = as_contiguous(dout_any);
  const int64_t batch = dout.size(0), channels = dout.size(2);
  const auto token_index = dense_index(token_index_any);
  const auto new_if = [&](bool exists, const std::vector<int64_t>& sizes) {
    return new_tensor(dout, exists ? sizes : std::vector<int64_t>{0});
  };
  const Tensor dpatches = new_if(wanted.at(0), {batch, tokens, channels});
  const Tensor dprefix = new_if(wanted.at(1), {prefix_tokens, channels});
  const Tensor dpos_embed = new_if(wanted.at(2), {prefix_tokens + tokens, channels});
  const TokenDropoutBackward params = token_dropout_backward_params(
      array_of(dout, "dout"), array_of_index(token_index), prefix_tokens, tokens,
      array_unless_empty(dpatches, "dpatches"), array_unless_empty(dprefix, "dprefix"),
      array_unless_empty(dpos_embed, "dpos_embed"));
  launch<cpu::token_dropout_backward, cuda::token_dropout_backward>("token_dropout_backward", dout, params);
  return {dpatches, dprefix, dpos_embed};
}

}  // namespace
}  // namespace evakernels

EVAKERNELS_IMPLEMENT(m, {
  m.impl("token_dropout_forward", TORCH_BOX(&evakernels::token_dropout_forward));
  m.impl("token_dropout_backward", TORCH_BOX(&evakernels::token_dropout_backward));
})
