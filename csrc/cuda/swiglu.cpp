#include "cuda/swiglu.h"

namespace evakernels::cuda {

Error swiglu_forward(const SwigluForward& params, Stream stream) {
  if (params.width == 0) return nullptr;
  return params.norm_weight ? swiglu_norm_forward(params, stream) : swiglu_product_forward(params, stream);
}

Error swiglu_backward(const SwigluBackward& params, Scratch& scratch, Stream stream) {
  if (params.width == 0) return nullptr;
  return params.norm_weight ? swiglu_norm_backward(params, scratch, stream)
                            : swiglu_product_backward(params, stream);
}

}  // namespace evakernels::cuda
