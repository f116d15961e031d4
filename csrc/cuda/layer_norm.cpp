// The plain norm is that with a residual connection, without the residual.
#include "cuda/layer_norm.h"

#include "cuda/residual_norm.h"

namespace evakernels::cuda {
namespace {

// The branch is x, the sum y.
template <class Params>
ResidualNormShape shape_of(const Params& params) {
  return {
      .rows = params.rows,
      .width = params.width,
      .rows_per_sample = 1,
      .dtype = params.y_dtype,
      .branch_dtype = params.dtype,
      .y_dtype = params.y_dtype,
      .rms = params.rms,
  };
}

}  // namespace

Error layer_norm_forward(const LayerNormForward& params, Stream stream) {
  const NormAddForward norm_add = {
      .residual = nullptr,
      .branch = params.x,
      .x = params.y,
      .mean = params.mean,
      .rstd = params.rstd,
      .eps = params.eps,
      .parameters = {.weight = {params.weight, params.weight_dtype},
                     .bias = {params.bias, params.weight_dtype},
                     .layer_scale = {},
                     .row_scale = {}},
      .shape = shape_of(params),
  };
  return norm_add_forward(norm_add, stream);
}

Error layer_norm_backward(const LayerNormBackward& params, Scratch& scratch, Stream stream) {
  const NormAddBackward norm_add = {
      .dx = params.dy,
      .branch = params.x,
      .mean = params.mean,
      .rstd = params.rstd,
      .dbranch = params.dx,
      .parameters = {.weight = {params.weight, params.weight_dtype},
                     .bias = {},
                     .layer_scale = {},
                     .row_scale = {}},
      .gradients = {.weight = {params.dweight, params.weight_dtype},
                    .bias = {params.dbias, params.weight_dtype},
                    .layer_scale = {}},
      .shape = shape_of(params),
  };
  return norm_add_backward(norm_add, scratch, stream);
}

}  // namespace evakernels::cuda
