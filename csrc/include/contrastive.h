// Parameters of the contrastive launchers. Each works on one tile of logits, the output of a matmul; in the
// backward pass two matmuls read the tile.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa_namespaces.h"
#include "cpu/parallel.h"

namespace evakernels {

// Logits of `rows` images and all texts. The pair of row i stands in column pair + i.
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
  LogitTile tile;          // becomes the gradient of the logits
  const float* drow_lse;   // [rows]
  const float* dcol_lse;   // [columns]
  const float* dpositive;  // [rows]
  const float* row_lse;    // [rows]
  const float* col_lse;    // [columns]
};

struct SiglipTile {
  LogitTile tile;  // becomes the gradient of the logits, where that is wanted
  float bias;
};

// Of a tile: its share of the loss and of the bias's gradient.
struct SiglipSums {
  double loss = 0;
  double dbias = 0;
};

// Rows of image features on their way into the matrix product and back.
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

// Each makes one pass over a tile of logits. Results depend on the shapes alone, never on the number of
// threads.
void contrastive_forward(const ContrastiveForward& params, Isa isa, ParallelFor parallel_for);

// Turns the columns' sums into their log-sum-exps, when every tile has been seen.
void finish_columns(const float* col_sum, float* col_max, float* col_lse, int64_t columns);

void contrastive_backward(const ContrastiveBackward& params, Isa isa, ParallelFor parallel_for);

// Without a gradient.
SiglipSums siglip_value(const SiglipTile& params, Isa isa, ParallelFor parallel_for);

// Overwrites the logits with their gradient.
SiglipSums siglip_forward(const SiglipTile& params, Isa isa, ParallelFor parallel_for);

// scaled = scale * image.
void scale_image(const ImageRows& params, Isa isa, ParallelFor parallel_for);

// dimage = scale * scaled, and the dot products that the gradient of the scale is the sum of.
void finish_image(const ImageRows& params, Isa isa, ParallelFor parallel_for);

// A tile is worked on in blocks that the L2 cache holds (256 KiB): each is read from memory once and then
// again from the cache.
constexpr int64_t kBlockColumns = 512;
constexpr int64_t kBlockRows = 128;

// Of one column block and every row of the tile: the sum of exp(logit - shift), [rows] each.
struct RowSums {
  float* highest;
  float* shift;
  float* sum;
};

// The loops of the contrastive losses: one table of functions for each instruction set.
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

}  // namespace evakernels
