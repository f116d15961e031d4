// The forward of token_dropout where the channels of a patch lie side by side: one warp copies a row, adding
// the position's embedding on the way.
#include <numeric>

#include "cuda/norm_plan.h"
#include "cuda/token_dropout.cuh"
#include "include/token_dropout.h"

namespace evakernels::cuda {
namespace {

constexpr int kRows = 8;    // of a block
constexpr int kBlocks = 4;  // of a multiprocessor, at least; for more of them the compiler would spill
constexpr int kAtOnce = 4;  // vectors of a thread that are on their way together

template <class Types, int E>
__device__ __forceinline__ void write_prefix(const TokenDropoutForward& params, int64_t row,
                                             typename Types::Out* out) {
  const int64_t channels = params.shape.channels;
  for (int64_t channel = threadIdx.x * E; channel < channels; channel += kWarpSize * E) {
    float values[E];
    load_floats(params.prefix, params.prefix_dtype, row * channels + channel, values);
    add_position<typename Types::Position>(params, row, channel, values);
    Packed<typename Types::Out, E>::pack(values).store_whole(out + channel);
  }
}

template <class Types, int E>
__device__ __forceinline__ void write_token(const TokenDropoutForward& params,
                                            const typename Types::Patch* patch, int64_t position,
                                            typename Types::Out* out) {
  const int64_t channels = params.shape.channels;
  constexpr int kStep = kWarpSize * E;
  for (int64_t first = threadIdx.x * E; first < channels; first += kAtOnce * kStep) {
    Packed<typename Types::Patch, E> packed[kAtOnce];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int64_t channel = first + n * kStep;
      if (channel < channels) packed[n] = Packed<typename Types::Patch, E>::load_once(patch + channel);
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int64_t channel = first + n * kStep;
      if (channel >= channels) continue;
      float values[E];
      packed[n].unpack(values);
      add_position<typename Types::Position>(params, position, channel, values);
      Packed<typename Types::Out, E>::pack(values).store_whole(out + channel);
    }
  }
}

template <class Types, int E>
__global__ void __launch_bounds__(kRows* kWarpSize, kBlocks)
    token_rows_kernel(const TokenDropoutForward params) {
  const TokenDropoutShape& shape = params.shape;
  const int64_t rows = shape.prefix_tokens + shape.kept_tokens;
  const int64_t row = int64_t{blockIdx.x} * kRows + threadIdx.y;
  if (row >= rows) return;
  for (int64_t sample = blockIdx.y; sample < shape.batch; sample += gridDim.y) {
    auto* const out = static_cast<typename Types::Out*>(params.out) + (sample * rows + row) * shape.channels;
    if (row < shape.prefix_tokens) {
      write_prefix<Types, E>(params, row, out);
      continue;
    }
    const int64_t token = kept_token(params, sample, row - shape.prefix_tokens);
    if (token < 0) continue;
    const auto* const patch = static_cast<const typename Types::Patch*>(params.patches.data) +
                              sample * params.patches.sample_stride + token * params.patches.token_stride;
    write_token<Types, E>(params, patch, shape.prefix_tokens + token, out);
  }
}

}  // namespace

Error token_dropout_forward_rows(const TokenDropoutForward& params, Stream stream) {
  const TokenDropoutShape& shape = params.shape;
  const PatchTensor& patches = params.patches;
  const int64_t step = std::gcd(shape.channels, std::gcd(patches.sample_stride, patches.token_stride));
  const std::vector<Buffer> buffers = {{patches.data, patches.dtype},
                                       {params.prefix, params.prefix_dtype},
                                       {params.pos_embed, params.pos_embed_dtype},
                                       {params.out, params.out_dtype}};
  const int64_t blocks = ceil_div(shape.prefix_tokens + shape.kept_tokens, kRows);
  const dim3 grid = {static_cast<unsigned>(blocks), static_cast<unsigned>(std::min(shape.batch, kMostInY)),
                     1};
  return with_token_types(params, [&](auto types) {
    using Types = decltype(types);
    constexpr int kWide = Types::kCommon ? kWidestVector<typename Types::Out> : 1;
    return with_elements<kWide>(aligned_elements(kWide, step, buffers), [&](auto elements) {
      return launch(token_rows_kernel<Types, elements()>, grid, {kWarpSize, kRows, 1}, stream, params);
    });
  });
}

Error token_dropout_forward(const TokenDropoutForward& params, Stream stream) {
  const TokenDropoutShape& shape = params.shape;
  if (shape.batch == 0 || shape.channels == 0 || shape.prefix_tokens + shape.kept_tokens == 0) return nullptr;
  return params.patches.channel_stride == 1 ? token_dropout_forward_rows(params, stream)
                                            : token_dropout_forward_tiles(params, stream);
}

}  // namespace evakernels::cuda
