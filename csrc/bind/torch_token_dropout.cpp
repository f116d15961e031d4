// token_dropout as torch operators.
#include "bind/launch.h"
#include "cpu/token_dropout.h"
#include "cuda/token_dropout.h"

namespace evakernels {
namespace {

// Strides that the kernels don't know are made dense.
Tensor readable_patches(const Tensor& patches) {
  require(patches.dim() == 3, "patches must be [B, N, C]");
  const bool readable = patches.stride(2) == 1 || patches.stride(1) == 1;
  return readable ? patches : torch::stable::contiguous(patches);
}

PatchTensor view_of(const Tensor& patches) {
  return {patches.const_data_ptr(), patches.stride(0), patches.stride(1), patches.stride(2),
          dtype_of(patches, "patches")};
}

std::optional<Tensor> dense_index(const std::optional<Tensor>& token_index, int64_t batch) {
  if (!token_index) return std::nullopt;
  require(token_index->scalar_type() == ScalarType::Long, "token_index must be int64");
  require(token_index->dim() == 2 && token_index->size(0) == batch, "token_index must be [B, K]");
  return torch::stable::contiguous(*token_index);
}

const int64_t* index_or_null(const std::optional<Tensor>& token_index) {
  return static_cast<const int64_t*>(data_or_null(token_index));
}

std::optional<Tensor> dense_table(const std::optional<Tensor>& table, int64_t channels, const char* name) {
  if (!table) return std::nullopt;
  require(table->dim() == 2 && table->size(1) == channels,
          std::string(name) + " must have " + std::to_string(channels) + " channels");
  return torch::stable::contiguous(*table);
}

DType dtype_or(const std::optional<Tensor>& tensor, DType otherwise, const char* name) {
  return tensor ? dtype_of(*tensor, name) : otherwise;
}

Tensor token_dropout_forward(const Tensor& patches_any, std::optional<Tensor> token_index_any,
                             std::optional<Tensor> prefix_any, std::optional<Tensor> pos_embed_any) {
  const Tensor patches = readable_patches(patches_any);
  const int64_t batch = patches.size(0), tokens = patches.size(1), channels = patches.size(2);
  const auto token_index = dense_index(token_index_any, batch);
  const auto prefix = dense_table(prefix_any, channels, "prefix");
  const auto pos_embed = dense_table(pos_embed_any, channels, "pos_embed");
  const TokenDropoutShape shape = {
      .batch = batch,
      .tokens = tokens,
      .kept_tokens = token_index ? token_index->size(1) : tokens,
      .prefix_tokens = prefix ? prefix->size(0) : 0,
      .channels = channels,
  };
  require(!pos_embed || pos_embed->size(0) == shape.prefix_tokens + tokens,
          "pos_embed must have a row for each prefix token and each patch");

  const DType dtype = dtype_of(patches, "patches");
  const DType prefix_dtype = dtype_or(prefix, dtype, "prefix");
  const DType pos_embed_dtype = dtype_or(pos_embed, dtype, "pos_embed");
  // Two different dtypes meet in float32.
  const bool same = prefix_dtype == dtype && pos_embed_dtype == dtype;
  const std::vector<int64_t> sizes = {batch, shape.prefix_tokens + shape.kept_tokens, channels};
  const Tensor out = same ? torch::stable::new_empty(patches, sizes) : new_float32(patches, sizes);
  const TokenDropoutForward params = {
      .patches = view_of(patches),
      .token_index = index_or_null(token_index),
      .prefix = data_or_null(prefix),
      .pos_embed = data_or_null(pos_embed),
      .out = out.mutable_data_ptr(),
      .shape = shape,
      .prefix_dtype = prefix_dtype,
      .pos_embed_dtype = pos_embed_dtype,
      .out_dtype = dtype_of(out, "out"),
  };
  launch<cpu::token_dropout_forward, cuda::token_dropout_forward>("token_dropout_forward", patches, params);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> token_dropout_backward(const Tensor& dout_any,
                                                          std::optional<Tensor> token_index_any,
                                                          int64_t prefix_tokens, int64_t tokens,
                                                          bool has_pos_embed) {
  require(dout_any.dim() == 3, "dout must be [B, P + K, C]");
  require(prefix_tokens >= 0 && tokens >= 0, "num_prefix and num_tokens must not be negative");
  const Tensor dout = torch::stable::contiguous(dout_any);
  const int64_t batch = dout.size(0), channels = dout.size(2);
  const auto token_index = dense_index(token_index_any, batch);
  const TokenDropoutShape shape = {
      .batch = batch,
      .tokens = tokens,
      .kept_tokens = token_index ? token_index->size(1) : tokens,
      .prefix_tokens = prefix_tokens,
      .channels = channels,
  };
  require(dout.size(1) == prefix_tokens + shape.kept_tokens,
          "dout must have a row for each prefix token and each kept patch");

  const std::vector<int64_t> table = {prefix_tokens + tokens, channels};
  // Without an index the gradient of the patches is a part of dout: its place stays empty.
  const std::vector<int64_t> patches = {batch, tokens, channels};
  const Tensor dpatches = torch::stable::new_empty(dout, token_index ? patches : std::vector<int64_t>{0});
  const Tensor dprefix = torch::stable::new_empty(dout, {prefix_tokens, channels});
  const Tensor dpos_embed = torch::stable::new_empty(dout, has_pos_embed ? table : std::vector<int64_t>{0});
  const TokenDropoutBackward params = {
      .dout = dout.const_data_ptr(),
      .token_index = index_or_null(token_index),
      .dpatches = token_index ? dpatches.mutable_data_ptr() : nullptr,
      .dprefix = dprefix.mutable_data_ptr(),
      .dpos_embed = has_pos_embed ? dpos_embed.mutable_data_ptr() : nullptr,
      .shape = shape,
      .dtype = dtype_of(dout, "dout"),
  };
  launch<cpu::token_dropout_backward, cuda::token_dropout_backward, cuda::token_dropout_backward_workspace>(
      "token_dropout_backward", dout, params);
  return {dpatches, dprefix, dpos_embed};
}

}  // namespace
}  // namespace evakernels

EVAKERNELS_IMPLEMENT(m, {
  m.impl("token_dropout_forward", TORCH_BOX(&evakernels::token_dropout_forward));
  m.impl("token_dropout_backward", TORCH_BOX(&evakernels::token_dropout_backward));
})
