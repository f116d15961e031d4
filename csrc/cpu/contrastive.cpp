#include "include/contrastive.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "cpu/isa.h"
#include "cpu/rows.h"

namespace evakernels::cpu {
namespace {

// Calls body(block, begin column, end column) for the column blocks of a tile.
template <class Body>
void for_each_block(const LogitTile& tile, ParallelFor parallel_for, const Body& body) {
  const int64_t blocks = ceil_div(tile.columns, kBlockColumns);
  const int64_t grain = tasks_grain(tile.rows * std::min(kBlockColumns, tile.columns));
  run_parallel(parallel_for, blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kBlockColumns;
      body(block, first, std::min(first + kBlockColumns, tile.columns));
    }
  });
}

float log_sum_exp(float sum, float highest) {
  return std::log(sum) + (std::isfinite(highest) ? highest : 0.0f);
}

// Maxima ignore NaN; sums don't.
float maximum(float sum, float highest) { return std::isnan(sum) ? sum : highest; }

// Row sums per column block.
class BlockSums {
 public:
  explicit BlockSums(const LogitTile& tile)
      : rows_(tile.rows), blocks_(ceil_div(tile.columns, kBlockColumns)), values_(3 * rows_ * blocks_) {}

  RowSums of(int64_t block) {
    float* highest = values_.data() + 3 * block * rows_;
    return {highest, highest + rows_, highest + 2 * rows_};
  }

  void finish(int64_t row, float* row_lse, float* row_max) {
    float highest = -std::numeric_limits<float>::infinity();
    for (int64_t block = 0; block < blocks_; ++block) highest = std::max(highest, of(block).highest[row]);
    const float shift = std::isfinite(highest) ? highest : 0.0f;
    float total = 0;
    for (int64_t block = 0; block < blocks_; ++block) {
      const RowSums sums = of(block);
      total += sums.sum[row] * std::exp(sums.shift[row] - shift);
    }
    *row_lse = log_sum_exp(total, highest);
    *row_max = maximum(total, highest);
  }

 private:
  int64_t rows_;
  int64_t blocks_;
  std::vector<float> values_;
};

// Replaces the positives by their gradients, in float64: where the probability is almost 1, the terms cancel
// with dpositive. Returns the sum of gradient * value.
// With expm1, as exp of a double needs glibc 2.29, and the library promises 2.28.
double replace_pairs(const ContrastiveBackward& params, float scale) {
  const LogitTile& tile = params.tile;
  double total = 0;
  for (int64_t row = 0; row < tile.rows; ++row) {
    const int64_t column = tile.pair + row;
    float& value = tile.values[row * tile.columns + column];
    const double logit = value * scale;
    const double through_row = params.drow_lse[row] * (1 + std::expm1(logit - params.row_lse[row]));
    const double through_column = params.dcol_lse[column] * (1 + std::expm1(logit - params.col_lse[column]));
    const double gradient = through_row + through_column + params.dpositive[row];
    total += gradient * value;
    value = static_cast<float>(gradient * tile.scale);
  }
  return total;
}

}  // namespace

void contrastive_forward(const ContrastiveForward& params, Isa isa, ParallelFor parallel_for) {
  const ContrastiveKernels& kernels = EVAKERNELS_OF_ISA(isa, contrastive);
  const LogitTile& tile = params.tile;
  BlockSums sums(tile);
  for_each_block(tile, parallel_for, [&](int64_t block, int64_t begin, int64_t end) {
    kernels.forward(params, sums.of(block), begin, end);
  });
  for (int64_t row = 0; row < tile.rows; ++row) {
    sums.finish(row, params.row_lse + row, params.row_max + row);
    params.positive[row] = tile.values[row * tile.columns + tile.pair + row];
  }
  if (!params.is_last) return;
  for (int64_t i = 0; i < tile.columns; ++i) {
    const float sum = params.col_lse[i];
    params.col_lse[i] = log_sum_exp(sum, params.col_max[i]);
    params.col_max[i] = maximum(sum, params.col_max[i]);
  }
}

void contrastive_backward(const ContrastiveBackward& params, Isa isa, ParallelFor parallel_for) {
  const ContrastiveKernels& kernels = EVAKERNELS_OF_ISA(isa, contrastive);
  std::vector<double> sums(ceil_div(params.tile.columns, kBlockColumns));
  for_each_block(params.tile, parallel_for, [&](int64_t block, int64_t begin, int64_t end) {
    sums[block] = kernels.backward(params, begin, end);
  });
  const double total = std::accumulate(sums.begin(), sums.end(),
                                       replace_pairs(params, params.are_logits ? 1.0f : params.tile.scale));
  *params.dscale = static_cast<float>(params.are_logits ? total / params.tile.scale : total);
}

void siglip(const SiglipTile& params, Isa isa, ParallelFor parallel_for) {
  const ContrastiveKernels& kernels = EVAKERNELS_OF_ISA(isa, contrastive);
  std::vector<SiglipSums> sums(ceil_div(params.tile.columns, kBlockColumns));
  for_each_block(params.tile, parallel_for, [&](int64_t block, int64_t begin, int64_t end) {
    sums[block] = kernels.siglip(params, begin, end);
  });
  SiglipSums total;
  for (const SiglipSums& sum : sums) {
    total.loss += sum.loss;
    total.dscale += sum.dscale;
    total.dbias += sum.dbias;
  }
  *params.loss = static_cast<float>(total.loss);
  *params.dscale = static_cast<float>(total.dscale);
  *params.dbias = static_cast<float>(total.dbias);
}

}  // namespace evakernels::cpu
