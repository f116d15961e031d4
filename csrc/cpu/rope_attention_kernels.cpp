// Compiled once for each instruction set.
#include "cpu/rope_attention_kernels.h"

#include "cpu/simd.h"

namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE {
namespace {

// Which head and token row r of a chunk is.
struct Position {
  int64_t sample, head, token;

  Position(const HeadsShape& shape, int64_t first, int64_t row)
      : sample((first + row / shape.tokens) / shape.heads),
        head((first + row / shape.tokens) % shape.heads),
        token(row % shape.tokens) {}

  template <class T>
  T* in(const HeadsView& view) const {
    return static_cast<T*>(view.data) + sample * view.batch_stride + token * view.token_stride +
           head * view.head_stride;
  }
};

// --- rotation ----------------------------------------------------------------------------------------------

template <class From, class To>
void scale_vector(const From* source, To* target, int64_t width, float factor) {
  for_each_vector(width,
                  [&](int64_t i, auto part) { store(target + i, load(source + i, part) * factor, part); });
}

inline F32 swap_neighbours(F32 x) {
  I32 neighbour;
  for (int i = 0; i < kLanes; ++i) neighbour[i] = i ^ 1;
  return __builtin_shuffle(x, neighbour);
}

template <class From, class To>
void rotate_neighbours(const From* source, To* target, int64_t width, const float* cos, const float* sin,
                       float factor, float sin_factor) {
  for_each_vector(width, [&](int64_t i, auto part) {
    const F32 x = load(source + i, part);
    const F32 turned = swap_neighbours(x) * load(sin + i, part) * sin_factor;
    store(target + i, x * load(cos + i, part) * factor + turned, part);
  });
}

template <class From, class To>
void rotate_halves(const From* source, To* target, int64_t width, const float* cos, const float* sin,
                   float factor, float sin_factor) {
  const int64_t half = width / 2;
  for_each_vector(half, [&](int64_t i, auto part) {
    const F32 a = load(source + i, part), b = load(source + half + i, part);
    const F32 a_turned = b * load(sin + i, part) * sin_factor;
    const F32 b_turned = a * load(sin + half + i, part) * sin_factor;
    store(target + i, a * load(cos + i, part) * factor + a_turned, part);
    store(target + half + i, b * load(cos + half + i, part) * factor + b_turned, part);
  });
}

template <class From, class To>
void rotate_vector(const From* source, To* target, const PackHeads& params, const Position& at) {
  const Rotation& rotation = params.rotation;
  const int64_t width = params.shape.head_dim;
  if (rotation.cos == nullptr || at.token < rotation.num_prefix) {
    return scale_vector(source, target, width, params.factor);
  }
  int64_t entry = at.token - rotation.num_prefix;
  if (rotation.token_index != nullptr) {
    entry = rotation.token_index[at.sample * (params.shape.tokens - rotation.num_prefix) + entry];
  }
  const int64_t start = at.head * rotation.head_stride + entry * width;
  const float* cos = rotation.cos + start;
  const float* sin = rotation.sin + start;
  const float sin_factor = rotation.backwards ? -params.factor : params.factor;
  if (rotation.interleaved)
    return rotate_neighbours(source, target, width, cos, sin, params.factor, sin_factor);
  rotate_halves(source, target, width, cos, sin, params.factor, sin_factor);
}

template <class T, class Packed>
void pack_rows(const PackHeads& params, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const Position at(params.shape, params.first, row);
    Packed* packed = static_cast<Packed*>(params.packed) + row * params.shape.head_dim;
    rotate_vector(static_cast<const T*>(at.in<T>(params.heads)), packed, params, at);
  }
}

template <class T, class Packed>
void unpack_rows(const PackHeads& params, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const Position at(params.shape, params.first, row);
    const Packed* packed = static_cast<const Packed*>(params.packed) + row * params.shape.head_dim;
    rotate_vector(packed, at.in<T>(params.heads), params, at);
  }
}

void pack(const PackHeads& params, int64_t begin, int64_t end) {
  const bool widened = params.packed_dtype == DType::Float32;
  switch (params.dtype) {
    case DType::Float32:
      return pack_rows<float, float>(params, begin, end);
    case DType::BFloat16:
      return widened ? pack_rows<BFloat16, float>(params, begin, end)
                     : pack_rows<BFloat16, BFloat16>(params, begin, end);
    case DType::Float16:
      return pack_rows<Float16, float>(params, begin, end);
  }
}

void unpack(const PackHeads& params, int64_t begin, int64_t end) {
  const bool widened = params.packed_dtype == DType::Float32;
  switch (params.dtype) {
    case DType::Float32:
      return unpack_rows<float, float>(params, begin, end);
    case DType::BFloat16:
      return widened ? unpack_rows<BFloat16, float>(params, begin, end)
                     : unpack_rows<BFloat16, BFloat16>(params, begin, end);
    case DType::Float16:
      return unpack_rows<Float16, float>(params, begin, end);
  }
}

// --- softmax -----------------------------------------------------------------------------------------------

// A row that is one array of floats, or the sum of two of 16 bits each.
struct FloatRow {
  float* values;

  FloatRow(void* data, const void*, int64_t start) : values(static_cast<float*>(data) + start) {}
  template <class Part>
  F32 get(int64_t i, Part part) const {
    return load(values + i, part);
  }
  template <class Part>
  void set(int64_t i, F32 value, Part part) const {
    store(values + i, value, part);
  }
};

struct SplitRow {
  BFloat16* values;
  const BFloat16* rest;

  SplitRow(void* data, const void* rest_data, int64_t start)
      : values(static_cast<BFloat16*>(data) + start), rest(static_cast<const BFloat16*>(rest_data) + start) {}
  template <class Part>
  F32 get(int64_t i, Part part) const {
    return load(values + i, part) + load(rest + i, part);
  }
  template <class Part>
  void set(int64_t i, F32 value, Part part) const {
    store(values + i, value, part);
  }
};

template <class Row>
void clear_beyond(const Row& row, int64_t visible, int64_t tokens) {
  const Row hidden = {row.values + visible, nullptr, 0};
  for_each_vector(tokens - visible, [&](int64_t i, auto part) { hidden.set(i, F32{}, part); });
}

template <class Row>
void softmax_rows(const AttentionWeights& params, float* scratch, int64_t begin, int64_t end) {
  const int64_t tokens = params.tokens;
  for (int64_t index = begin; index < end; ++index) {
    const Row row(params.scores, params.scores_rest, index * tokens);
    const int64_t visible = params.causal ? index % tokens + 1 : tokens;
    F32 highest = broadcast(-__builtin_inff());
    for_each_vector(visible, [&](int64_t i, auto part) {
      const F32 s = row.get(i, part);
      store(scratch + i, s, part);
      highest = larger(fill_beyond(s, -__builtin_inff(), part), highest);
    });
    const float shift = horizontal_max(highest);
    float sum[1];
    sum_over_row(visible, sum, [&](int64_t i, auto part, F32* sums) {
      const F32 e = exp(load(scratch + i, part) - shift);
      store(scratch + i, e, part);
      sums[0] += zero_beyond(e, part);
    });
    const float factor = 1.0f / sum[0];
    for_each_vector(visible,
                    [&](int64_t i, auto part) { row.set(i, load(scratch + i, part) * factor, part); });
    clear_beyond(row, visible, tokens);
    params.lse[index] = shift + __builtin_logf(sum[0]);
  }
}

template <class Row>
void gradient_rows(const AttentionGradients& params, int64_t begin, int64_t end) {
  const int64_t tokens = params.tokens;
  for (int64_t index = begin; index < end; ++index) {
    const Row scores(params.scores, params.scores_rest, index * tokens);
    const Row gradients(params.gradients, params.gradients_rest, index * tokens);
    const int64_t visible = params.causal ? index % tokens + 1 : tokens;
    const float lse = params.lse[index], mean = params.mean[index];
    for_each_vector(visible, [&](int64_t i, auto part) {
      const F32 weight = exp(scores.get(i, part) - lse);
      scores.set(i, weight, part);
      gradients.set(i, weight * (gradients.get(i, part) - mean), part);
    });
    clear_beyond(scores, visible, tokens);
    clear_beyond(gradients, visible, tokens);
  }
}

void weights(const AttentionWeights& params, float* scratch, int64_t begin, int64_t end) {
  if (params.dtype == DType::Float32) return softmax_rows<FloatRow>(params, scratch, begin, end);
  softmax_rows<SplitRow>(params, scratch, begin, end);
}

void gradients(const AttentionGradients& params, int64_t begin, int64_t end) {
  if (params.dtype == DType::Float32) return gradient_rows<FloatRow>(params, begin, end);
  gradient_rows<SplitRow>(params, begin, end);
}

// --- dot products ------------------------------------------------------------------------------------------

template <class T>
void dot_rows(const HeadDots& params, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const Position at(params.shape, params.first, row);
    const T* a = at.in<T>(params.a);
    const T* b = at.in<T>(params.b);
    float sum[1];
    sum_over_row(params.shape.head_dim, sum,
                 [&](int64_t i, auto part, F32* sums) { sums[0] += load(a + i, part) * load(b + i, part); });
    params.products[row] = sum[0];
  }
}

void dots(const HeadDots& params, int64_t begin, int64_t end) {
  switch (params.dtype) {
    case DType::Float32:
      return dot_rows<float>(params, begin, end);
    case DType::BFloat16:
      return dot_rows<BFloat16>(params, begin, end);
    case DType::Float16:
      return dot_rows<Float16>(params, begin, end);
  }
}

}  // namespace

const RopeAttentionKernels rope_attention = {pack, unpack, weights, gradients, dots};

}  // namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE
