// gradient_norm as a torch operator.
#include "bind/launch.h"
#include "bind/tensor_lists.h"
#include "cuda/gradient_norm.h"

namespace evakernels {
namespace {

Tensor gradient_norm(std::vector<Tensor> grads) {
  require(!grads.empty(), "grads is empty");
  const Tensor norm = new_float32(grads[0], {});
  const DenseList gradients(std::move(grads), "grads");
  OptimizedTensors tensors(gradients.count());
  for (size_t i = 0; i < tensors.size(); ++i) {
    tensors[i].grad = gradients.buffer(i);
    tensors[i].size = gradients.size(i);
  }
  const GradientNorm params = gradient_norm_params(tensors, static_cast<float*>(norm.mutable_data_ptr()));
  launch_on_gpu<cuda::gradient_norm>("gradient_norm", gradients.first(), params);
  return norm;
}

}  // namespace
}  // namespace evakernels

EVAKERNELS_IMPLEMENT_ON_GPU(m, { m.impl("gradient_norm", TORCH_BOX(&evakernels::gradient_norm)); })
