// Blocks of queries, and the workspaces of attention in float32 and in bfloat16.
#pragma once

#include "cpu/simd.h"

namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE {

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }
static inline int64_t vectors_of(int64_t elements) { return (elements + kLanes - 1) / kLanes; }

// Queries of a head, and their visible keys. shift: seqlen_k - seqlen_q of the causal mask.
struct Queries {
  int64_t first;  // query
  int64_t rows;   // queries
  int64_t keys;   // of the head
  int64_t shift;
  bool causal;

  int64_t visible(int64_t row) const {
    return causal ? larger_of(0, smaller(first + row + 1 + shift, keys)) : keys;
  }
  int64_t columns() const { return visible(rows - 1); }

  // At most `most` queries from `row` on.
  Queries part(int64_t row, int64_t most) const {
    return {first + row, smaller(most, rows - row), keys, shift, causal};
  }
};

// Bump allocator over a workspace; with data null it computes the size.
struct Arena {
  float* data;
  int64_t used = 0;

  template <class T = float>
  T* take(int64_t count) {
    T* part = data == nullptr ? nullptr : reinterpret_cast<T*>(data + used);
    used += round_up(count, kLanes);
    return part;
  }
};

// Floats of the workspace that Buffers(arena, extents) divides.
template <class Buffers>
static int64_t workspace(int64_t keys, int64_t head_dim) {
  Arena arena{nullptr};
  Buffers(arena, {keys, head_dim});
  return arena.used;
}

}  // namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE
