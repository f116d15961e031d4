// The params of token_dropout from arrays: dense ones but for the patches.
#pragma once

#include "bind/array.h"
#include "common/token_dropout.h"

namespace evakernels {

// Whether the kernels know these strides of patches; of a sample of one number they have no meaning.
inline bool has_readable_patches(Sizes sizes, Sizes strides) {
  return strides[2] == 1 || strides[1] == 1 || sizes[1] * sizes[2] == 1 || product(sizes) == 0;
}

inline const int64_t* index_of(const Array& token_index, int64_t batch) {
  require(!token_index || (token_index.sizes.size() == 2 && token_index.sizes[0] == batch),
          "token_index must be [B, K]");
  return static_cast<const int64_t*>(token_index.data);
}

// Rows of a table, none if it doesn't exist.
inline int64_t rows_of_table(const Array& table, int64_t channels) {
  if (!table) return 0;
  require(table.sizes.size() == 2 && table.sizes[1] == channels,
          std::string(table.name) + " must have " + std::to_string(channels) + " channels");
  return table.sizes[0];
}

struct TokenDropoutInputs {
  Array patches, token_index, prefix, pos_embed;

  TokenDropoutShape shape() const {
    require(patches.sizes.size() == 3, "patches must be [B, N, C]");
    const int64_t batch = patches.sizes[0], tokens = patches.sizes[1], channels = patches.sizes[2];
    index_of(token_index, batch);
    const TokenDropoutShape found = {
        .batch = batch,
        .tokens = tokens,
        .kept_tokens = token_index ? token_index.sizes[1] : tokens,
        .prefix_tokens = rows_of_table(prefix, channels),
        .channels = channels,
    };
    require(!pos_embed || rows_of_table(pos_embed, channels) == found.prefix_tokens + tokens,
            "pos_embed must have a row for each prefix token and each patch");
    return found;
  }

  // Two different dtypes meet in float32.
  DType out_dtype() const {
    const bool one_dtype =
        (!prefix || prefix.dtype == patches.dtype) && (!pos_embed || pos_embed.dtype == patches.dtype);
    return one_dtype ? patches.dtype : DType::Float32;
  }
};

inline TokenDropoutForward token_dropout_forward_params(const TokenDropoutInputs& inputs, const Array& out) {
  const auto& [patches, token_index, prefix, pos_embed] = inputs;
  const TokenDropoutShape shape = inputs.shape();
  require(has_readable_patches(patches.sizes, patches.strides),
          "the channels of a patch or the patches of a channel must lie side by side");
  require_sizes(out, {shape.batch, shape.prefix_tokens + shape.kept_tokens, shape.channels});
  require_dtype(out, inputs.out_dtype());
  return {
      .patches = {patches.data, patches.strides[0], patches.strides[1], patches.strides[2], patches.dtype},
      .token_index = index_of(token_index, shape.batch),
      .prefix = prefix.data,
      .pos_embed = pos_embed.data,
      .out = out.data,
      .shape = shape,
      .prefix_dtype = prefix ? prefix.dtype : patches.dtype,
      .pos_embed_dtype = pos_embed ? pos_embed.dtype : patches.dtype,
      .out_dtype = out.dtype,
  };
}

// Gradients don't exist where they aren't wanted.
inline TokenDropoutBackward token_dropout_backward_params(const Array& dout, const Array& token_index,
                                                          int64_t prefix_tokens, int64_t tokens,
                                                          const Array& dpatches, const Array& dprefix,
                                                          const Array& dpos_embed) {
  require(dout.sizes.size() == 3, "dout must be [B, P + K, C]");
  require(prefix_tokens >= 0 && tokens >= 0, "num_prefix and num_tokens must not be negative");
  const int64_t batch = dout.sizes[0], channels = dout.sizes[2];
  const TokenDropoutBackward params = {
      .dout = dout.data,
      .token_index = index_of(token_index, batch),
      .dpatches = dpatches.data,
      .dprefix = dprefix.data,
      .dpos_embed = dpos_embed.data,
      .shape = {.batch = batch,
                .tokens = tokens,
                .kept_tokens = token_index ? token_index.sizes[1] : tokens,
                .prefix_tokens = prefix_tokens,
                .channels = channels},
      .dtype = dout.dtype,
  };
  require(dout.sizes[1] == prefix_tokens + params.shape.kept_tokens,
          "dout must have a row for each prefix token and each kept patch");
  for (const Array* array : {&dpatches, &dprefix, &dpos_embed}) {
    if (*array) require_dtype(*array, dout.dtype);
  }
  if (dpatches) require_sizes(dpatches, {batch, tokens, channels});
  if (dprefix) require_sizes(dprefix, {prefix_tokens, channels});
  if (dpos_embed) require_sizes(dpos_embed, {prefix_tokens + tokens, channels});
  return params;
}

}  // namespace evakernels
