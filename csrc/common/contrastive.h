// Parameters of the contrastive launchers: what is done to one tile of logits, which a matrix product has
// written and, backward, two others read.
#pragma once

#include <cstdint>

#include "common/dtype.h"

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

}  // namespace evakernels
