// Parameters of the contrastive launchers: on CPUs a tile of logits, the output of a matmul; on GPUs
// the features, from which the kernel computes logits.
#pragma once

#include "include/launcher.h"

namespace evakernels {

// Logits of `rows` images and all captions. The positive of row i is in column pair + i.
struct LogitTile {
  float* logits;  // [rows, columns], dense
  int64_t rows;
  int64_t columns;
  int64_t pair;
};

struct ContrastiveForward {
  LogitTile tile;
  float* row_lse;   // [rows]
  float* row_max;   // [rows]
  float* positive;  // [rows]
  float* col_max;   // [columns], of the tiles so far
  float*
      col_sum;  // [columns], of exp(logit - col_max) in the tiles so far; 0 in place of an infinite col_max
};

struct ContrastiveBackward {
  LogitTile tile;          // overwritten with the gradient of the logits
  const float* drow_lse;   // [rows]
  const float* dcol_lse;   // [columns]
  const float* dpositive;  // [rows]
  const float* row_lse;    // [rows]
  const float* col_lse;    // [columns]
};

struct SiglipTile {
  LogitTile tile;  // siglip_forward overwrites it with the gradient of the logits
  float bias;
};

// A tile's share of the loss and of the bias gradient.
struct SiglipSums {
  double loss = 0;
  double dbias = 0;
};

// Rows of image features before and after the matmuls.
struct ImageRows {
  const void* image;    // [rows, width], dtype, dense
  float* scaled;        // [rows, width]: scale * image; backward: the gradient of that
  void* dimage;         // [rows, width], dtype, dense
  float* dot_products;  // [rows]: of image with the gradient
  int64_t rows;
  int64_t width;
  float scale;
  DType dtype;
};

namespace cpu {

// Each makes one pass over a tile of logits. Results don't depend on the number of threads.
void contrastive_forward(const ContrastiveForward& params, Isa isa, ParallelFor parallel_for);

// Turns the sums of columns into log-sum-exps after the last tile.
void finish_columns(const float* col_sum, float* col_max, float* col_lse, int64_t columns);

void contrastive_backward(const ContrastiveBackward& params, Isa isa, ParallelFor parallel_for);

SiglipSums siglip_value(const SiglipTile& params, Isa isa, ParallelFor parallel_for);

SiglipSums siglip_forward(const SiglipTile& params, Isa isa, ParallelFor parallel_for);

// scaled = scale * image.
void scale_image(const ImageRows& params, Isa isa, ParallelFor parallel_for);

// dimage = scale * scaled, and the dot products that sum to the gradient of the scale.
void finish_image(const ImageRows& params, Isa isa, ParallelFor parallel_for);

// Blocks of a tile fit into the L2 cache (256 KiB), so that each is read from memory once.
constexpr int64_t kBlockColumns = 512;
constexpr int64_t kBlockRows = 128;

// Sums of exp(logit - shift) over one column block, [rows] each.
struct RowSums {
  float* highest;
  float* shift;
  float* sum;
};

// The loops of one instruction set.
struct ContrastiveKernels {
  // Columns [begin, end), kBlockColumns at most.
  void (*forward)(const ContrastiveForward& params, const RowSums& row_sums, int64_t begin, int64_t end);
  void (*backward)(const ContrastiveBackward& params, int64_t begin, int64_t end);
  SiglipSums (*siglip_value)(const SiglipTile& params, int64_t begin, int64_t end);
  SiglipSums (*siglip_forward)(const SiglipTile& params, int64_t begin, int64_t end);

  // Rows [begin, end).
  void (*scale_image)(const ImageRows& params, int64_t begin, int64_t end);
  void (*finish_image)(const ImageRows& params, int64_t begin, int64_t end);
};

EVAKERNELS_FOR_EACH_ISA(extern const ContrastiveKernels contrastive;)

}  // namespace cpu

// Features of one dtype, with logits logit_scale * image @ text^T. The caption of row i is offset + i.
struct ContrastiveFeatures {
  const void* image;        // [rows, width], dtype, dense
  const void* text;         // [columns, width], dtype, dense
  const void* logit_scale;  // one element, scale_dtype
  int64_t rows;
  int64_t columns;
  int64_t width;
  int64_t offset;
  DType dtype;
  DType scale_dtype;
};

// Statistics of all logits in one launch.
struct ContrastiveStatistics : ContrastiveFeatures {
  float* logits = nullptr;    // [rows, columns]; null if they aren't saved
  float* row_lse = nullptr;   // [rows]
  float* col_lse = nullptr;   // [columns]
  float* positive = nullptr;  // [rows]
  float* row_max = nullptr;   // [rows]
  float* col_max = nullptr;   // [columns]
};

// Gradients of the logits from those of InfoNCE's statistics.
struct ContrastiveGradients : ContrastiveFeatures {
  const float* drow_lse = nullptr;   // [rows]
  const float* dcol_lse = nullptr;   // [columns]
  const float* dpositive = nullptr;  // [rows]
  const float* row_lse = nullptr;    // [rows]
  const float* col_lse = nullptr;    // [columns]
  void* dlogits = nullptr;           // [rows, stride], dtype
  int64_t stride = 0;                // even, at least columns
};

// The sigmoid loss and the gradients of its logits.
struct SiglipGradients : ContrastiveFeatures {
  const void* logit_bias = nullptr;  // one element, bias_dtype
  float* sums = nullptr;             // of losses and of dbias: [2, kSiglipSums per block]
  void* dlogits = nullptr;           // [rows, stride], dtype, times kSiglipUnit; null without gradients
  int64_t stride = 0;                // even, at least columns
  DType bias_dtype = DType::Float32;
};

// Logits of a block on a GPU, and its partial sums of the sigmoid loss.
constexpr int64_t kBlockLogitRows = 128, kBlockLogitColumns = 256, kSiglipSums = 8;
constexpr float kSiglipUnit = 16384.0f;  // float16 has nothing below 6e-8

namespace cuda {

Error contrastive_forward(const ContrastiveStatistics& params, Scratch& scratch, Stream stream);

Error contrastive_dlogits(const ContrastiveGradients& params, Stream stream);

Error siglip_dlogits(const SiglipGradients& params, Stream stream);

}  // namespace cuda

}  // namespace evakernels
