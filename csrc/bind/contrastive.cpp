// Passes of the contrastive losses over a tile of logits on CPUs; Python code computes the tiles
// (evakernels/_logit_tiles.py). contrastive_logits.cpp has the operators for GPUs.
#include "include/contrastive.h"

#include "bind/binding.h"

namespace evakernels {
namespace {

LogitTile update_tile(Call& call, Input values_in, Input scale_in, int64_t pair) {
  const Array values = call.update(values_in, "values");
  const Array scale = call.read_float32(scale_in, "logit_scale");
  require_dtype(values, DType::Float32);
  require(values.sizes.size() == 2, "values must be [rows, columns], got ", text_of(values.sizes));
  require(product(scale.sizes) == 1, "logit_scale must have one element");
  const int64_t rows = values.sizes[0], columns = values.sizes[1];
  require(pair >= 0 && pair <= columns - rows, "pair must be 0 to ", std::to_string(columns - rows), ", got ",
          std::to_string(pair));
  return {values.floats(), rows, columns, pair, *scale.floats()};
}

// Elements [begin, begin + count) of a vector.
float* floats_of(const Array& vector, int64_t begin, int64_t count) {
  require_dtype(vector, DType::Float32);
  require(vector.sizes.size() == 1 && begin >= 0 && begin + count <= vector.sizes[0], vector.name,
          " must have at least ", std::to_string(begin + count), " elements, got ", text_of(vector.sizes));
  return vector.floats() + begin;
}

std::tuple<Tensor, Tensor, Tensor> contrastive_tile_statistics(Input values, Input logit_scale, int64_t pair,
                                                               Input col_lse, Input col_max, bool is_last) {
  Call call;
  const LogitTile tile = update_tile(call, values, logit_scale, pair);
  const ContrastiveForward params = {
      .tile = tile,
      .row_lse = call.output_floats("row_lse", tile.rows),
      .positive = call.output_floats("positive", tile.rows),
      .row_max = call.output_floats("row_max", tile.rows),
      .col_max = floats_of(call.update(col_max, "col_max"), 0, tile.columns),
      .col_lse = floats_of(call.update(col_lse, "col_lse"), 0, tile.columns),
      .is_last = is_last,
  };
  call.launch<cpu::contrastive_forward, nullptr>("contrastive_tile_statistics", params);
  return call.results<3>();
}

Tensor contrastive_tile_gradients(Input values, bool are_logits, Input logit_scale, int64_t first_row,
                                  int64_t offset, Input drow_lse, Input dcol_lse, Input dpositive,
                                  Input row_lse, Input col_lse) {
  Call call;
  const LogitTile tile = update_tile(call, values, logit_scale, first_row + offset);
  const ContrastiveBackward params = {
      .tile = tile,
      .drow_lse = floats_of(call.read(drow_lse, "drow_lse"), first_row, tile.rows),
      .dcol_lse = floats_of(call.read(dcol_lse, "dcol_lse"), 0, tile.columns),
      .dpositive = floats_of(call.read(dpositive, "dpositive"), first_row, tile.rows),
      .row_lse = floats_of(call.read(row_lse, "row_lse"), first_row, tile.rows),
      .col_lse = floats_of(call.read(col_lse, "col_lse"), 0, tile.columns),
      .dscale = call.output("dscale", {}, DType::Float32).floats(),
      .are_logits = are_logits,
  };
  call.launch<cpu::contrastive_backward, nullptr>("contrastive_tile_gradients", params);
  return call.results<1>();
}

std::tuple<Tensor, Tensor, Tensor> siglip_tile(Input values, Input logit_scale, Input logit_bias,
                                               int64_t pair, bool needs_grad) {
  Call call;
  const LogitTile tile = update_tile(call, values, logit_scale, pair);
  const Array bias = call.read_float32(logit_bias, "logit_bias");
  require(product(bias.sizes) == 1, "logit_bias must have one element");
  const SiglipTile params = {
      .tile = tile,
      .loss = call.output("loss", {}, DType::Float32).floats(),
      .dscale = call.output("dscale", {}, DType::Float32).floats(),
      .dbias = call.output("dbias", {}, DType::Float32).floats(),
      .bias = *bias.floats(),
      .needs_grad = needs_grad,
  };
  call.launch<cpu::siglip, nullptr>("siglip_tile", params);
  return call.results<3>();
}

}  // namespace

EVAKERNELS_CPU_OPS(contrastive, m) {
  EVAKERNELS_OP(m, contrastive_tile_statistics);
  EVAKERNELS_OP(m, contrastive_tile_gradients);
  EVAKERNELS_OP(m, siglip_tile);
}

}  // namespace evakernels
