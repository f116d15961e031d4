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

void token_dropout_forward(Call& call, Input patches_in, OptionalInput token_index_in,
                           OptionalInput prefix_in, OptionalInput pos_embed_in, Output out) {
  const Array patches = call.read_readable(patches_in, "patches", has_readable_patches),
              token_index = call.read_index(token_index_in, "token_index"),
              prefix = call.read_optional(prefix_in, "prefix"),
              pos_embed = call.read_optional(pos_embed_in, "pos_embed");
  require(has_readable_patches(patches.sizes, patches.strides),
          "the channels of a patch or the patches of a channel must lie side by side");
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
      .out = call.output(out, "out", sizes, dtype).data,
      .shape = shape,
      .prefix_dtype = prefix_dtype,
      .pos_embed_dtype = pos_embed_dtype,
      .out_dtype = dtype,
  };
  call.launch<cpu::token_dropout_forward, cuda::token_dropout_forward>("token_dropout_forward", params);
}

void token_dropout_backward(Call& call, Input dout_in, OptionalInput token_index_in, int64_t prefix_tokens,
                            int64_t tokens, Output dpatches, Output dprefix, Output dpos_embed,
                            NeedsGrad needs_grad) {
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
  const auto gradient = [&](size_t number, Output result, const char* name, std::vector<int64_t> sizes) {
    sizes.push_back(channels);
    return call.output_if(needs_grad.at(number), result, name, sizes, dout.dtype, dout.dtype).data;
  };
  const TokenDropoutBackward params = {
      .dout = dout.data,
      .token_index = index,
      .dpatches = gradient(0, dpatches, "dpatches", {batch, tokens}),
      .dprefix = gradient(1, dprefix, "dprefix", {prefix_tokens}),
      .dpos_embed = gradient(2, dpos_embed, "dpos_embed", {prefix_tokens + tokens}),
      .shape = shape,
      .dtype = dout.dtype,
  };
  call.launch<cpu::token_dropout_backward, cuda::token_dropout_backward>("token_dropout_backward", params);
}

}  // namespace

EVAKERNELS_OPS(token_dropout, m) {
  EVAKERNELS_OP(
      m, token_dropout_forward, "patches"_a, "token_index"_a, "prefix"_a, "pos_embed"_a, "out"_a,
      py::kw_only(),
      R"(Writes out [B, P + K, C]: the prefix, then the patches that token_index names, each plus its position.

patches: [B, N, C], the channels of a patch or the patches of a channel side by side. token_index: [B, K] int64,
distinct in a row, which isn't checked, all of them below N; None: all patches. prefix: [P, C], pos_embed:
[P + N, C], or None. out: of their common dtype, float32 if they have several.)");
  EVAKERNELS_OP(m, token_dropout_backward, "dout"_a, "token_index"_a, "num_prefix"_a, "num_tokens"_a,
                "dpatches"_a, "dprefix"_a, "dpos_embed"_a, py::kw_only(),
                R"(Writes dpatches [B, N, C], dprefix [P, C] and dpos_embed [P + N, C] unless None.

All of dout's dtype.)");
}

}  // namespace evakernels
