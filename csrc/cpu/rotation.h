// Rotary embedding of a vector, and indexing of heads.
#pragma once

#include "cpu/simd.h"
#include "include/rope_attention.h"

namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE {

// Index of a token's vector.
struct Position {
  int64_t sample, head, token;

  template <class T>
  T* in(const HeadsView& view) const {
    return static_cast<T*>(view.data) + sample * view.batch_stride + token * view.token_stride +
           head * view.head_stride;
  }
};

// Vector number `row`, counted head by head.
static inline Position position_of(const HeadsShape& shape, int64_t row) {
  const int64_t number = row / shape.tokens;
  return {number / shape.heads, number % shape.heads, row % shape.tokens};
}

template <class From, class To>
static inline void scale_vector(const From* source, To* target, int64_t width, float factor) {
  for_each_vector(width,
                  [&](int64_t i, auto part) { store(target + i, load(source + i, part) * factor, part); });
}

static inline F32 swap_neighbours(F32 x) {
  U32 neighbour;
  for (int i = 0; i < kLanes; ++i) neighbour[i] = i ^ 1;
  return shuffle(x, x, neighbour);
}

template <class From, class To>
static inline void rotate_neighbours(const From* source, To* target, int64_t width, const float* cos,
                                     const float* sin, float factor, float sin_factor) {
  for_each_vector(width, [&](int64_t i, auto part) {
    const F32 x = load(source + i, part);
    const F32 turned = swap_neighbours(x) * load(sin + i, part) * sin_factor;
    store(target + i, x * load(cos + i, part) * factor + turned, part);
  });
}

template <class From, class To>
static inline void rotate_halves(const From* source, To* target, int64_t width, const float* cos,
                                 const float* sin, float factor, float sin_factor) {
  const int64_t half = width / 2;
  for_each_vector(half, [&](int64_t i, auto part) {
    const F32 a = load(source + i, part), b = load(source + half + i, part);
    const F32 a_turned = b * load(sin + i, part) * sin_factor;
    const F32 b_turned = a * load(sin + half + i, part) * sin_factor;
    store(target + i, a * load(cos + i, part) * factor + a_turned, part);
    store(target + half + i, b * load(cos + half + i, part) * factor + b_turned, part);
  });
}

// target = factor * rotate(source).
template <class From, class To>
static inline void rotate_vector(const From* source, To* target, const HeadsShape& shape,
                                 const Rotation& rotation, float factor, const Position& at) {
  const int64_t width = shape.head_dim;
  if (rotation.cos == nullptr || at.token < rotation.num_prefix) {
    return scale_vector(source, target, width, factor);
  }
  int64_t entry = at.token - rotation.num_prefix;
  if (rotation.token_index != nullptr) {
    entry = rotation.token_index[at.sample * (shape.tokens - rotation.num_prefix) + entry];
    if (entry < 0) return scale_vector(source, target, width, factor);
  }
  const int64_t start = at.head * rotation.head_stride + entry * width;
  const float* cos = rotation.cos + start;
  const float* sin = rotation.sin + start;
  const float sin_factor = rotation.backwards ? -factor : factor;
  if (rotation.interleaved) return rotate_neighbours(source, target, width, cos, sin, factor, sin_factor);
  rotate_halves(source, target, width, cos, sin, factor, sin_factor);
}

template <class T>
static inline float dot(const T* a, const T* b, int64_t width) {
  float sum[1];
  sum_over_row(width, sum,
               [&](int64_t i, auto part, F32* sums) { sums[0] += load(a + i, part) * load(b + i, part); });
  return sum[0];
}

}  // namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE
