// Passes of the contrastive losses over a tile of logits on CPUs; Python code computes the tiles
// (evakernels/_logit_tiles.py). contrastive_logits.cpp has the operators for GPUs.
#include "include/contrastive.h"

#include "bind/binding.h"

namespace evakernels {
namespace {

// The tile of images `first_row` and on; the caption of image i is offset + i.
LogitTile tile_of(const Array& logits, int64_t first_row, int64_t offset) {
  require_dtype(logits, DType::Float32);
  require(logits.sizes.size() == 2, "logits must be [rows, columns], got ", text_of(logits.sizes));
  const int64_t rows = logits.sizes[0], columns = logits.sizes[1], pair = first_row + offset;
  require(pair >= 0 && pair <= columns - rows, "first_row + offset must be 0 to ",
          std::to_string(columns - rows), ", got ", std::to_string(pair));
  return {logits.floats(), rows, columns, pair};
}

// Elements [begin, begin + count) of a vector.
float* floats_of(const Array& vector, int64_t begin, int64_t count) {
  require_dtype(vector, DType::Float32);
  require(vector.sizes.size() == 1 && begin >= 0 && begin + count <= vector.sizes[0], vector.name,
          " must have at least ", std::to_string(begin + count), " elements, got ", text_of(vector.sizes));
  return vector.floats() + begin;
}

void contrastive_tile_statistics(Call& call, Input logits, int64_t first_row, int64_t offset, Input row_lse,
                                 Input positive, Input row_max, Input col_lse, Input col_max, bool is_last) {
  const LogitTile tile = tile_of(call.read(logits, "logits"), first_row, offset);
  const ContrastiveForward params = {
      .tile = tile,
      .row_lse = floats_of(call.update(row_lse, "row_lse"), first_row, tile.rows),
      .row_max = floats_of(call.update(row_max, "row_max"), first_row, tile.rows),
      .positive = floats_of(call.update(positive, "positive"), first_row, tile.rows),
      .col_max = floats_of(call.update(col_max, "col_max"), 0, tile.columns),
      .col_lse = floats_of(call.update(col_lse, "col_lse"), 0, tile.columns),
      .is_last = is_last,
  };
  call.launch<cpu::contrastive_forward, nullptr>("contrastive_tile_statistics", params);
}

void contrastive_tile_gradients(Call& call, Input logits, int64_t first_row, int64_t offset, Input drow_lse,
                                Input dcol_lse, Input dpositive, Input row_lse, Input col_lse) {
  const LogitTile tile = tile_of(call.update(logits, "logits"), first_row, offset);
  const ContrastiveBackward params = {
      .tile = tile,
      .drow_lse = floats_of(call.read(drow_lse, "drow_lse"), first_row, tile.rows),
      .dcol_lse = floats_of(call.read(dcol_lse, "dcol_lse"), 0, tile.columns),
      .dpositive = floats_of(call.read(dpositive, "dpositive"), first_row, tile.rows),
      .row_lse = floats_of(call.read(row_lse, "row_lse"), first_row, tile.rows),
      .col_lse = floats_of(call.read(col_lse, "col_lse"), 0, tile.columns),
  };
  call.launch<cpu::contrastive_backward, nullptr>("contrastive_tile_gradients", params);
}

void siglip_tile(Call& call, Input logits, int64_t offset, Input logit_bias, bool needs_grad,
                 Output sums_out) {
  const LogitTile tile = tile_of(call.update(logits, "logits"), 0, offset);
  const Array bias = call.read_float32(logit_bias, "logit_bias");
  require(product(bias.sizes) == 1, "logit_bias must have one element");
  const int64_t blocks = (tile.columns + cpu::kBlockColumns - 1) / cpu::kBlockColumns;
  const int64_t sizes[] = {1 + needs_grad, blocks};
  float* const sums = call.output(sums_out, "sums", sizes, DType::Float32).floats();
  const SiglipTile params = {
      .tile = tile,
      .losses = sums,
      .dbias = sums + blocks,
      .bias = *bias.floats(),
      .needs_grad = needs_grad,
  };
  call.launch<cpu::siglip, nullptr>("siglip_tile", params);
}

}  // namespace

EVAKERNELS_CPU_OPS(contrastive, m) {
  EVAKERNELS_OP(m, contrastive_tile_statistics);
  EVAKERNELS_OP(m, contrastive_tile_gradients);
  EVAKERNELS_OP(m, siglip_tile);
}

}  // namespace evakernels
