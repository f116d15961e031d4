// The forward of token_dropout: copies the kept patches, adding position embeddings, after the prefix.
//
// Patches with contiguous channels: one warp copies a row of out. Channels with contiguous patches, as a
// convolution writes them: a block transposes a tile in shared memory.
#include <algorithm>
#include <numeric>

#include "cuda/norm_plan.h"
#include "include/token_dropout.h"

namespace evakernels::cuda {
namespace {

constexpr int64_t kMostInY = 65'535;  // of gridDim.y and z

// Element types of out, pos_embed and patches. kCommon mixes get vectorised kernels.
template <class O, class P, class T>
struct TokenTypes {
  using Out = O;
  using Position = P;
  using Patch = T;
  static constexpr bool kCommon = std::is_same_v<O, P> && (std::is_same_v<O, T> || std::is_same_v<O, float>);
};

template <class Body>
Error with_token_types(const TokenDropoutForward& params, const Body& body) {
  return with_element_type(params.out_dtype, [&](auto out) {
    using O = decltype(out);
    // The result has the widest dtype of the inputs, so all inputs of a 16-bit result have its dtype.
    if constexpr (sizeof(O) == 2) {
      return body(TokenTypes<O, O, O>{});
    } else {
      return with_element_type(params.pos_embed_dtype, [&](auto position) {
        return with_element_type(params.patches.dtype, [&](auto patch) {
          return body(TokenTypes<O, decltype(position), decltype(patch)>{});
        });
      });
    }
  });
}

// The i-th kept token of a sample; -1 and an error if it is out of range.
__device__ __forceinline__ int64_t kept_token(const TokenDropoutForward& params, int64_t sample, int64_t i) {
  if (!params.token_index) return i;
  const int64_t token = params.token_index[sample * params.shape.kept_tokens + i];
  const bool exists = token >= 0 && token < params.shape.tokens;
  if (!exists) fail_launch("token_dropout", "token_index is out of range");
  return exists ? token : -1;
}

// Adds the position embedding, if any, to channels [channel, channel + E).
template <class P, int E>
__device__ __forceinline__ void add_position(const TokenDropoutForward& params, int64_t position,
                                             int64_t channel, float (&values)[E]) {
  if (!params.pos_embed) return;
  float embedding[E];
  load_floats(static_cast<const P*>(params.pos_embed) + position * params.shape.channels + channel,
              embedding);
#pragma unroll
  for (int i = 0; i < E; ++i) values[i] += embedding[i];
}

// --- contiguous channels ---

constexpr int kRowsOfBlock = 8;
constexpr int kBlocks = 4;  // minimum per SM; with more, kernels would spill
constexpr int kAtOnce = 4;  // vectors in flight per thread

template <class Types, int E>
__device__ __forceinline__ void write_prefix(const TokenDropoutForward& params, int64_t row,
                                             typename Types::Out* out) {
  const int64_t channels = params.shape.channels;
  for (int64_t channel = threadIdx.x * E; channel < channels; channel += kWarpSize * E) {
    float values[E];
    load_floats(params.prefix, params.prefix_dtype, row * channels + channel, values);
    add_position<typename Types::Position>(params, row, channel, values);
    Packed<typename Types::Out, E>::pack(values).store_vector(out + channel);
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
      Packed<typename Types::Out, E>::pack(values).store_vector(out + channel);
    }
  }
}

template <class Types, int E>
__global__ void __launch_bounds__(kRowsOfBlock* kWarpSize, kBlocks)
    token_rows_kernel(const TokenDropoutForward params) {
  const TokenDropoutShape& shape = params.shape;
  const int64_t rows = shape.prefix_tokens + shape.kept_tokens;
  const int64_t row = int64_t{blockIdx.x} * kRowsOfBlock + threadIdx.y;
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

// --- contiguous patches ---

constexpr int kTileRows = kWarpSize;  // of out
constexpr int kWarps = 8;

// E channels per lane. Rows are padded by a word, so that neither access has bank conflicts.
template <class T, int E>
struct Tile {
  static constexpr int kChannels = kWarpSize * E;
  alignas(4) T values[kTileRows][kChannels + 4 / sizeof(T)];
};

// Reads along the tokens, one per lane.
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
  const int64_t first_row = int64_t{blockIdx.x} * kTileRows;
  const int64_t first_channel = int64_t{blockIdx.y} * Tile<T, E>::kChannels;
  const int64_t channel = first_channel + threadIdx.x * E;
  for (int64_t sample = blockIdx.z; sample < shape.batch; sample += gridDim.z) {
    // Prefix rows have no token.
    const int64_t lane_row = first_row + threadIdx.x;
    const bool kept = lane_row >= shape.prefix_tokens && lane_row < rows;
    const int64_t lane_token = kept ? kept_token(params, sample, lane_row - shape.prefix_tokens) : -1;
    if (lane_token >= 0) {
      const T* const patches = static_cast<const T*>(params.patches.data) +
                               sample * params.patches.sample_stride +
                               lane_token * params.patches.token_stride;
      fill<T, E>(tile, patches, params.patches.channel_stride, channels, first_channel);
    }
    __syncthreads();  // #tile

    for (int i = threadIdx.y; i < kTileRows; i += kWarps) {
      const int64_t row = first_row + i;
      const int64_t token = __shfl_sync(kFullMask, lane_token, i);
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
      Packed<O, E>::pack(values).store_vector(out);
    }
    __syncthreads();
  }
}

Error launch_rows(const TokenDropoutForward& params, Stream stream) {
  const TokenDropoutShape& shape = params.shape;
  const PatchTensor& patches = params.patches;
  const int64_t step = std::gcd(shape.channels, std::gcd(patches.sample_stride, patches.token_stride));
  const std::vector<Buffer> buffers = {{patches.data, patches.dtype},
                                       {params.prefix, params.prefix_dtype},
                                       {params.pos_embed, params.pos_embed_dtype},
                                       {params.out, params.out_dtype}};
  const int64_t blocks = ceil_div(shape.prefix_tokens + shape.kept_tokens, kRowsOfBlock);
  const dim3 grid = {static_cast<unsigned>(blocks), static_cast<unsigned>(std::min(shape.batch, kMostInY)),
                     1};
  return with_token_types(params, [&](auto types) {
    using Types = decltype(types);
    constexpr int kWide = Types::kCommon ? kWidestVector<typename Types::Out> : 1;
    return with_elements<kWide>(aligned_elements(kWide, step, buffers), [&](auto elements) {
      return launch(token_rows_kernel<Types, elements()>, grid, {kWarpSize, kRowsOfBlock, 1}, stream, params);
    });
  });
}

Error launch_tiles(const TokenDropoutForward& params, Stream stream) {
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
      const dim3 grid = {static_cast<unsigned>(ceil_div(rows, kTileRows)),
                         static_cast<unsigned>(ceil_div(shape.channels, kChannels)),
                         static_cast<unsigned>(std::min(shape.batch, kMostInY))};
      return launch(token_tiles_kernel<Types, elements()>, grid, {kWarpSize, kWarps, 1}, stream, params);
    });
  });
}

}  // namespace

Error token_dropout_forward(const TokenDropoutForward& params, Stream stream) {
  const TokenDropoutShape& shape = params.shape;
  if (shape.batch == 0 || shape.channels == 0 || shape.prefix_tokens + shape.kept_tokens == 0) return nullptr;
  return params.patches.channel_stride == 1 ? launch_rows(params, stream) : launch_tiles(params, stream);
}

}  // namespace evakernels::cuda
