// What forward and backward of rope_attention and packed_attention share: how a head lies in shared memory,
// and how its tokens get there, rotated on the way.
//
// Slots. A head's tokens take slots: the prefix tokens the first 16, if there are any, and the patches those
// that follow. So patches fill tiles of 16 slots exactly where their number is a multiple of 16 (256 of 257
// tokens, 576 of 577), and only the prefix's tile, or the last one, has empty slots that scores must be
// masked for. Empty slots hold zeros. Slots are in the order of their tokens, so that causal attention
// compares slots.
//
// A block has one head, or a part of its rows where there are too few heads to fill the GPU. Each warp owns
// 16 slots at a time, whose results it sums in registers, and walks over the tiles of what it attends to,
// which lie in shared memory for all warps: all of them where they fit, else a stage of them after another.
// Rows in shared memory are 16 bytes longer than their elements, so that the rows of a matrix lie in
// different banks.
//
// The sequences of a packed batch differ in length. The launch knows the bound only, so the blocks of a
// shorter one that have nothing left end at once.
#pragma once

#include <algorithm>
#include <vector>

#include "cuda/dispatch.h"
#include "cuda/norm_plan.h"
#include "cuda/rope_attention.h"
#include "cuda/tensor_core.h"

namespace evakernels::cuda {

// What registers allow: 12 warps of a multiprocessor with 168 a thread, or 8 with 255. They are one block's,
// or half of them if two fit into shared memory: one computes while the other loads.
template <int D>
constexpr int kMaxWarps = D <= 64 ? 12 : 8;

// Elements of an access of 16 bytes.
constexpr int kWide = kWidestAccess / 2;

// How a launch divides the work. Tiles are of 16 slots.
struct AttentionPlan {
  int tiles;        // of a head, at most
  int stage_tiles;  // that lie in shared memory at a time
  int part_tiles;   // that a block owns
  int parts;        // blocks of a head
  int warps;        // of a block
  bool wide;        // 16 bytes of a tensor can be accessed at a time
};

// --- tokens ------------------------------------------------------------------------------------------------

struct Slots {
  int prefix;
  int tokens;

  __host__ __device__ __forceinline__ int tiles() const {
    return (prefix > 0) + (tokens - prefix + kTile - 1) / kTile;
  }

  // The slot's token; -1 if it is empty.
  __device__ __forceinline__ int token(int slot) const {
    if (prefix > 0 && slot < kTile) return slot < prefix ? slot : -1;
    const int token = prefix > 0 ? slot - kTile + prefix : slot;
    return token < tokens ? token : -1;
  }

  __device__ __forceinline__ bool has_empty(int tile) const { return token(tile * kTile + kTile - 1) < 0; }
};

// The tokens of one head. `data` is never null.
template <class T>
struct Tokens {
  T* data;
  int64_t stride;

  __device__ __forceinline__ T* at(int token) const { return data + token * stride; }
};

// Which head a block has.
struct HeadNumber {
  unsigned sample, head;

  __device__ __forceinline__ HeadNumber(const AttentionShape& shape, int parts)
      : sample(blockIdx.x / static_cast<unsigned>(parts) / static_cast<unsigned>(shape.heads)),
        head(blockIdx.x / static_cast<unsigned>(parts) % static_cast<unsigned>(shape.heads)) {}

  // What follows from the result is computed where it is used, in a loop too: where the products take all
  // registers, no others hold what only the copies need.
  __device__ __forceinline__ HeadNumber computed_here() const {
    HeadNumber number = *this;
    hide_origin(number.sample);
    hide_origin(number.head);
    return number;
  }

  // Of the sequence in a packed batch.
  __device__ __forceinline__ int64_t first_token(const SequenceOffsets& offsets) const {
    return offset(offsets, sample);
  }

  __device__ __forceinline__ int tokens(const AttentionShape& shape) const {
    const SequenceOffsets& offsets = shape.offsets;
    if (!offsets.data) return static_cast<int>(shape.tokens);
    const int64_t first = offset(offsets, sample), end = offset(offsets, int64_t{sample} + 1);
    if (first >= 0 && first <= end && end <= offsets.tokens && end - first <= shape.tokens) {
      return static_cast<int>(end - first);
    }
    refuse_silently("packed_attention", "offsets are out of range, or a sequence is longer than max_length");
    return 0;
  }

  template <class T>
  __device__ __forceinline__ Tokens<const T> tokens_of(const HeadsView& view,
                                                       const AttentionShape& shape) const {
    const T* data = static_cast<const T*>(view.data) + head * view.head_stride;
    const SequenceOffsets& offsets = shape.offsets;
    return {data + (offsets.data ? first_token(offsets) * view.token_stride : sample * view.batch_stride),
            view.token_stride};
  }

  // Of a contiguous [B, N, H, D], or [T, H, D].
  template <class T>
  __device__ __forceinline__ Tokens<T> tokens_of(void* tensor, const AttentionShape& shape) const {
    const int64_t token = shape.offsets.data ? first_token(shape.offsets) : sample * shape.tokens;
    return {static_cast<T*>(tensor) + (token * shape.heads + head) * shape.head_dim,
            shape.heads * shape.head_dim};
  }

  // Where it begins in a [B, H, N], or [H, T].
  __device__ __forceinline__ int64_t first_row(const AttentionShape& shape) const {
    if (shape.offsets.data) return head * shape.offsets.tokens + first_token(shape.offsets);
    return (sample * shape.heads + head) * shape.tokens;
  }

 private:
  static __device__ __forceinline__ int64_t offset(const SequenceOffsets& offsets, int64_t number) {
    return offsets.is_int64 ? load(static_cast<const int64_t*>(offsets.data) + number)
                            : load(static_cast<const int32_t*>(offsets.data) + number);
  }
};

// --- rotation ----------------------------------------------------------------------------------------------

// Of the tokens of one head: pairs (a, b) become (a cos - b sin, a sin + b cos). COMPACT: the tables are.
template <bool COMPACT>
struct HeadRotation {
  const AttentionShape& shape;
  const RotaryTables& tables;
  HeadNumber number;

  __device__ __forceinline__ bool turns(int token) const {
    return token >= static_cast<int>(shape.num_prefix);
  }

  // Of the tables, for a token that turns.
  __device__ __forceinline__ int64_t row_of(int token) const {
    int64_t row = token - shape.num_prefix;
    if (tables.token_index) {
      row = tables.token_index[number.sample * (shape.tokens - shape.num_prefix) + row];
      if (row < 0 || row >= tables.rows) {
        refuse_silently("rope_attention", "token_index is out of range");
        row = 0;
      }
    }
    return row;
  }

  // Turns the vector's pairs whose first elements are among [i, i + E), where any are. sign -1: backwards.
  template <int E, class T>
  __device__ __forceinline__ void turn(T* vector, int token, int i, float sign) const {
    if constexpr (E > 1) {
      if (tables.interleaved) {
        float values[E], c[E / 2], s[E / 2];
        load_floats(vector + i, values);
        load_angles(token, i / 2, c, s);
#pragma unroll
        for (int n = 0; n < E / 2; ++n) turn_pair(values[2 * n], values[2 * n + 1], c[n], sign * s[n]);
        store_floats(vector + i, values);
        return;
      }
    }
    const int half = static_cast<int>(shape.head_dim / 2);
    const bool is_first = tables.interleaved ? i % 2 == 0 : i < half;
    if (!is_first) return;
    T* const partners = vector + (tables.interleaved ? i + 1 : i + half);
    float a[E], b[E], c[E], s[E];
    load_floats(vector + i, a);
    load_floats(partners, b);
    load_angles(token, tables.interleaved ? i / 2 : i, c, s);
#pragma unroll
    for (int n = 0; n < E; ++n) turn_pair(a[n], b[n], c[n], sign * s[n]);
    store_floats(vector + i, a);
    store_floats(partners, b);
  }

 private:
  // Of E pairs from `pair` on.
  template <int E>
  __device__ __forceinline__ void load_angles(int token, int pair, float (&c)[E], float (&s)[E]) const {
    const int64_t row = row_of(token);
    if constexpr (COMPACT) {
      const int quarter = static_cast<int>(shape.head_dim / 4);
      const unsigned grid = static_cast<unsigned>(tables.grid), patch = static_cast<unsigned>(row);
      // Less the pairs before its own, that the column's line begins with.
      const int of_row = patch / grid * quarter, of_column = (grid + patch % grid - 1) * quarter;
#pragma unroll
      for (int n = 0; n < E; ++n) {
        const int at = (pair + n < quarter ? of_row : of_column) + pair + n;
        c[n] = load(tables.cos + at);
        s[n] = load(tables.sin + at);
      }
    } else {
      const int64_t first = number.head * tables.head_stride + row * (shape.head_dim / 2) + pair;
      load_floats(tables.cos + first, c);
      load_floats(tables.sin + first, s);
    }
  }

  static __device__ __forceinline__ void turn_pair(float& a, float& b, float c, float s) {
    const float before = a;
    a = a * c - b * s;
    b = before * s + b * c;
  }
};

// --- between global and shared memory ----------------------------------------------------------------------

// The threads that share a task: those of a block, or of a warp.
struct Team {
  int thread;
  int size;

  static __device__ __forceinline__ Team block() {
    return {static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)};
  }
  static __device__ __forceinline__ Team warp() {
    return {static_cast<int>(threadIdx.x) % kWarpSize, kWarpSize};
  }
};

// A head in shared memory, as rows of D elements and 16 bytes more.
template <class T, int D>
struct Head {
  static constexpr int kRow = D + kWide;
  // Of sums on their way out: pairs of floats, of which four rows are stored at a time, lie in different
  // banks. Not of wider heads, where a kernel would spill registers (nvcc 13.0, sm_80).
  static constexpr int kSumsRow = D <= 64 ? D + 8 : kRow;
  static constexpr int kTileElements = kTile * kRow;
  static constexpr int kSteps = D / kTile;

  const AttentionShape& shape;
  const RotaryTables& tables;
  const AttentionPlan& plan;
  HeadNumber number;
  int tokens;

  __device__ __forceinline__ Head(const AttentionShape& of, const RotaryTables& by, const AttentionPlan& how)
      : shape(of), tables(by), plan(how), number(of, how.parts), tokens(number.tokens(of)) {}

  __device__ __forceinline__ Slots slots() const { return {static_cast<int>(shape.num_prefix), tokens}; }
  __device__ __forceinline__ int tiles() const { return slots().tiles(); }
  __device__ __forceinline__ int width() const { return static_cast<int>(shape.head_dim); }

  // Slots [first, first + count) on their way into `rows`: to be waited for.
  __device__ __forceinline__ void copy(T* rows, const HeadsView& view, const Team& team, int first,
                                       int count) const {
    const Tokens<const T> from = number.computed_here().tokens_of<T>(view, shape);
    if (plan.wide) {
      for_each_group<kWide>(team, first, count, [&](int token, int row, int i) {
        const bool exists = token >= 0 && i < width();
        copy_async(rows + row * kRow + i, exists ? from.at(token) + i : from.data, exists);
      });
    } else {
      for_each_group<1>(team, first, count, [&](int token, int row, int i) {
        rows[row * kRow + i] = token >= 0 && i < width() ? from.at(token)[i] : T{};
      });
    }
  }

  // Turns slots [first, first + count), which lie in `rows` of ROW elements. sign -1: backwards.
  template <int ROW = kRow, class Element>
  __device__ __forceinline__ void turn(Element* rows, float sign, const Team& team, int first,
                                       int count) const {
    if (!tables.cos) return;
    // One after the other, so that the registers of both aren't needed at a time.
    if (tables.grid > 0) {
      turn_by<true, ROW>(rows, sign, team, first, count);
    } else {
      turn_by<false, ROW>(rows, sign, team, first, count);
    }
  }

  // Slots [first, first + count) of `rows`, of kSumsRow elements, rounded to T, to where they belong in a
  // contiguous [B, N, H, D].
  template <class Element>
  __device__ __forceinline__ void store(const Element* rows, void* tensor, const Team& team, int first,
                                        int count) const {
    const Tokens<T> to = number.computed_here().tokens_of<T>(tensor, shape);
    const auto store_group = [&](auto E, int token, int row, int i) {
      constexpr int kElements = decltype(E)::value;
      if (token < 0 || i >= width()) return;
      float values[kElements];
      load_floats(rows + row * kSumsRow + i, values);
      Packed<T, kElements>::pack(values).store_whole(to.at(token) + i);
    };
    for_each_group_of_any<2, Element>(team, first, count, store_group);
  }

 private:
  template <bool COMPACT, int ROW, class Element>
  __device__ __forceinline__ void turn_by(Element* rows, float sign, const Team& team, int first,
                                          int count) const {
    const HeadRotation<COMPACT> rotation = {shape, tables, number.computed_here()};
    const auto turn_group = [&](auto E, int token, int row, int i) {
      if (token < 0 || i >= width() || !rotation.turns(token)) return;
      rotation.template turn<decltype(E)::value>(rows + row * ROW, token, i, sign);
    };
    for_each_group_of_any<COMPACT ? 1 : 2, Element>(team, first, count, turn_group);
  }

  // How many groups of E elements a row has. Those of 32 bytes give a bank of shared memory two of the eight
  // lanes that are served at a time, and three where a row ends among the first or last of four: such rows
  // have empty groups at their end.
  template <class Element, int E>
  static constexpr int kGroupsOf = E * sizeof(Element) > kWidestAccess ? (D / E + 3) / 4 * 4 : D / E;

  // Calls body(token, row, element) for groups of E elements of `count` slots from `first` on. UNROLLED: of
  // so many groups a thread loads the angles before it waits for any.
  template <int E, int UNROLLED = 1, class Element = T, class Body>
  __device__ __forceinline__ void for_each_group(const Team& team, int first, int count,
                                                 const Body& body) const {
    constexpr int kGroups = kGroupsOf<Element, E>;
#pragma unroll UNROLLED
    for (int i = team.thread; i < count * kGroups; i += team.size) {
      body(slots().token(first + i / kGroups), i / kGroups, i % kGroups * E);
    }
  }

  // Calls body(Constant<E>{}, token, row, element) with the E that can be accessed at a time, of rows of
  // Element.
  template <int UNROLLED, class Element, class Body>
  __device__ __forceinline__ void for_each_group_of_any(const Team& team, int first, int count,
                                                        const Body& body) const {
    if (plan.wide) {
      constexpr int kElements = kWide;
      for_each_group<kElements, UNROLLED, Element>(team, first, count,
                                                   [&](auto... at) { body(Constant<kElements>{}, at...); });
    } else {
      for_each_group<1>(team, first, count, [&](auto... at) { body(Constant<1>{}, at...); });
    }
  }
};

// --- walking over tiles ------------------------------------------------------------------------------------

// Two vectors of each token: k and v, or q and dout. The first is rotated.
struct Vectors {
  const HeadsView& turned;
  const HeadsView& plain;
};

// A block's shared memory: the vectors of a stage, and OWN of each slot that a warp owns.
template <class T, int D, int OWN>
struct Stages {
  static constexpr int kTileElements = Head<T, D>::kTileElements;
  static constexpr int kOwnElements = OWN * kTileElements;

  const Head<T, D>& head;
  T* turned;
  T* plain;
  T* own;   // the warp's
  T* rest;  // behind all of these

  __device__ __forceinline__ explicit Stages(const Head<T, D>& of)
      : head(of),
        turned(dynamic_shared_memory<T>()),
        plain(turned + of.plan.stage_tiles * kTileElements),
        own(plain + of.plan.stage_tiles * kTileElements +
            static_cast<int>(threadIdx.x) / kWarpSize * kOwnElements),
        rest(plain + of.plan.stage_tiles * kTileElements + of.plan.warps * kOwnElements) {}

  // Walks over the tiles [begin, end) of `others`: calls walk(is_first, stage, from, to) for what of them is
  // in shared memory, from tile `stage` on. Before the first call the warp's own tile is there too, if it has
  // one. `loaded`: the others are there already.
  template <class Walk>
  __device__ __forceinline__ void walk_over(const Vectors& others, const Vectors& owned, int own_tile,
                                            int begin, int end, bool loaded, const Walk& walk) const {
    const AttentionPlan& plan = head.plan;
    const int start = begin / plan.stage_tiles * plan.stage_tiles;
    for (int stage = start; stage < end; stage += plan.stage_tiles) {
      fetch(others, owned, loaded ? -1 : stage, stage == start ? own_tile : -1);
      walk(stage == start, stage, max(begin, stage), min(end, stage + plan.stage_tiles));
    }
  }

 private:
  // The stage from tile `stage` on, and a warp's own tile, unless they are negative.
  __device__ __forceinline__ void fetch(const Vectors& others, const Vectors& owned, int stage,
                                        int own_tile) const {
    const Team block = Team::block(), warp = Team::warp();
    const int first = stage * kTile, count = min(head.plan.stage_tiles, head.tiles() - stage) * kTile;
    if (stage >= 0) {
      __syncthreads();
      head.copy(turned, others.turned, block, first, count);
      head.copy(plain, others.plain, block, first, count);
    }
    if (own_tile >= 0) {
      head.copy(own, owned.turned, warp, own_tile * kTile, kTile);
      if constexpr (OWN == 2) head.copy(own + kTileElements, owned.plain, warp, own_tile * kTile, kTile);
    }
    const auto synchronize = [&] {
      if (stage >= 0) {
        __syncthreads();
      } else {
        __syncwarp();
      }
    };
    wait_for_copies();
    synchronize();
    if (stage >= 0) head.turn(turned, 1.0f, block, first, count);
    if (own_tile >= 0) head.turn(own, 1.0f, warp, own_tile * kTile, kTile);
    synchronize();
  }
};

// Whether a tile of scores has some that don't count.
__device__ __forceinline__ bool is_masked(const Slots& slots, bool causal, int query_tile, int key_tile) {
  return slots.has_empty(key_tile) || (causal && query_tile == key_tile);
}

__device__ __forceinline__ bool counts(const Slots& slots, bool causal, int query, int key) {
  return slots.token(key) >= 0 && !(causal && key > query);
}

// The two vectors of each of a warp's 16 slots. Registers hold the first where HELD: where there are enough.
template <class T, int D, bool HELD>
struct OwnTiles {
  static constexpr int kSteps = D / kTile;

  T* rows;
  Operand held[HELD ? kSteps : 1];

  __device__ __forceinline__ explicit OwnTiles(T* own) : rows(own) {}

  // When the rows are there.
  __device__ __forceinline__ void hold() {
    if constexpr (HELD) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) held[k] = loaded(0, k);
    }
  }

  // Changes the signs of the first vectors.
  __device__ __forceinline__ void negate() {
    static_assert(HELD);
#pragma unroll
    for (Operand& tile : held) {
#pragma unroll
      for (uint32_t& word : tile.words) word ^= 0x80008000u;
    }
  }

  __device__ __forceinline__ Operand turned(int k) const {
    if constexpr (HELD) {
      return held[k];
    } else {
      return loaded(0, k);
    }
  }
  __device__ __forceinline__ Operand plain(int k) const { return loaded(1, k); }

 private:
  __device__ __forceinline__ Operand loaded(int which, int k) const {
    return load_tile(static_cast<const T*>(rows) + which * Head<T, D>::kTileElements + k * kTile,
                     Head<T, D>::kRow);
  }
};

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

// --- launching ---------------------------------------------------------------------------------------------

// What a block takes of shared memory, in bytes.
struct AttentionMemory {
  size_t tile;   // of the two tensors that are walked over
  size_t warp;   // for what it owns
  size_t slots;  // of a tile, for all tiles

  // OWN: vectors of each slot that a warp owns. floats: of each slot, for all of them.
  template <class T, int D, int OWN>
  static AttentionMemory of_stages(int floats) {
    using BlockStages = Stages<T, D, OWN>;
    return {.tile = 2 * BlockStages::kTileElements * sizeof(T),
            .warp = BlockStages::kOwnElements * sizeof(T),
            .slots = kTile * floats * sizeof(float)};
  }

  size_t of_block(const AttentionPlan& plan) const {
    return plan.stage_tiles * tile + plan.warps * warp + plan.tiles * slots;
  }
  // How many tiles a stage may have.
  int stage(size_t limit, const AttentionPlan& plan) const {
    const size_t others = plan.warps * warp + plan.tiles * slots;
    return limit < others ? 0 : static_cast<int>((limit - others) / tile);
  }
};

// As many as leave the fewest idle when they share `tiles` in rounds.
inline int warps_for(int tiles, int most) {
  if (tiles <= most) return tiles;
  int best = most;
  const auto idle = [&](int warps) { return (warps - tiles % warps) % warps; };
  for (int warps = most - 1; warps > most / 2; --warps) {
    if (idle(warps) < idle(best)) best = warps;
  }
  return best;
}

template <class Kernel>
Error plan_attention(Kernel* kernel, const AttentionShape& shape, const AttentionMemory& memory,
                     int most_warps, AttentionPlan& plan) {
  const size_t limit = max_shared_memory(), half = (limit - 1024) / 2;  // CUDA takes 1 KB a block for itself
  plan.tiles = plan.part_tiles = plan.stage_tiles =
      Slots{static_cast<int>(shape.num_prefix), static_cast<int>(shape.tokens)}.tiles();
  for (const bool two : {true, false}) {
    plan.warps = warps_for(plan.tiles, two ? most_warps / 2 : most_warps);
    if (memory.of_block(plan) > (two ? half : limit)) continue;
    // Too few heads to fill the GPU: several blocks share one.
    const int64_t blocks = resident_blocks(kernel, plan.warps * kWarpSize, memory.of_block(plan));
    const int64_t parts = blocks / (shape.batch * shape.heads);
    plan.part_tiles =
        ceil_div(plan.tiles, std::clamp<int>(static_cast<int>(parts), 1, ceil_div(plan.tiles, 4)));
    plan.warps = std::min(plan.warps, warps_for(plan.part_tiles, most_warps / 2));
    plan.parts = ceil_div(plan.tiles, plan.part_tiles);
    return nullptr;
  }
  // In stages. The blocks of a head, each with one tile a warp, run at the same time and find in the cache
  // what the others have read.
  constexpr int kLeastTiles = 4;
  plan.warps = most_warps / 2;
  int most = memory.stage(half, plan);
  if (most < kLeastTiles) most = memory.stage(limit, plan);
  if (most < 1) return "too little shared memory for so many tokens";
  plan.stage_tiles = ceil_div(plan.tiles, ceil_div(plan.tiles, most));
  plan.part_tiles = plan.warps;
  plan.parts = ceil_div(plan.tiles, plan.part_tiles);
  return nullptr;
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

// D: what the kernel is compiled for.
template <int D, class Params>
Error launch_attention(void (*kernel)(Params, AttentionPlan), const Params& params,
                       const AttentionMemory& memory, bool wide, Stream stream) {
  const AttentionShape& shape = params.shape;
  AttentionPlan plan;
  if (const Error error = plan_attention(kernel, shape, memory, kMaxWarps<D>, plan)) return error;
  plan.wide = wide;
  const dim3 grid = {static_cast<unsigned>(shape.batch * shape.heads * plan.parts), 1, 1};
  const dim3 block = {static_cast<unsigned>(plan.warps * kWarpSize), 1, 1};
  return launch_with_memory(kernel, grid, block, memory.of_block(plan), stream, params, plan);
}

// Calls body(T{}, Constant<D>{}) with the element type and the least D that a kernel is compiled for.
template <class Body>
Error with_attention_types(const AttentionShape& shape, const Body& body) {
  const auto with_type = [&](auto element) {
    if (shape.head_dim <= 64) return body(element, Constant<64>{});
    if (shape.head_dim <= 96) return body(element, Constant<96>{});
    if (shape.head_dim <= 112) return body(element, Constant<112>{});
    return body(element, Constant<kMaxHeadDim>{});
  };
  return shape.dtype == DType::BFloat16 ? with_type(BFloat16{}) : with_type(Float16{});
}

}  // namespace evakernels::cuda
