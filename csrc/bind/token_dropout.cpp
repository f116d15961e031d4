// Token dropout: keeps some patches, adds position embeddings and prepends the prefix.
#include "include/token_dropout.h"

#include "bind/binding.h"

namespace evakernels {
namespace {

// Contiguous channels or contiguous patches. Strides of dimensions of size 1 have no meaning.
bool has_readable_patches(Sizes sizes, Sizes strides) {
  require(sizes.size() == 3, "patches must be [B, N, C]");
  return strides[2] == 1 || strides[1] == 1 || sizes[1] * sizes[2] == 1 || product(sizes) == 0;
}

const int64_t* index_of(const Array& token_index, int64_t batch) {
  require(!token_index || (token_index.sizes.size() == 2 && token_index.sizes[0] == batch),
          "token_index must be [B, K]");
  return static_cast<const int64_t*>(token_index.data);
}

int64_t rows_of_table(const Array& table, int64_t channels) {
  if (!table) return 0;
  require(table.sizes.size() == 2 && table.sizes[1] == channels, table.name, " must have ",
          std::to_string(channels), " channels");
  return table.sizes[0];
}

Tensor token_dropout_forward(Input patches_in, OptionalInput token_index_in, OptionalInput prefix_in,
                             OptionalInput pos_embed_in) {
  Call call;
  const Array patches = call.read_readable(patches_in, "patches", has_readable_patches),
              token_index = call.read_index(token_index_in, "token_index"),
              prefix = call.read_optional(prefix_in, "prefix"),
              pos_embed = call.read_optional(pos_embed_in, "pos_embed");
  const int64_t batch = patches.sizes[0], tokens = patches.sizes[1], channels = patches.sizes[2];
  const int64_t* const index = index_of(token_index, batch);
  const TokenDropoutShape shape = {
      .batch = batch,
      .tokens = tokens,
      .kept_tokens = token_index ? token_index.sizes[1] : tokens,
      .prefix_tokens = rows_of_table(prefix, channels),
      .channels = channels,
  };
  require(!pos_embed || rows_of_table(pos_embed, channels) == shape.prefix_tokens + tokens,
          "pos_embed must have a row for each prefix token and each patch");
  const DType prefix_dtype = prefix ? prefix.dtype : patches.dtype,
              pos_embed_dtype = pos_embed ? pos_embed.dtype : patches.dtype;
  const bool has_one_dtype = prefix_dtype == patches.dtype && pos_embed_dtype == patches.dtype;
  const DType dtype = has_one_dtype ? patches.dtype : DType::Float32;
  const int64_t sizes[] = {batch, shape.prefix_tokens + shape.kept_tokens, channels};
  const TokenDropoutForward params = {
      .patches = {patches.data, patches.strides[0], patches.strides[1], patches.strides[2], patches.dtype},
      .token_index = index,
      .prefix = prefix.data,
      .pos_embed = pos_embed.data,
      .out = call.output("out", sizes, dtype).data,
      .shape = shape,
      .prefix_dtype = prefix_dtype,
      .pos_embed_dtype = pos_embed_dtype,
      .out_dtype = dtype,
  };
  call.launch<cpu::token_dropout_forward, cuda::token_dropout_forward>("token_dropout_forward", params);
  return call.results<1>();
}

std::tuple<Tensor, Tensor, Tensor> token_dropout_backward(Input dout_in, OptionalInput token_index_in,
                                                          int64_t prefix_tokens, int64_t tokens,
                                                          NeedsGrad needs_grad) {
  Call call;
  const Array dout = call.read(dout_in, "dout"), token_index = call.read_index(token_index_in, "token_index");
  require(dout.sizes.size() == 3, "dout must be [B, P + K, C]");
  require(prefix_tokens >= 0 && tokens >= 0, "num_prefix and num_tokens must not be negative");
  const int64_t batch = dout.sizes[0], channels = dout.sizes[2];
  const int64_t* const index = index_of(token_index, batch);
  const TokenDropoutShape shape = {
      .batch = batch,
      .tokens = tokens,
      .kept_tokens = token_index ? token_index.sizes[1] : tokens,
      .prefix_tokens = prefix_tokens,
      .channels = channels,
  };
  require(dout.sizes[1] == prefix_tokens + shape.kept_tokens,
          "dout must have a row for each prefix token and each kept patch");
  const auto gradient = [&](size_t number, const char* name, std::vector<int64_t> sizes) {
    sizes.push_back(channels);
    return call.output_if(needs_grad.at(number), name, sizes, dout.dtype).data;
  };
  const TokenDropoutBackward params = {
      .dout = dout.data,
      .token_index = index,
      .dpatches = gradient(0, "dpatches", {batch, tokens}),
      .dprefix = gradient(1, "dprefix", {prefix_tokens}),
      .dpos_embed = gradient(2, "dpos_embed", {prefix_tokens + tokens}),
      .shape = shape,
      .dtype = dout.dtype,
  };
  call.launch<cpu::token_dropout_backward, cuda::token_dropout_backward>("token_dropout_backward", params);
  return call.results<3>();
}

}  // namespace

EVAKERNELS_OPS(token_dropout, m) {
  EVAKERNELS_OP(m, token_dropout_forward);
  EVAKERNELS_OP(m, token_dropout_backward);
}

}  // namespace evakernels
