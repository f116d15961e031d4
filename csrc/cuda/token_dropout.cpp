#include "cuda/token_dropout.h"

namespace evakernels::cuda {

Error token_dropout_forward(const TokenDropoutForward& params, Stream stream) {
  const TokenDropoutShape& shape = params.shape;
  if (shape.batch == 0 || shape.channels == 0 || shape.prefix_tokens + shape.kept_tokens == 0) return nullptr;
  return params.patches.channel_stride == 1 ? token_dropout_forward_rows(params, stream)
                                            : token_dropout_forward_tiles(params, stream);
}

}  // namespace evakernels::cuda
