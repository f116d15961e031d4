// How attention is launched: which kernel, how many warps a block has, and what lies in its shared memory.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "cuda/device.h"
#include "cuda/dispatch.h"
#include "cuda/elements.cuh"
#include "cuda/tensor_core.h"
#include "include/rope_attention.h"

namespace evakernels::cuda {

// Elements of 16 bits of an access of 16 bytes.
constexpr int kWide = kWidestAccess / 2;

// A row of a head in shared memory: 16 bytes longer than its elements, so that the rows of a matrix lie in
// different banks. In floats it is as many elements longer, of which four rows are stored at a time.
template <int D>
constexpr int kRow = D + kWide;
template <int D>
constexpr int kTileElements = kTile * kRow<D>;

// Tokens take slots, in their order: the prefix tokens the last of the first 16, if there are any, and the
// patches those that follow. So patches fill tiles of 16 slots exactly where their number is a multiple of 16
// (256 of 257 tokens, 576 of 577). Empty slots, before the first token and behind the last one, hold zeros,
// and scores are masked for them.
struct Slots {
  int shift;  // the slot of the first token
  int tokens;

  // Of the queries or the keys. Those of a prefix, which shifts both, are equally many.
  static __host__ __device__ __forceinline__ Slots of(const AttentionShape& shape, int tokens) {
    const int prefix = static_cast<int>(shape.num_prefix);
    return {prefix > 0 ? kTile - prefix : 0, tokens};
  }

  __host__ __device__ __forceinline__ int tiles() const { return (shift + tokens + kTile - 1) / kTile; }

  // Whether a slot has this token, which is the slot's number less `shift`.
  __device__ __forceinline__ bool has(int token) const {
    return static_cast<unsigned>(token) < static_cast<unsigned>(tokens);
  }
  __device__ __forceinline__ bool has_empty(int tile, int count) const {
    const int first = tile * kTile - shift;
    return first < 0 || first + count * kTile > tokens;
  }
};

// Which keys a query sees: query i those up to i + last. So the queries of tile i see none of the tiles of
// keys behind i + reach, and all of those before i + whole.
struct Sight {
  int last;
  int reach;
  int whole;

  // Causal: the last query sees the last key. Else all of them see more than there are.
  static Sight of(const AttentionShape& shape) {
    constexpr int kEverything = 1 << 24;
    const int last = shape.causal ? static_cast<int>(shape.keys - shape.tokens) : kEverything;
    return {last, tiles_in(last + kTile - 1), tiles_in(last + 1)};
  }

 private:
  // Rounded down, of negative numbers, too.
  static int tiles_in(int slots) { return (slots & -kTile) / kTile; }
};

// Of a launch.
struct AttentionPlan {
  int tiles;        // of a head's queries, at most
  int key_tiles;    // and of its keys; at least 1
  int more_keys;    // than queries
  int group;        // of query heads that have a head of keys in common
  Sight sight;      // of a query
  int warps;        // of a block
  int stage_tiles;  // of keys (forward) that lie in shared memory at a time; `key_tiles`: they stay there
  int block_tiles;  // of queries (forward) that a block has
  int blocks;       // of a head
  bool wide;        // 16 bytes of a tensor can be accessed at a time
};

// What follows from the shape alone.
inline AttentionPlan begin_plan(const AttentionShape& shape) {
  const int tokens = static_cast<int>(shape.tokens), keys = static_cast<int>(shape.keys);
  AttentionPlan plan = {};
  plan.tiles = plan.block_tiles = Slots::of(shape, tokens).tiles();
  plan.key_tiles = plan.stage_tiles = std::max(Slots::of(shape, keys).tiles(), 1);
  plan.more_keys = keys - tokens;
  plan.group = static_cast<int>(shape.heads / shape.kv_heads);
  plan.sight = Sight::of(shape);
  plan.blocks = 1;
  return plan;
}

// Of a packed batch: where sequence `number` begins.
__device__ __forceinline__ int64_t offset_of(const SequenceOffsets& offsets, int64_t number) {
  return offsets.is_int64 ? load(static_cast<const int64_t*>(offsets.data) + number)
                          : load(static_cast<const int32_t*>(offsets.data) + number);
}

// As many of `most` as share `units` in the fewest rounds.
inline int warps_for(int units, int most) { return ceil_div(units, ceil_div(units, most)); }

// Why the kernels, which reckon within a head by int, don't serve a call; null if they do.
inline Error unserved(const AttentionShape& shape, const RotaryTables& tables,
                      const std::vector<HeadsView>& views) {
  int64_t most = std::max(shape.heads * shape.head_dim, tables.cos ? tables.rows * shape.head_dim / 2 : 0);
  for (const HeadsView& view : views) most = std::max(most, view.token_stride);
  if (most > std::numeric_limits<int>::max() / 4) {
    return "tokens of attention are further apart, or its tables larger, than the CUDA kernels serve, 2^29 "
           "elements";
  }
  if (tables.cos && !tables.token_index && tables.rows < shape.tokens - shape.num_prefix) {
    return "the tables of attention have fewer rows than a sequence may have tokens";
  }
  return unserved(shape);
}

// Whether all tensors can be accessed 16 bytes at a time.
inline bool is_wide(const AttentionShape& shape, const RotaryTables& tables,
                    const std::vector<HeadsView>& views, const std::vector<const void*>& outputs) {
  bool wide = shape.head_dim % (tables.cos && !tables.interleaved ? 2 * kWide : kWide) == 0;
  const auto aligned = [&](const void* data) {
    return reinterpret_cast<uintptr_t>(data) % kWidestAccess == 0;
  };
  for (const HeadsView& view : views) {
    wide = wide && aligned(view.data) && view.batch_stride % kWide == 0 && view.token_stride % kWide == 0 &&
           view.head_stride % kWide == 0;
  }
  for (const void* data : outputs) wide = wide && aligned(data);
  return wide && aligned(tables.cos) && aligned(tables.sin);
}

// Calls body(T{}, Constant<D>{}) with the element type and the least D that a kernel is compiled for.
template <class Body>
auto with_attention_types(const AttentionShape& shape, const Body& body) {
  const auto with_type = [&](auto element) {
    if (shape.head_dim <= 64) return body(element, Constant<64>{});
    if (shape.head_dim <= 96) return body(element, Constant<96>{});
    if (shape.head_dim <= 112) return body(element, Constant<112>{});
    return body(element, Constant<kMaxHeadDim>{});
  };
  return shape.dtype == DType::BFloat16 ? with_type(BFloat16{}) : with_type(Float16{});
}

// Whether there is nothing to compute for so many tokens of a sample.
inline bool is_empty(const AttentionShape& shape, int64_t tokens) {
  return shape.batch * shape.heads * tokens * shape.head_dim == 0;
}

}  // namespace evakernels::cuda
