// Statistics of contrastive logits on GPUs. contrastive.cpp has the operators for CPUs, which call functions
// of torch.
#include <limits>

#include "bind/binding.h"
#include "include/contrastive.h"

namespace evakernels::gpu {
namespace {

struct StatisticsOutputs {
  Output row_lse, col_lse, positive, row_max, col_max;
};

// Launches with `logits` saved, or null.
void write_statistics(const char* op, Call& call, const Array& image, const Array& text, Input logit_scale,
                      int64_t offset, const StatisticsOutputs& outputs, float* logits) {
  const Array scale = call.read(logit_scale, "logit_scale");
  const int64_t rows = image.sizes[0], columns = text.sizes[0];
  require(product(scale.sizes) == 1, "logit_scale must have one element");
  require(rows > 0 && offset >= 0 && offset <= columns - rows, "offset must be 0 to B - m");
  require(columns <= std::numeric_limits<int32_t>::max(), "text must have fewer than 2^31 rows");
  const auto vector = [&](Output output, const char* name, int64_t count) {
    return call.output(output, name, {&count, 1}, DType::Float32).floats();
  };
  const ContrastiveStatistics params = {
      .image = image.data,
      .text = text.data,
      .logit_scale = scale.data,
      .logits = logits,
      .row_lse = vector(outputs.row_lse, "row_lse", rows),
      .col_lse = vector(outputs.col_lse, "col_lse", columns),
      .positive = vector(outputs.positive, "positive", rows),
      .row_max = vector(outputs.row_max, "row_max", rows),
      .col_max = vector(outputs.col_max, "col_max", columns),
      .rows = rows,
      .columns = columns,
      .width = image.sizes[1],
      .offset = offset,
      .dtype = image.dtype,
      .scale_dtype = scale.dtype,
  };
  if (const cuda::Error reason = cuda::unserved(params)) require(false, reason);
  call.launch<nullptr, cuda::contrastive_forward>(op, params);
}

// Image and text features.
std::pair<Array, Array> read_features(Call& call, Input image_in, Input text_in) {
  const Array image = call.read(image_in, "image"), text = call.read(text_in, "text");
  require(image.sizes.size() == 2, "image must be [m, D]");
  require_dtype(text, image.dtype);
  require(text.sizes.size() == 2 && text.sizes[1] == image.sizes[1], "text must be [B, D]");
  return {image, text};
}

void contrastive_forward(Call& call, Input image_in, Input text_in, Input logit_scale, int64_t offset,
                         Output row_lse, Output col_lse, Output positive, Output row_max, Output col_max) {
  const auto [image, text] = read_features(call, image_in, text_in);
  write_statistics("contrastive_forward", call, image, text, logit_scale, offset,
                   {row_lse, col_lse, positive, row_max, col_max}, nullptr);
}

void contrastive_kept_forward(Call& call, Input image_in, Input text_in, Input logit_scale, int64_t offset,
                              Output row_lse, Output col_lse, Output positive, Output row_max, Output col_max,
                              Output logits) {
  const auto [image, text] = read_features(call, image_in, text_in);
  const int64_t sizes[] = {image.sizes[0], text.sizes[0]};
  float* const saved = call.output(logits, "logits", sizes, DType::Float32).floats();
  write_statistics("contrastive_kept_forward", call, image, text, logit_scale, offset,
                   {row_lse, col_lse, positive, row_max, col_max}, saved);
}

}  // namespace

EVAKERNELS_GPU_OPS(contrastive_statistics, m) {
  EVAKERNELS_OP(
      m, contrastive_forward, "image"_a, "text"_a, "logit_scale"_a, "offset"_a, "row_lse"_a, "col_lse"_a,
      "positive"_a, "row_max"_a, "col_max"_a,
      R"(Writes log-sum-exps and maxima of logit_scale * image @ text^T, and the logits of the pairs.

image: [m, D], text: [B, D], bfloat16 or float16; logit_scale: one element; row i of image belongs
to row offset + i of text. row_lse, positive, row_max: float32 [m]; col_lse, col_max: float32 [B]. GPUs only.)");
  EVAKERNELS_OP(m, contrastive_kept_forward, "image"_a, "text"_a, "logit_scale"_a, "offset"_a, "row_lse"_a,
                "col_lse"_a, "positive"_a, "row_max"_a, "col_max"_a, "logits"_a,
                "As contrastive_forward; also writes the logits, float32 [m, B].");
}

}  // namespace evakernels::gpu
