// Statistics and gradients of contrastive logits on GPUs. contrastive.cpp has the operators for CPUs, which
// call functions of torch; on GPUs Python code multiplies the gradients with the features.
#include <limits>

#include "bind/binding.h"
#include "include/contrastive.h"

namespace evakernels::gpu {
namespace {

ContrastiveFeatures read_features(Call& call, Input image_in, Input text_in, Input logit_scale,
                                  int64_t offset) {
  const Array image = call.read(image_in, "image"), text = call.read(text_in, "text");
  const Array scale = call.read(logit_scale, "logit_scale");
  require(image.sizes.size() == 2 && image.sizes[0] > 0, "image must be [m, D] with m > 0, got ",
          text_of(image.sizes));
  require_dtype(text, image.dtype);
  require(text.sizes.size() == 2 && text.sizes[1] == image.sizes[1], "text must be [B, D]");
  const int64_t rows = image.sizes[0], columns = text.sizes[0];
  require(product(scale.sizes) == 1, "logit_scale must have one element");
  require(offset >= 0 && offset <= columns - rows,
          "offset must be 0 to B - m = ", std::to_string(columns - rows), ", got ", std::to_string(offset));
  require(columns <= std::numeric_limits<int32_t>::max(), "text must have fewer than 2^31 rows");
  require(image.dtype != DType::Float32, "image must be bfloat16 or float16 on a GPU, got float32");
  return {
      .image = image.data,
      .text = text.data,
      .logit_scale = scale.data,
      .rows = rows,
      .columns = columns,
      .width = image.sizes[1],
      .offset = offset,
      .dtype = image.dtype,
      .scale_dtype = scale.dtype,
  };
}

// Rows are padded to an even number of columns, as kernels store two at a time.
template <class Params>
void add_dlogits(Call& call, bool needed, Params& params) {
  params.stride = params.columns + params.columns % 2;
  const int64_t sizes[] = {params.rows, params.stride};
  params.dlogits = call.output_if(needed, "dlogits", sizes, params.dtype).data;
  const auto address = reinterpret_cast<uintptr_t>(params.dlogits);
  require(address % 4 == 0, "dlogits must be aligned to 4 bytes, got ", std::to_string(address % 4),
          " bytes after a multiple");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> contrastive_forward(Input image, Input text,
                                                                               Input logit_scale,
                                                                               int64_t offset, bool keep) {
  Call call;
  ContrastiveStatistics params{read_features(call, image, text, logit_scale, offset)};
  const int64_t sizes[] = {params.rows, params.columns};
  params.row_lse = call.output_floats("row_lse", params.rows);
  params.col_lse = call.output_floats("col_lse", params.columns);
  params.positive = call.output_floats("positive", params.rows);
  params.row_max = call.output_floats("row_max", params.rows);
  params.col_max = call.output_floats("col_max", params.columns);
  params.logits = call.output_if(keep, "logits", sizes, DType::Float32).floats();
  call.launch<nullptr, cuda::contrastive_forward>("contrastive_forward", params);
  return call.results<6>();
}

Tensor contrastive_dlogits(Input drow_lse, Input dcol_lse, Input dpositive, Input image, Input text,
                           Input logit_scale, Input row_lse, Input col_lse, int64_t offset) {
  Call call;
  ContrastiveGradients params{read_features(call, image, text, logit_scale, offset)};
  params.drow_lse = read_floats(call, drow_lse, "drow_lse", params.rows);
  params.dcol_lse = read_floats(call, dcol_lse, "dcol_lse", params.columns);
  params.dpositive = read_floats(call, dpositive, "dpositive", params.rows);
  params.row_lse = read_floats(call, row_lse, "row_lse", params.rows);
  params.col_lse = read_floats(call, col_lse, "col_lse", params.columns);
  add_dlogits(call, true, params);
  call.launch<nullptr, cuda::contrastive_dlogits>("contrastive_dlogits", params);
  return call.results<1>();
}

std::tuple<Tensor, Tensor> siglip_dlogits(Input image, Input text, Input logit_scale, Input logit_bias,
                                          int64_t offset, NeedsGrad needs_grad) {
  Call call;
  SiglipGradients params{read_features(call, image, text, logit_scale, offset)};
  const Array bias = call.read(logit_bias, "logit_bias");
  require(product(bias.sizes) == 1, "logit_bias must have one element");
  const int64_t row_tiles = (params.rows + kBlockLogitRows - 1) / kBlockLogitRows;
  const int64_t column_tiles = (params.columns + kBlockLogitColumns - 1) / kBlockLogitColumns;
  const int64_t sizes[] = {2, row_tiles * column_tiles * kSiglipSums};
  params.logit_bias = bias.data;
  params.bias_dtype = bias.dtype;
  params.sums = call.output("sums", sizes, DType::Float32).floats();
  add_dlogits(call, needs_grad.at(0), params);
  call.launch<nullptr, cuda::siglip_dlogits>("siglip_dlogits", params);
  return call.results<2>();
}

}  // namespace

EVAKERNELS_GPU_OPS(contrastive_logits, m) {
  EVAKERNELS_OP(m, contrastive_forward);
  EVAKERNELS_OP(m, contrastive_dlogits);
  EVAKERNELS_OP(m, siglip_dlogits);
}

}  // namespace evakernels::gpu
