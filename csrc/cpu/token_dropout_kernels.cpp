// Compiled once for each instruction set.
#include "cpu/simd.h"
#include "include/token_dropout.h"

namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE {
namespace {

// Channels [channel, channel + count) of a row of out.
struct Segment {
  int64_t channel;
  int64_t count;
};

template <class P>
const P* position_row(const TokenDropoutForward& params, int64_t position) {
  return static_cast<const P*>(params.pos_embed) + position * params.shape.channels;
}

template <class T>
T* out_row(const TokenDropoutForward& params, int64_t sample, int64_t row) {
  const TokenDropoutShape& shape = params.shape;
  const int64_t rows = shape.prefix_tokens + shape.kept_tokens;
  return static_cast<T*>(params.out) + (sample * rows + row) * shape.channels;
}

int64_t kept_token(const TokenDropoutForward& params, int64_t sample, int64_t i) {
  return params.token_index ? params.token_index[sample * params.shape.kept_tokens + i] : i;
}

// Element types: O of out, P of pos_embed, T of the patches.
template <class O, class P, class T>
void write_segment(O* out, const T* token, const P* position, int64_t count) {
  if (position == nullptr) {
    for_each_vector(count, [&](int64_t i, auto part) { store(out + i, load(token + i, part), part); });
    return;
  }
  for_each_vector(count, [&](int64_t i, auto part) {
    store(out + i, load(token + i, part) + load(position + i, part), part);
  });
}

template <class O, class P, class T>
void write_position(const TokenDropoutForward& params, O* out, const T* token, int64_t position,
                    Segment segment) {
  const P* addend = params.pos_embed ? position_row<P>(params, position) + segment.channel : nullptr;
  write_segment(out + segment.channel, token, addend, segment.count);
}

template <class O, class P, class T>
void write_rows(const TokenDropoutForward& params, const float* prefix, int64_t begin, int64_t end) {
  const TokenDropoutShape& shape = params.shape;
  const PatchTensor& patches = params.patches;
  const int64_t rows = shape.prefix_tokens + shape.kept_tokens;
  const Segment whole = {0, shape.channels};
  for (int64_t n = begin; n < end; ++n) {
    const int64_t sample = n / rows, row = n % rows;
    O* out = out_row<O>(params, sample, row);
    if (row < shape.prefix_tokens) {
      write_position<O, P>(params, out, prefix + row * shape.channels, row, whole);
      continue;
    }
    const int64_t token = kept_token(params, sample, row - shape.prefix_tokens);
    const T* patch =
        static_cast<const T*>(patches.data) + sample * patches.sample_stride + token * patches.token_stride;
    write_position<O, P>(params, out, patch, shape.prefix_tokens + token, whole);
  }
}

// Transposes the kept patches, contiguous per channel, to rows of kTileChannels.
template <class T>
void transpose_tile(const TokenDropoutForward& params, int64_t sample, Segment segment, T* tile) {
  const PatchTensor& patches = params.patches;
  const T* first = static_cast<const T*>(patches.data) + sample * patches.sample_stride +
                   segment.channel * patches.channel_stride;
  for (int64_t c = 0; c < segment.count; ++c) {
    const T* channel = first + c * patches.channel_stride;
    for (int64_t i = 0; i < params.shape.kept_tokens; ++i) {
      tile[i * kTileChannels + c] = channel[kept_token(params, sample, i)];
    }
  }
}

template <class O, class P, class T>
void tiles_of(const TokenDropoutForward& params, const float* prefix, T* tile, int64_t begin, int64_t end) {
  const TokenDropoutShape& shape = params.shape;
  const int64_t tiles = (shape.channels + kTileChannels - 1) / kTileChannels;
  for (int64_t n = begin; n < end; ++n) {
    const int64_t sample = n / tiles, channel = n % tiles * kTileChannels;
    const int64_t left = shape.channels - channel;
    const Segment segment = {channel, left < kTileChannels ? left : kTileChannels};
    transpose_tile(params, sample, segment, tile);
    for (int64_t row = 0; row < shape.prefix_tokens; ++row) {
      const float* token = prefix + row * shape.channels + channel;
      write_position<O, P>(params, out_row<O>(params, sample, row), token, row, segment);
    }
    for (int64_t i = 0; i < shape.kept_tokens; ++i) {
      const int64_t position = shape.prefix_tokens + kept_token(params, sample, i);
      O* out = out_row<O>(params, sample, shape.prefix_tokens + i);
      write_position<O, P>(params, out, tile + i * kTileChannels, position, segment);
    }
  }
}

template <class T>
void add_to(float* sum, const T* row, int64_t width) {
  for_each_vector(
      width, [&](int64_t i, auto part) { store(sum + i, load(sum + i, part) + load(row + i, part), part); });
}

template <class T>
void store_sum(void* target, int64_t position, const float* sum, int64_t width) {
  if (target == nullptr) return;
  T* row = static_cast<T*>(target) + position * width;
  for_each_vector(width, [&](int64_t i, auto part) { store(row + i, load(sum + i, part), part); });
}

void clear(void* row, int64_t bytes) { __builtin_memset(row, 0, bytes); }

// Adds one row of dout to the sum of its position, and writes the gradient of its patch if needed.
template <class T>
void row_backward(const TokenDropoutBackward& params, const int32_t* place, float* sum, int64_t sample,
                  int64_t position) {
  const TokenDropoutShape& shape = params.shape;
  const int64_t rows = shape.prefix_tokens + shape.kept_tokens;
  const T* dout = static_cast<const T*>(params.dout) + sample * rows * shape.channels;
  if (position < shape.prefix_tokens) {
    if (params.dprefix || params.dpos_embed) add_to(sum, dout + position * shape.channels, shape.channels);
    return;
  }

  const int64_t bytes = shape.channels * sizeof(T);
  const int64_t token = position - shape.prefix_tokens;
  const int64_t patch = sample * shape.tokens + token;
  T* dpatch = params.dpatches ? static_cast<T*>(params.dpatches) + patch * shape.channels : nullptr;
  const int64_t in_order = token < shape.kept_tokens ? token : -1;
  const int64_t i = place ? place[patch] : in_order;
  if (i < 0) {
    if (dpatch) clear(dpatch, bytes);
    return;
  }
  const T* gradient = dout + (shape.prefix_tokens + i) * shape.channels;
  if (dpatch) __builtin_memcpy(dpatch, gradient, bytes);
  if (params.dpos_embed) add_to(sum, gradient, shape.channels);
}

// One pass over the samples for several positions; their rows are contiguous in a sample.
template <class T>
void positions_backward(const TokenDropoutBackward& params, const int32_t* place, float* sums, int64_t first,
                        int64_t last) {
  const TokenDropoutShape& shape = params.shape;
  const int64_t width = shape.channels;
  clear(sums, (last - first) * width * sizeof(float));
  for (int64_t sample = 0; sample < shape.batch; ++sample) {
    for (int64_t position = first; position < last; ++position) {
      row_backward<T>(params, place, sums + (position - first) * width, sample, position);
    }
  }
  for (int64_t position = first; position < last; ++position) {
    const float* sum = sums + (position - first) * width;
    if (position < shape.prefix_tokens) store_sum<T>(params.dprefix, position, sum, width);
    store_sum<T>(params.dpos_embed, position, sum, width);
  }
}

// Calls body(O{}, P{}, T{}).
template <class Body>
void with_element_types(const TokenDropoutForward& params, const Body& body) {
  with_element_type(params.out_dtype, [&]<class O>(O out) {
    // The result has the widest dtype of the inputs, so all inputs of a 16-bit result have its dtype.
    if constexpr (sizeof(O) == 2) {
      body(out, O{}, O{});
    } else {
      with_element_type(params.pos_embed_dtype, [&](auto pos_embed) {
        with_element_type(params.patches.dtype, [&](auto patches) { body(out, pos_embed, patches); });
      });
    }
  });
}

void forward_rows(const TokenDropoutForward& params, const float* prefix, int64_t begin, int64_t end) {
  with_element_types(
      params, [&]<class O, class P, class T>(O, P, T) { write_rows<O, P, T>(params, prefix, begin, end); });
}

void forward_tiles(const TokenDropoutForward& params, const float* prefix, float* scratch, int64_t begin,
                   int64_t end) {
  with_element_types(params, [&]<class O, class P, class T>(O, P, T) {
    tiles_of<O, P, T>(params, prefix, reinterpret_cast<T*>(scratch), begin, end);
  });
}

void backward(const TokenDropoutBackward& params, const int32_t* place, float* sums, int64_t begin,
              int64_t end) {
  with_element_type(params.dtype, [&]<class T>(T) {
    for (int64_t first = begin; first < end; first += kSumPositions) {
      const int64_t last = first + kSumPositions < end ? first + kSumPositions : end;
      positions_backward<T>(params, place, sums, first, last);
    }
  });
}

}  // namespace

const TokenDropoutKernels token_dropout = {forward_rows, forward_tiles, backward};

}  // namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE
