#include "include/token_dropout.h"

#include <stdexcept>
#include <vector>

#include "cpu/isa.h"
#include "cpu/rows.h"

namespace evakernels::cpu {
namespace {

void require_token(int64_t token, const TokenDropoutShape& shape) {
  if (token < 0 || token >= shape.tokens) throw std::invalid_argument("token_index is out of range");
}

// [batch, tokens]: a token's index among the kept tokens of its sample, -1 if it was dropped. Empty without
// token_index.
std::vector<int32_t> places(const int64_t* token_index, const TokenDropoutShape& shape) {
  if (token_index == nullptr) return {};
  std::vector<int32_t> place(shape.batch * shape.tokens, -1);
  for (int64_t sample = 0; sample < shape.batch; ++sample) {
    int32_t* sample_places = place.data() + sample * shape.tokens;
    for (int64_t i = 0; i < shape.kept_tokens; ++i) {
      const int64_t token = token_index[sample * shape.kept_tokens + i];
      require_token(token, shape);
      if (sample_places[token] >= 0) throw std::invalid_argument("token_index names a token twice");
      sample_places[token] = static_cast<int32_t>(i);
    }
  }
  return place;
}

}  // namespace

void token_dropout_forward(const TokenDropoutForward& params, Isa isa, ParallelFor parallel_for) {
  const TokenDropoutKernels& kernels = EVAKERNELS_OF_ISA(isa, token_dropout);
  const TokenDropoutShape& shape = params.shape;
  const int64_t indices = params.token_index ? shape.batch * shape.kept_tokens : 0;
  for (int64_t i = 0; i < indices; ++i) require_token(params.token_index[i], shape);
  const FloatVector prefix(params.prefix, params.prefix_dtype, shape.prefix_tokens * shape.channels, 0.0f);
  if (params.patches.channel_stride == 1) {
    const int64_t rows = shape.batch * (shape.prefix_tokens + shape.kept_tokens);
    run_parallel(parallel_for, rows, tasks_grain(shape.channels), [&](int64_t begin, int64_t end) {
      kernels.forward_rows(params, prefix.data(), begin, end);
    });
    return;
  }
  const int64_t tiles = shape.batch * ceil_div(shape.channels, kTileChannels);
  const int64_t tile_size = shape.kept_tokens * kTileChannels;
  run_parallel(parallel_for, tiles, tasks_grain(tile_size), [&](int64_t begin, int64_t end) {
    AlignedFloats scratch(tile_size);
    kernels.forward_tiles(params, prefix.data(), scratch.data(), begin, end);
  });
}

void token_dropout_backward(const TokenDropoutBackward& params, Isa isa, ParallelFor parallel_for) {
  const TokenDropoutKernels& kernels = EVAKERNELS_OF_ISA(isa, token_dropout);
  const TokenDropoutShape& shape = params.shape;
  const std::vector<int32_t> place = places(params.token_index, shape);
  const bool prefix_only = params.dpatches == nullptr && params.dpos_embed == nullptr;
  const int64_t positions = shape.prefix_tokens + (prefix_only ? 0 : shape.tokens);
  const int64_t grain = tasks_grain(shape.batch * shape.channels);
  run_parallel(parallel_for, positions, grain, [&](int64_t begin, int64_t end) {
    AlignedFloats sums(kSumPositions * shape.channels);
    kernels.backward(params, params.token_index ? place.data() : nullptr, sums.data(), begin, end);
  });
}

}  // namespace evakernels::cpu
