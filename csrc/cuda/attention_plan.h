// Launch plan of attention: padding, mask bounds, and warps and tiles per block.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/device.h"
#include "cuda/elements.cuh"
#include "cuda/tensor_core.h"
#include "include/rope_attention.h"

namespace evakernels::cuda {

// 16-bit elements per 16-byte access.
constexpr int kWide = kWidestAccess / 2;

// Row stride of a head in shared memory: 16 bytes more than its elements, so that the rows of a matrix start
// in different banks.
template <int D>
constexpr int kRow = D + kWide;
template <int D>
constexpr int kTileElements = kTile * kRow<D>;

// Tokens padded to tiles of 16 rows. The prefix tokens are the last rows of the first tile and the patches
// follow, so 256 patches fill 16 tiles with or without a prefix. Padding rows hold zeros and are masked.
struct PaddedRows {
  int offset;  // row of the first token
  int tokens;

  // num_prefix shifts queries and keys equally: with a prefix they are equally many.
  static __host__ __device__ __forceinline__ PaddedRows of(const AttentionShape& shape, int tokens) {
    const int prefix = static_cast<int>(shape.num_prefix);
    return {prefix > 0 ? kTile - prefix : 0, tokens};
  }

  __host__ __device__ __forceinline__ int tiles() const { return (offset + tokens + kTile - 1) / kTile; }

  // `token`: row - offset.
  __device__ __forceinline__ bool contains(int token) const {
    return static_cast<unsigned>(token) < static_cast<unsigned>(tokens);
  }
  __device__ __forceinline__ bool has_padding(int tile, int count) const {
    const int first = tile * kTile - offset;
    return first < 0 || first + count * kTile > tokens;
  }
};

// Bounds of the causal mask: query i attends to keys up to i + max_key. The queries of tile i see no key tile
// after i + max_tile and need no mask before tile i + full_tiles. Without a mask all bounds exceed every
// index.
struct MaskBounds {
  int max_key;
  int max_tile;
  int full_tiles;

  static MaskBounds of(const AttentionShape& shape) {
    constexpr int kUnbounded = 1 << 24;

    const int max_key = shape.causal ? static_cast<int>(shape.keys - shape.tokens) : kUnbounded;
    return {max_key, floor_tiles(max_key + kTile - 1), floor_tiles(max_key + 1)};
  }

 private:
  // Rounds down for negative numbers, too.
  static int floor_tiles(int rows) { return (rows & -kTile) / kTile; }
};

struct AttentionPlan {
  int tiles;            // query tiles per head, at most
  int key_tiles;        // key tiles per head, at least 1
  int seqlen_diff;      // seqlen_k - seqlen_q
  int qhead_per_khead;  // query heads per key/value head
  MaskBounds mask;
  int warps;        // per block
  int stage_tiles;  // forward: key tiles in shared memory at a time; all of them stay if it equals key_tiles
  int block_tiles;  // per block: query tiles in forward, key tiles in backward
  int blocks;       // per head
  bool wide;        // every tensor allows 16-byte accesses
};

// The parts of a plan that depend on the shape alone.
inline AttentionPlan begin_plan(const AttentionShape& shape) {
  const int tokens = static_cast<int>(shape.tokens), keys = static_cast<int>(shape.keys);
  AttentionPlan plan = {};
  plan.tiles = plan.block_tiles = PaddedRows::of(shape, tokens).tiles();
  plan.key_tiles = plan.stage_tiles = std::max(PaddedRows::of(shape, keys).tiles(), 1);
  plan.seqlen_diff = keys - tokens;
  plan.qhead_per_khead = static_cast<int>(shape.heads / shape.kv_heads);
  plan.mask = MaskBounds::of(shape);
  plan.blocks = 1;
  return plan;
}

// First token of sequence `number` of a packed batch.
__device__ __forceinline__ int64_t offset_of(const SequenceOffsets& offsets, int64_t number) {
  return offsets.is_int64 ? load(static_cast<const int64_t*>(offsets.data) + number)
                          : load(static_cast<const int32_t*>(offsets.data) + number);
}

// Warps per block, at most, and blocks per head that EVAKERNELS_ATTENTION_PLAN sets in tests, as in `1x2`; 0:
// not set.
struct TestPlan {
  int warps = 0;
  int blocks = 0;

  static TestPlan read() {
    TestPlan plan;
    if (const char* text = std::getenv("EVAKERNELS_ATTENTION_PLAN")) {
      std::sscanf(text, "%dx%d", &plan.warps, &plan.blocks);
    }
    return plan;
  }
};

// Sets plan.warps to the most, up to `warps`, of which a block fits the GPU with bytes(plan) of shared
// memory. Returns the blocks that are resident on the GPU then; 0 if none fits.
template <class Bytes, class... Parameters>
int64_t fit_warps(AttentionPlan& plan, int warps, void (*kernel)(Parameters...), const Bytes& bytes) {
  const TestPlan test = TestPlan::read();
  plan.warps = test.warps > 0 ? std::min(test.warps, warps) : warps;
  for (; plan.warps > 0; --plan.warps) {
    const size_t shared_bytes = bytes(plan);
    if (shared_bytes > max_shared_memory()) continue;
    const int64_t resident = resident_blocks(address_of(kernel), plan.warps * kWarpSize, shared_bytes);
    if (resident > 0) return resident;
  }
  return 0;
}

constexpr Error kNoPlan = "too little shared memory for attention, or its occupancy can't be queried";

// Divides a head's `tiles` among enough blocks to fill the GPU. A warp takes `warp_tiles` at a time.
inline void share_tiles(AttentionPlan& plan, const AttentionShape& shape, int64_t resident, int tiles,
                        int warp_tiles) {
  // The lengths of packed sequences are unknown: as many of the longest as the tokens make.
  const int64_t longest = std::max<int64_t>(shape.tokens, 1);
  const int64_t heads =
      shape.heads * (shape.offsets.data ? ceil_div(shape.offsets.tokens, longest) : shape.batch);
  const int test_blocks = TestPlan::read().blocks;
  const int64_t filling = test_blocks > 0 ? test_blocks : resident / heads;
  const int64_t most = ceil_div(tiles, plan.warps * warp_tiles);
  const int rounds = static_cast<int>(ceil_div(most, std::clamp<int64_t>(filling, 1, most)));
  plan.block_tiles = rounds * plan.warps * warp_tiles;
  plan.blocks = ceil_div(tiles, plan.block_tiles);
}

// Whether every tensor allows 16-byte accesses.
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

// Calls body(T{}, Constant<D>{}) with the element type and the smallest compiled D that holds head_dim.
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

// Whether a call with `tokens` per sample has nothing to compute.
inline bool is_empty(const AttentionShape& shape, int64_t tokens) {
  return shape.batch * shape.heads * tokens * shape.head_dim == 0;
}

}  // namespace evakernels::cuda
