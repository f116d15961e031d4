// What both forward kernels of token_dropout share.
#pragma once

#include <algorithm>

#include "cuda/dispatch.h"
#include "include/token_dropout.h"

namespace evakernels::cuda {

constexpr int64_t kMostInY = 65'535;  // blocks of a grid, in z too

// The element types of out, pos_embed and patches. Any mix but these is rare: one kernel has to do for it.
template <class O, class P, class T>
struct TokenTypes {
  using Out = O;
  using Position = P;
  using Patch = T;
  static constexpr bool kCommon = std::is_same_v<O, P> && (std::is_same_v<O, T> || std::is_same_v<O, float>);
};

template <class Body>
Error with_token_types(const TokenDropoutForward& params, const Body& body) {
  return with_element_type(params.out_dtype, [&](auto out) {
    using O = decltype(out);
    // A 16-bit result has inputs of its own dtype only: it is the widest of theirs.
    if constexpr (sizeof(O) == 2) {
      return body(TokenTypes<O, O, O>{});
    } else {
      return with_element_type(params.pos_embed_dtype, [&](auto position) {
        return with_element_type(params.patches.dtype, [&](auto patch) {
          return body(TokenTypes<O, decltype(position), decltype(patch)>{});
        });
      });
    }
  });
}

// The token that is kept as the i-th of a sample; -1 and an error if there is no such.
__device__ __forceinline__ int64_t kept_token(const TokenDropoutForward& params, int64_t sample, int64_t i) {
  if (!params.token_index) return i;
  const int64_t token = params.token_index[sample * params.shape.kept_tokens + i];
  const bool exists = token >= 0 && token < params.shape.tokens;
  if (!exists) refuse("token_dropout", "token_index is out of range");
  return exists ? token : -1;
}

// Adds the position's embedding, if there are any, to channels [channel, channel + E).
template <class P, int E>
__device__ __forceinline__ void add_position(const TokenDropoutForward& params, int64_t position,
                                             int64_t channel, float (&values)[E]) {
  if (!params.pos_embed) return;
  float embedding[E];
  load_floats(static_cast<const P*>(params.pos_embed) + position * params.shape.channels + channel,
              embedding);
#pragma unroll
  for (int i = 0; i < E; ++i) values[i] += embedding[i];
}

}  // namespace evakernels::cuda
