// Parameters of the contrastive launchers: on CPUs a tile of logits, the output of a matmul; on GPUs
// the features, from which the kernel computes logits.
#pragma once

#include "include/launcher.h"

namespace evakernels {

// Products of `rows` images with all captions, image @ text^T; logits are scale * products. The positive of
// row i is in column pair + i.
struct LogitTile {
  float* values;  // [rows, columns], dense
  int64_t rows;
  int64_t columns;
  int64_t pair;
  float scale;
};

struct ContrastiveForward {
  LogitTile tile;   // overwritten with the logits
  float* row_lse;   // [rows]
  float* positive;  // [rows]
  float* row_max;   // [rows]
  float* col_max;   // [columns], of the tiles so far
  float* col_lse;   // [columns]; until the last tile sums of exp(logit - col_max), 0 for an infinite col_max
  bool is_last;
};

struct ContrastiveBackward {
  LogitTile tile;          // overwritten with the gradient of the products
  const float* drow_lse;   // [rows]
  const float* dcol_lse;   // [columns]
  const float* dpositive;  // [rows]
  const float* row_lse;    // [rows]
  const float* col_lse;    // [columns]
  float* dscale;           // one element
  bool are_logits;         // the tile has logits that forward saved; the scale isn't 0
};

struct SiglipTile {
  LogitTile tile;  // overwritten with the gradient of the products, if it is needed
  float* loss;     // one element each: the sum of losses, and the gradients of scale and bias if needed
  float* dscale;
  float* dbias;
  float bias;
  bool needs_grad;
};

namespace cpu {

// Each makes one pass over a tile of logits. Results don't depend on the number of threads.
void contrastive_forward(const ContrastiveForward& params, Isa isa, ParallelFor parallel_for);

void contrastive_backward(const ContrastiveBackward& params, Isa isa, ParallelFor parallel_for);

void siglip(const SiglipTile& params, Isa isa, ParallelFor parallel_for);

// Blocks of a tile fit into the L2 cache (256 KiB), so that each is read from memory once.
constexpr int64_t kBlockColumns = 512;
constexpr int64_t kBlockRows = 128;

// Sums of exp(logit - shift) over one column block, [rows] each.
struct RowSums {
  float* highest;
  float* shift;
  float* sum;
};

// A block's share of the loss and of the gradients of scale and bias.
struct SiglipSums {
  double loss = 0;
  double dscale = 0;
  double dbias = 0;
};

// The loops of one instruction set, for columns [begin, end), kBlockColumns at most.
struct ContrastiveKernels {
  void (*forward)(const ContrastiveForward& params, const RowSums& row_sums, int64_t begin, int64_t end);
  // Leaves the pairs and returns the share of the others in the sum of gradient * value.
  double (*backward)(const ContrastiveBackward& params, int64_t begin, int64_t end);
  SiglipSums (*siglip)(const SiglipTile& params, int64_t begin, int64_t end);
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
