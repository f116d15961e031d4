// Launch plan of attention: padding, mask bounds, and the choice of warps and tiles per block.
#pragma once

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <system_error>
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

// Warps per block and blocks per head that EVAKERNELS_ATTENTION_PLAN requests, as in `3` or `3x2`; 0: any.
struct RequestedPlan {
  int warps = 0;
  int blocks = 0;

  static RequestedPlan read() {
    const char* const text = std::getenv(kVariable);
    RequestedPlan plan;
    if (!text || !*text) return plan;
    const char* const last = text + std::strlen(text);
    const char* end = std::from_chars(text, last, plan.warps).ptr;
    if (*end == 'x') {
      const auto [rest, error] = std::from_chars(end + 1, last, plan.blocks);
      end = error == std::errc{} ? rest : text;
    }
    return end != last || plan.warps < 1 || plan.blocks < 0 ? RequestedPlan{-1, 0} : plan;
  }

  // Why no plan was found.
  static Error error() {
    static thread_local std::string message;
    const char* const text = std::getenv(kVariable);
    if (!text || !*text) return "too little shared memory for attention, or its occupancy can't be queried";
    message = std::string(kVariable) + " must be WARPS or WARPSxBLOCKS of a possible plan, got " + text;
    return message.c_str();
  }

  bool operator==(const RequestedPlan&) const = default;

  static constexpr const char* kVariable = "EVAKERNELS_ATTENTION_PLAN";
};

// Cycles that a resident warp takes per instruction, and bytes of global memory that reach an SM per cycle:
// typical of A100, H100 and B200. Plans are compared by them.
constexpr double kCyclesPerInstruction = 3;
constexpr double kBytesPerCycle = 14;

// Searches the launch plan with the least predicted time: the waves of blocks times the instructions of a
// warp. Registers leave an SM two or three warps per scheduler, too few to hide latency, so a warp is assumed
// to take equally long however many others are resident.
class PlanSearch {
 public:
  template <class... Parameters>
  PlanSearch(void (*kernel)(Parameters...), const AttentionShape& shape)
      : kernel_(address_of(kernel)), memory_(max_shared_memory()), requested_(RequestedPlan::read()) {
    // The lengths of packed sequences are unknown: as many of the longest as the tokens make.
    const int64_t longest = std::max<int64_t>(shape.tokens, 1);
    heads_ = shape.heads * (shape.offsets.data ? ceil_div(shape.offsets.tokens, longest) : shape.batch);
  }

  // Resident blocks of the GPU; 0 if they don't fit or another number of warps is requested.
  int64_t resident(int warps, size_t shared_bytes) const {
    if (requested_.warps != 0 && requested_.warps != warps) return 0;
    return shared_bytes > memory_ ? 0 : resident_blocks(kernel_, warps * kWarpSize, shared_bytes);
  }

  // Instructions of a warp in the time in which all heads read or write `bytes` each.
  double instructions_of_traffic(double bytes) const {
    return static_cast<double>(heads_) * bytes / multiprocessors() / kBytesPerCycle / kCyclesPerInstruction;
  }

  // instructions: of a warp in a block. extra: of another kernel, not multiplied by the waves.
  void consider(const AttentionPlan& plan, int64_t resident, double instructions, double extra = 0) {
    if (requested_.blocks != 0 && requested_.blocks != plan.blocks) return;
    const double time = static_cast<double>(ceil_div(heads_ * plan.blocks, resident)) * instructions + extra;
    if (time >= least_) return;
    least_ = time;
    best_ = plan;
  }

  Error finish(AttentionPlan& plan) const {
    plan = best_;
    return best_.warps > 0 ? nullptr : RequestedPlan::error();
  }

 private:
  const void* kernel_;
  size_t memory_;
  RequestedPlan requested_;
  int64_t heads_ = 0;
  double least_ = std::numeric_limits<double>::infinity();
  AttentionPlan best_ = {};
};

// make(plan), or its result for the thread's last call: the layers of a model have the same shape.
template <class Make>
Error remember_plan(const AttentionShape& shape, AttentionPlan& plan, const Make& make) {
  struct Call {
    AttentionShape shape;
    size_t memory;
    int multiprocessors;
    RequestedPlan requested;
    bool operator==(const Call&) const = default;
  };
  static thread_local Call last = {};
  static thread_local AttentionPlan found = {};
  const Call call = {shape, max_shared_memory(), multiprocessors(), RequestedPlan::read()};
  if (found.warps == 0 || !(call == last)) {
    found = {};
    if (const Error error = make(found)) return error;
    last = call;
  }
  plan = found;
  return nullptr;
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
