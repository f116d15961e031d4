// The tokens of one head on their way between global memory and tiles in shared memory.
#pragma once

#include "cuda/attention_plan.h"
#include "cuda/rotary.cuh"

namespace evakernels::cuda {

// The threads that share a task: those of a block, or of a warp.
struct Threads {
  unsigned rank;
  unsigned count;

  static __device__ __forceinline__ Threads of_block() { return {threadIdx.x, blockDim.x}; }
  static __device__ __forceinline__ Threads of_warp() { return {threadIdx.x % kWarpSize, kWarpSize}; }
};

// A head's tokens in global memory. `data` is never null.
template <class T>
struct TokenRows {
  T* data;
  unsigned bytes;  // from token to token

  __device__ __forceinline__ TokenRows(T* first, int64_t stride)
      : data(first), bytes(static_cast<unsigned>(stride * sizeof(T))) {}

  // In one instruction: were `bytes` widened ahead of a loop, it would be a product of 64 bits, of four.
  __device__ __forceinline__ T* at(int token) const {
    using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
    unsigned distance = bytes;
    hide_origin(distance);
    return reinterpret_cast<T*>(reinterpret_cast<Byte*>(data) + int64_t{token} * static_cast<int>(distance));
  }
};

// Whose tokens: keys may be more or fewer than queries, and heads of theirs serve several of the queries'.
enum class Side { Queries, Keys };

// The head of a block, and its rows of D elements in shared memory.
template <class T, int D>
struct Head {
  const AttentionShape& shape;
  const RotaryTables& tables;
  const AttentionPlan& plan;
  unsigned sample, head;
  int tokens;  // queries
  int keys;

  __device__ __forceinline__ Head(const AttentionShape& of, const RotaryTables& by, const AttentionPlan& how)
      : shape(of),
        tables(by),
        plan(how),
        sample(blockIdx.x / static_cast<unsigned>(how.blocks) / static_cast<unsigned>(of.heads)),
        head(blockIdx.x / static_cast<unsigned>(how.blocks) % static_cast<unsigned>(of.heads)),
        tokens(length()),
        keys(tokens + how.more_keys) {}

  __device__ __forceinline__ Slots slots(Side side = Side::Queries) const {
    return Slots::of(shape, side == Side::Keys ? keys : tokens);
  }
  __device__ __forceinline__ int tiles() const { return slots().tiles(); }
  __device__ __forceinline__ int key_tiles() const { return slots(Side::Keys).tiles(); }
  __device__ __forceinline__ int width() const { return static_cast<int>(shape.head_dim); }

  __device__ __forceinline__ TokenRows<const T> rows_of(const HeadsView& view,
                                                        Side side = Side::Queries) const {
    const auto [sample, head] = computed_here();
    const unsigned number = side == Side::Keys ? head / static_cast<unsigned>(plan.group) : head;
    const T* data = static_cast<const T*>(view.data) + number * view.head_stride;
    return {data + (shape.offsets.data ? first_token() * view.token_stride : sample * view.batch_stride),
            view.token_stride};
  }

  // Of a contiguous [B, N, H, D], [B, M, H, D] or [T, H, D].
  __device__ __forceinline__ TokenRows<T> rows_of(void* tensor, Side side) const {
    const auto [sample, head] = computed_here();
    const int64_t of_sample = side == Side::Keys ? shape.keys : shape.tokens;
    const int64_t token = shape.offsets.data ? first_token() : sample * of_sample;
    return {static_cast<T*>(tensor) + (token * shape.heads + head) * shape.head_dim,
            shape.heads * shape.head_dim};
  }

  // Where it begins in a [B, H, N], or [H, T].
  __device__ __forceinline__ int64_t first_number() const {
    if (shape.offsets.data) return head * shape.offsets.tokens + first_token();
    return (sample * shape.heads + head) * shape.tokens;
  }

  // Whether tiles of scores have some that don't count: those of the queries from a tile on, and of `count`
  // tiles of keys.
  __device__ __forceinline__ bool is_masked(int query_tile, int key_tile, int count = 1) const {
    return slots(Side::Keys).has_empty(key_tile, count) || query_tile + plan.sight.whole < key_tile + count;
  }
  // Whether that of a query's slot and a key's does.
  __device__ __forceinline__ bool counts(int query, int key) const {
    return slots(Side::Keys).has(key - slots().shift) && key <= query + plan.sight.last;
  }

  // Slots [first, first + count) on their way into `rows`: to be waited for.
  __device__ __forceinline__ void copy(T* rows, const HeadsView& view, Side side, const Threads& threads,
                                       int first, int count) const {
    const TokenRows<const T> from = rows_of(view, side);
    if (plan.wide) {
      for_each_chunk<kWide>(threads, first, count, [&](int token, int row, int i) {
        copy_async(rows + row * kRow<D> + i, from.at(token) + i, slots(side).has(token) && i < width());
      });
    } else {
      for_each_chunk<1>(threads, first, count, [&](int token, int row, int i) {
        rows[row * kRow<D> + i] = slots(side).has(token) && i < width() ? from.at(token)[i] : T{};
      });
    }
  }

  // Rotates slots [first, first + count), which lie in `rows`. Where there are tables, both sides have the
  // same slots.
  __device__ __forceinline__ void rotate(T* rows, const Threads& threads, int first, int count) const {
    if (!tables.cos) return;
    plan.wide ? rotate_chunks<kWide>(rows, threads, first, count)
              : rotate_chunks<1>(rows, threads, first, count);
  }

  // Slots [first, first + count) to where they belong in a contiguous [B, N, H, D], rounded to T. What they
  // hold is what load(token, row, i, values) gives of a row, from element i on.
  template <class Load>
  __device__ __forceinline__ void store(void* tensor, Side side, const Threads& threads, int first, int count,
                                        const Load& load) const {
    plan.wide ? store_chunks<kWide>(tensor, side, threads, first, count, load)
              : store_chunks<1>(tensor, side, threads, first, count, load);
  }

  // values[E], the elements of a token from i on, rotated backwards; load(n, partners) gives those from n on.
  template <int E, class Load>
  __device__ __forceinline__ void rotate_back(float (&values)[E], int token, int i, const Load& load) const {
    if (!tables.cos) return;
    if (tables.grid > 0) {
      rotary<true>().rotate_back(values, token, i, load);
    } else {
      rotary<false>().rotate_back(values, token, i, load);
    }
  }

  // Calls body(token, row, element) for chunks of E elements of `count` slots from `first` on. A power of two
  // of threads, of which some may have nothing to do, share a row: so each keeps its columns, and what
  // belongs to them is computed once.
  template <int E, class Body>
  __device__ __forceinline__ void for_each_chunk(const Threads& threads, int first, int count,
                                                 const Body& body) const {
    constexpr unsigned kThreads = power_of_two(smaller(D / E, kWarpSize));
    const int begin = first - slots().shift, rows = static_cast<int>(threads.count / kThreads);
    const int column = static_cast<int>(threads.rank % kThreads) * E;
#pragma unroll 1
    for (int row = static_cast<int>(threads.rank / kThreads); row < count; row += rows) {
      for (int i = column; i < D; i += static_cast<int>(kThreads) * E) body(begin + row, row, i);
    }
  }

 private:
  struct Number {
    unsigned sample, head;
  };

  // What follows from these is computed where it is used, in a loop too: kept for the copies alone, it would
  // take 2 to 18 registers of the products (nvcc 13.0, sm_90), and one kernel would spill 28 bytes.
  __device__ __forceinline__ Number computed_here() const {
    Number number = {sample, head};
    hide_origin(number.sample);
    hide_origin(number.head);
    return number;
  }

  template <bool COMPACT>
  __device__ __forceinline__ Rotary<COMPACT> rotary() const {
    const auto [sample, head] = computed_here();
    int64_t first = 0;
    if (tables.token_index) {
      first = shape.offsets.data ? first_token() : sample * (shape.tokens - shape.num_prefix);
    }
    return {shape, tables, head, static_cast<unsigned>(first)};
  }

  template <int E>
  __device__ __forceinline__ void rotate_chunks(T* rows, const Threads& threads, int first, int count) const {
    // One after the other, so that the registers of both aren't needed at a time.
    if (tables.grid > 0) {
      rotate_by<E>(rotary<true>(), rows, threads, first, count);
    } else {
      rotate_by<E>(rotary<false>(), rows, threads, first, count);
    }
  }
  template <int E, class Rotation>
  __device__ __forceinline__ void rotate_by(const Rotation& rotary, T* rows, const Threads& threads,
                                            int first, int count) const {
    for_each_chunk<E>(threads, first, count, [&](int token, int row, int i) {
      if (!slots().has(token) || i >= width()) return;
      rotary.template rotate<E>(rows + row * kRow<D>, token, i);
    });
  }

  template <int E, class Load>
  __device__ __forceinline__ void store_chunks(void* tensor, Side side, const Threads& threads, int first,
                                               int count, const Load& load) const {
    const TokenRows<T> to = rows_of(tensor, side);
    for_each_chunk<E>(threads, first, count, [&](int token, int row, int i) {
      if (!slots(side).has(token) || i >= width()) return;
      float values[E];
      load(token, row, i, values);
      Packed<T, E>::pack(values).store_whole(to.at(token) + i);
    });
  }

  __device__ __forceinline__ int64_t first_token() const { return offset_of(shape.offsets, sample); }

  __device__ __forceinline__ int length() const {
    if (!shape.offsets.data) return static_cast<int>(shape.tokens);
    const int64_t first = first_token(), end = offset_of(shape.offsets, int64_t{sample} + 1);
    if (first >= 0 && first <= end && end <= shape.offsets.tokens && end - first <= shape.tokens) {
      return static_cast<int>(end - first);
    }
    refuse_silently("packed_attention",
                    "cu_seqlens are out of range, or a sequence is longer than max_seqlen");
    return 0;
  }
};

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

}  // namespace evakernels::cuda
