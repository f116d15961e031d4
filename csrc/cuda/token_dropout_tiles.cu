// The forward of token_dropout where the patches of a channel lie side by side, as a convolution leaves them.
// A block transposes a tile in shared memory: it reads along the tokens and writes along the channels.
#include "cuda/norm_plan.h"
#include "cuda/token_dropout.cuh"
#include "include/token_dropout.h"

namespace evakernels::cuda {
namespace {

constexpr int kRows = kWarpSize;  // of out
constexpr int kWarps = 8;
constexpr int kBlocks = 4;  // of a multiprocessor, at least; for more of them the compiler would spill

// E channels a lane. One word more a row than there are channels: then neither way do lanes of a warp meet in
// one bank.
template <class T, int E>
struct Tile {
  static constexpr int kChannels = kWarpSize * E;
  alignas(4) T values[kRows][kChannels + 4 / sizeof(T)];
};

// Reads along the tokens, a lane each.
template <class T, int E>
__device__ __forceinline__ void fill(Tile<T, E>& tile, const T* patches, int64_t channel_stride,
                                     int64_t channels, int64_t first_channel) {
  constexpr int kAtOnce = Tile<T, E>::kChannels / kWarps;
  Packed<T, 1> held[kAtOnce];
  const T* const from = patches + first_channel * channel_stride;
#pragma unroll
  for (int n = 0; n < kAtOnce; ++n) {
    const int c = threadIdx.y + n * kWarps;
    if (first_channel + c < channels) held[n] = Packed<T, 1>::load_once(from + c * channel_stride);
  }
#pragma unroll
  for (int n = 0; n < kAtOnce; ++n) {
    const int c = threadIdx.y + n * kWarps;
    if (first_channel + c < channels) held[n].store(&tile.values[threadIdx.x][c]);
  }
}

template <class Types, int E>
__global__ void __launch_bounds__(kWarps* kWarpSize, kBlocks)
    token_tiles_kernel(const TokenDropoutForward params) {
  using T = typename Types::Patch;
  using O = typename Types::Out;
  Tile<T, E>& tile = shared_memory<Tile<T, E>>();
  const TokenDropoutShape& shape = params.shape;
  const int64_t rows = shape.prefix_tokens + shape.kept_tokens, channels = shape.channels;
  const int64_t first_row = int64_t{blockIdx.x} * kRows;
  const int64_t first_channel = int64_t{blockIdx.y} * Tile<T, E>::kChannels;
  const int64_t channel = first_channel + threadIdx.x * E;
  for (int64_t sample = blockIdx.z; sample < shape.batch; sample += gridDim.z) {
    // Rows of the prefix have no token.
    const int64_t lane_row = first_row + threadIdx.x;
    const bool kept = lane_row >= shape.prefix_tokens && lane_row < rows;
    const int64_t lane_token = kept ? kept_token(params, sample, lane_row - shape.prefix_tokens) : -1;
    if (lane_token >= 0) {
      const T* const patches = static_cast<const T*>(params.patches.data) +
                               sample * params.patches.sample_stride +
                               lane_token * params.patches.token_stride;
      fill<T, E>(tile, patches, params.patches.channel_stride, channels, first_channel);
    }
    __syncthreads();

    for (int i = threadIdx.y; i < kRows; i += kWarps) {
      const int64_t row = first_row + i;
      const int64_t token = __shfl_sync(kWholeWarp, lane_token, i);
      const bool is_prefix = row < shape.prefix_tokens;
      if (row >= rows || channel >= channels || (!is_prefix && token < 0)) continue;
      float values[E];
      if (is_prefix) {
        load_floats(params.prefix, params.prefix_dtype, row * channels + channel, values);
      } else {
        load_floats(&tile.values[i][threadIdx.x * E], values);
      }
      const int64_t position = is_prefix ? row : shape.prefix_tokens + token;
      add_position<typename Types::Position>(params, position, channel, values);
      O* const out = static_cast<O*>(params.out) + (sample * rows + row) * channels + channel;
      Packed<O, E>::pack(values).store_whole(out);
    }
    __syncthreads();
  }
}

}  // namespace

Error token_dropout_forward_tiles(const TokenDropoutForward& params, Stream stream) {
  const TokenDropoutShape& shape = params.shape;
  const int64_t rows = shape.prefix_tokens + shape.kept_tokens;
  const std::vector<Buffer> buffers = {{params.prefix, params.prefix_dtype},
                                       {params.pos_embed, params.pos_embed_dtype},
                                       {params.out, params.out_dtype}};
  return with_token_types(params, [&](auto types) {
    using Types = decltype(types);
    constexpr int kPair = Types::kCommon && sizeof(typename Types::Patch) == 2 ? 2 : 1;
    return with_elements<kPair>(aligned_elements(kPair, shape.channels, buffers), [&](auto elements) {
      constexpr int kChannels = Tile<typename Types::Patch, elements()>::kChannels;
      const dim3 grid = {static_cast<unsigned>(ceil_div(rows, kRows)),
                         static_cast<unsigned>(ceil_div(shape.channels, kChannels)),
                         static_cast<unsigned>(std::min(shape.batch, kMostInY))};
      return launch(token_tiles_kernel<Types, elements()>, grid, {kWarpSize, kWarps, 1}, stream, params);
    });
  });
}

}  // namespace evakernels::cuda
