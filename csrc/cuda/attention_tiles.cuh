// Copies of one head's tokens between global memory and tiles in shared memory.
#pragma once

#include "cuda/attention_plan.h"
#include "cuda/rotary.cuh"

namespace evakernels::cuda {

// The threads that share a copy: a block's or a warp's.
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
  unsigned bytes;  // token stride

  __device__ __forceinline__ TokenRows(T* first, int64_t stride)
      : data(first), bytes(static_cast<unsigned>(stride * sizeof(T))) {}

  // One 32 x 32 -> 64-bit multiply; hoisted out of a loop, `bytes` would be widened and take four.
  __device__ __forceinline__ T* at(int token) const {
    using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
    unsigned distance = bytes;
    optimization_barrier(distance);
    return reinterpret_cast<T*>(reinterpret_cast<Byte*>(data) + int64_t{token} * static_cast<int>(distance));
  }
};

// Keys may differ from queries in number, and one head of keys may serve several query heads.
enum class Side { Queries, Keys };

// The head of a block, and its rows of D elements in shared memory.
template <class T, int D>
struct Head {
  const AttentionShape& shape;
  const RotaryTables& tables;
  const AttentionPlan& plan;
  unsigned sample, head;
  int seqlen_q;
  int seqlen_k;

  __device__ __forceinline__ Head(const AttentionShape& of, const RotaryTables& by, const AttentionPlan& how)
      : shape(of),
        tables(by),
        plan(how),
        sample(blockIdx.x / static_cast<unsigned>(how.blocks) / static_cast<unsigned>(of.heads)),
        head(blockIdx.x / static_cast<unsigned>(how.blocks) % static_cast<unsigned>(of.heads)),
        seqlen_q(length()),
        seqlen_k(seqlen_q + how.seqlen_diff) {}

  __device__ __forceinline__ PaddedRows padded_rows(Side side = Side::Queries) const {
    return PaddedRows::of(shape, side == Side::Keys ? seqlen_k : seqlen_q);
  }
  __device__ __forceinline__ int tiles() const { return padded_rows().tiles(); }
  __device__ __forceinline__ int key_tiles() const { return padded_rows(Side::Keys).tiles(); }
  __device__ __forceinline__ int width() const { return static_cast<int>(shape.head_dim); }

  __device__ __forceinline__ TokenRows<const T> token_rows(const HeadsView& view,
                                                           Side side = Side::Queries) const {
    const auto [sample, head] = recomputed();

    const unsigned number = side == Side::Keys ? head / static_cast<unsigned>(plan.qhead_per_khead) : head;
    const T* data = static_cast<const T*>(view.data) + number * view.head_stride;
    // #sequence
    return {data + (shape.offsets.data ? first_token() * view.token_stride : sample * view.batch_stride),
            view.token_stride};
  }

  // The head's rows in a contiguous [B, N, H, D], [B, M, H, D] or [T, H, D].
  __device__ __forceinline__ TokenRows<T> token_rows(void* tensor, Side side) const {
    const auto [sample, head] = recomputed();
    const int64_t of_sample = side == Side::Keys ? shape.keys : shape.tokens;
    const int64_t token = shape.offsets.data ? first_token() : sample * of_sample;
    return {static_cast<T*>(tensor) + (token * shape.heads + head) * shape.head_dim,
            shape.heads * shape.head_dim};
  }

  // The head's first element in a [B, H, N] or [H, T].
  __device__ __forceinline__ int64_t first_number() const {
    if (shape.offsets.data) return head * shape.offsets.tokens + first_token();
    return (sample * shape.heads + head) * shape.tokens;
  }

  // First row of block `part` of `parts` in a workspace [H, parts, rows].
  __device__ __forceinline__ int64_t workspace_row(int part, int parts, int64_t rows) const {
    const auto [sample, head] = recomputed();
    const int64_t of_sample =
        shape.offsets.data ? first_token() + sample * kTile : int64_t{sample} * plan.tiles * kTile;
    return (int64_t{head} * parts + part) * rows + of_sample;
  }

  // Whether the scores of a query tile and `count` key tiles need a mask.
  __device__ __forceinline__ bool needs_mask(int query_tile, int key_tile, int count = 1) const {
    return padded_rows(Side::Keys).has_padding(key_tile, count) ||
           query_tile + plan.mask.full_tiles < key_tile + count;
  }
  // Whether the query in one padded row attends to the key in another.
  __device__ __forceinline__ bool is_visible(int query, int key) const {
    return padded_rows(Side::Keys).contains(key - padded_rows().offset) && key <= query + plan.mask.max_key;
  }

  // Copies padded rows [first, first + count) into `rows`, with cp.async if accesses are wide.
  __device__ __forceinline__ void copy(T* rows, const HeadsView& view, Side side, const Threads& threads,
                                       int first, int count) const {
    const TokenRows<const T> from = token_rows(view, side);
    if (plan.wide) {
      for_each_chunk<kWide>(threads, first, count, [&](int token, int row, int i) {
        copy_async(rows + row * kRow<D> + i, from.at(token) + i,
                   padded_rows(side).contains(token) && i < width());
      });
    } else {
      for_each_chunk<1>(threads, first, count, [&](int token, int row, int i) {
        rows[row * kRow<D> + i] = padded_rows(side).contains(token) && i < width() ? from.at(token)[i] : T{};
      });
    }
  }

  // Rotates padded rows [first, first + count) in `rows`. With tables both sides have the same padding.
  __device__ __forceinline__ void rotate(T* rows, const Threads& threads, int first, int count) const {
    if (!tables.cos) return;
    plan.wide ? rotate_chunks<kWide>(rows, threads, first, count)
              : rotate_chunks<1>(rows, threads, first, count);
  }

  // Stores padded rows [first, first + count) in a contiguous [B, N, H, D], rounded to T. load(token, row, i,
  // values) returns a row's elements from i on.
  template <class Load>
  __device__ __forceinline__ void store(void* tensor, Side side, const Threads& threads, int first, int count,
                                        const Load& load) const {
    plan.wide ? store_chunks<kWide>(tensor, side, threads, first, count, load)
              : store_chunks<1>(tensor, side, threads, first, count, load);
  }

  // Rotates values, a token's elements from i on, by the negative angle; load(n, partners) returns those from
  // n on.
  template <int E, class Load>
  __device__ __forceinline__ void rotate_back(float (&values)[E], int token, int i, const Load& load) const {
    if (tables.cos) rotary().rotate_back(values, token, i, load);
  }

  // Calls body(token, row, element) for chunks of E elements of padded rows [first, first + count). A power
  // of two of threads share a row, so that each keeps its columns and computes their offsets once.
  template <int E, class Body>
  __device__ __forceinline__ void for_each_chunk(const Threads& threads, int first, int count,
                                                 const Body& body) const {
    constexpr unsigned kThreads = power_of_two(smaller(D / E, kWarpSize));
    const int begin = first - padded_rows().offset, rows = static_cast<int>(threads.count / kThreads);
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

  // Forces addresses to be recomputed inside loops: hoisted, they would take registers from the matmuls and
  // one kernel would spill.
  __device__ __forceinline__ Number recomputed() const {
    Number number = {sample, head};
    optimization_barrier(number.sample);
    optimization_barrier(number.head);
    return number;
  }

  __device__ __forceinline__ Rotary rotary() const {
    const auto [sample, head] = recomputed();
    int64_t first = 0;
    if (tables.token_index) {
      // #first-index
      first = shape.offsets.data ? first_token() : sample * (shape.tokens - shape.num_prefix);
    }
    return {shape, tables, head, static_cast<unsigned>(first)};
  }

  template <int E>
  __device__ __forceinline__ void rotate_chunks(T* rows, const Threads& threads, int first, int count) const {
    const Rotary rotation = rotary();
    for_each_chunk<E>(threads, first, count, [&](int token, int row, int i) {
      if (!padded_rows().contains(token) || i >= width()) return;
      rotation.rotate<E>(rows + row * kRow<D>, token, i);
    });
  }

  template <int E, class Load>
  __device__ __forceinline__ void store_chunks(void* tensor, Side side, const Threads& threads, int first,
                                               int count, const Load& load) const {
    const TokenRows<T> to = token_rows(tensor, side);
    for_each_chunk<E>(threads, first, count, [&](int token, int row, int i) {
      if (!padded_rows(side).contains(token) || i >= width()) return;
      float values[E];
      load(token, row, i, values);
      Packed<T, E>::pack(values).store_vector(to.at(token) + i);
    });
  }

  __device__ __forceinline__ int64_t first_token() const { return offset_of(shape.offsets, sample); }

  __device__ __forceinline__ int length() const {
    if (!shape.offsets.data) return static_cast<int>(shape.tokens);
    const int64_t first = first_token(), end = offset_of(shape.offsets, int64_t{sample} + 1);
    if (first >= 0 && first <= end && end <= shape.offsets.tokens && end - first <= shape.tokens) {
      return static_cast<int>(end - first);
    }
    __trap();  // `fail_launch` takes up to 68 registers
    return 0;
  }
};

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

}  // namespace evakernels::cuda
