// Backward of token_dropout. A first kernel inverts token_index, so that every row of the gradients is
// written once, without clearing or atomics.
//
// A block has one position of all samples and a part of the channels, and therefore all terms of the position
// embedding's gradient.
#include "cuda/norm_plan.h"
#include "include/token_dropout.h"

namespace evakernels::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kAtOnce = 4;  // rows in flight per warp
constexpr int kThreads = 256;

// place: [batch, tokens], a token's index among the kept tokens of its sample, -1 if it was dropped.
__global__ void __launch_bounds__(kThreads)
    token_places_kernel(const int64_t* token_index, const TokenDropoutShape shape, int32_t* place) {
  int32_t* const places = place + blockIdx.x * shape.tokens;
  const int64_t* const index = token_index + blockIdx.x * shape.kept_tokens;
  const auto is_token = [&](int64_t token) { return token >= 0 && token < shape.tokens; };
  for (int64_t token = threadIdx.x; token < shape.tokens; token += kThreads) places[token] = -1;  // #dropped
  __syncthreads();
  for (int64_t i = threadIdx.x; i < shape.kept_tokens; i += kThreads) {
    if (!is_token(index[i])) fail_launch("token_dropout", "token_index is out of range");
    if (is_token(index[i])) places[index[i]] = static_cast<int32_t>(i);
  }
  __syncthreads();  // #places
  for (int64_t i = threadIdx.x; i < shape.kept_tokens; i += kThreads) {
    if (is_token(index[i]) && places[index[i]] != i)
      fail_launch("token_dropout", "token_index names a token twice");
  }
}

// The sample's row of dout at a position; -1 if the token was dropped.
__device__ __forceinline__ int64_t row_of(const TokenDropoutShape& shape, const int32_t* place,
                                          int64_t sample, int64_t position) {
  if (position < shape.prefix_tokens) return position;
  const int64_t token = position - shape.prefix_tokens;
  const int64_t in_order = token < shape.kept_tokens ? token : -1;
  const int64_t i = place ? place[sample * shape.tokens + token] : in_order;
  return i < 0 ? -1 : shape.prefix_tokens + i;
}

template <int E>
struct WarpSums {
  float sums[kWarps][E][kWarpSize];
};

// Adds the warps' partial sums up in the first warp.
template <int E>
__device__ __forceinline__ void add_warps(float (&sums)[E]) {
  WarpSums<E>& scratch = shared_memory<WarpSums<E>>();
#pragma unroll
  for (int i = 0; i < E; ++i) scratch.sums[threadIdx.y][i][threadIdx.x] = sums[i];
  __syncthreads();  // #sums-of-samples
  if (threadIdx.y > 0) return;
  for (int warp = 1; warp < kWarps; ++warp) {
#pragma unroll
    for (int i = 0; i < E; ++i) sums[i] += scratch.sums[warp][i][threadIdx.x];
  }
}

template <class T, int E>
__global__ void __launch_bounds__(kWarpSize* kWarps)
    token_dropout_backward_kernel(const TokenDropoutBackward params, const int32_t* place) {
  const TokenDropoutShape& shape = params.shape;
  const int64_t rows = shape.prefix_tokens + shape.kept_tokens;
  const int64_t position = blockIdx.x, token = position - shape.prefix_tokens;
  const int64_t channel = (int64_t{blockIdx.y} * kWarpSize + threadIdx.x) * E;
  const bool is_patch = token >= 0, inside = channel < shape.channels;
  const bool is_summed = params.dpos_embed || (!is_patch && params.dprefix);
  if (!is_summed && !is_patch) return;
  float sums[E] = {};
  for (int64_t first = threadIdx.y; first < shape.batch && inside; first += kAtOnce * kWarps) {
    Packed<T, E> gradients[kAtOnce];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int64_t sample = first + n * kWarps;
      gradients[n] = {};
      if (sample >= shape.batch) continue;
      const int64_t row = row_of(shape, place, sample, position);
      if (row < 0) continue;
      gradients[n] = Packed<T, E>::load_once(static_cast<const T*>(params.dout) +
                                             (sample * rows + row) * shape.channels + channel);
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int64_t sample = first + n * kWarps;
      if (sample >= shape.batch) continue;
      if (is_patch && params.dpatches) {
        gradients[n].store_vector(static_cast<T*>(params.dpatches) +
                                  (sample * shape.tokens + token) * shape.channels + channel);
      }
      float values[E];
      gradients[n].unpack(values);
#pragma unroll
      for (int i = 0; i < E; ++i) sums[i] += values[i];
    }
  }
  if (!is_summed) return;
  add_warps(sums);
  if (threadIdx.y > 0 || !inside) return;
  const int64_t target = position * shape.channels + channel;
  const auto total = Packed<T, E>::pack(sums);
  if (!is_patch && params.dprefix) total.store_vector(static_cast<T*>(params.dprefix) + target);
  if (params.dpos_embed) total.store_vector(static_cast<T*>(params.dpos_embed) + target);
}

// `place` stays null without an index.
Error find_places(const TokenDropoutBackward& params, Scratch& scratch, Stream stream, int32_t** place) {
  const int64_t size = params.shape.batch * params.shape.tokens;
  if (!params.token_index || params.shape.batch == 0) return nullptr;
  static_assert(sizeof(int32_t) == sizeof(float));
  if (const Error error = scratch.allocate(reinterpret_cast<float**>(place), size)) return error;
  const dim3 grid = {static_cast<unsigned>(params.shape.batch), 1, 1};
  return launch(token_places_kernel, grid, {kThreads, 1, 1}, stream, params.token_index, params.shape,
                *place);
}

}  // namespace

Error token_dropout_backward(const TokenDropoutBackward& params, Scratch& scratch, Stream stream) {
  const TokenDropoutShape& shape = params.shape;
  const bool prefix_only = !params.dpatches && !params.dpos_embed;
  const int64_t positions = shape.prefix_tokens + (prefix_only ? 0 : shape.tokens);
  if (positions == 0 || shape.channels == 0) return nullptr;
  int32_t* place = nullptr;
  if (const Error error = find_places(params, scratch, stream, &place)) return error;
  const std::vector<Buffer> buffers = {{params.dout, params.dtype},
                                       {params.dpatches, params.dtype},
                                       {params.dprefix, params.dtype},
                                       {params.dpos_embed, params.dtype}};
  return with_element_type(params.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kWide = kWidestVector<T>;
    return with_elements<kWide>(aligned_elements(kWide, shape.channels, buffers), [&](auto elements) {
      constexpr int kChannels = kWarpSize * elements();
      const dim3 grid = {static_cast<unsigned>(positions),
                         static_cast<unsigned>(ceil_div(shape.channels, kChannels)), 1};
      return launch(token_dropout_backward_kernel<T, elements()>, grid, {kWarpSize, kWarps, 1}, stream,
                    params, static_cast<const int32_t*>(place));
    });
  });
}

}  // namespace evakernels::cuda
