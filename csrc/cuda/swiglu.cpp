#include "cuda/swiglu.h"

namespace evakernels::cuda {

Error swiglu_forward(const SwigluForward& params, Stream stream) {
  if (params.rows == 0 || params.width == 0) return nullptr;
  return params.norm_weight ? swiglu_norm_forward(params, stream) : swiglu_product_forward(params, stream);
}

Error swiglu_backward(const SwigluBackward& params, float* workspace, Stream stream) {
  if (params.width == 0) return nullptr;
  if (params.norm_weight) return swiglu_norm_backward(params, workspace, stream);
  return params.rows == 0 ? nullptr : swiglu_product_backward(params, stream);
}

int64_t swiglu_backward_workspace(const SwigluBackward& params) {
  return params.norm_weight && params.width > 0 ? swiglu_norm_backward_workspace(params) : 0;
}

}  // namespace evakernels::cuda
