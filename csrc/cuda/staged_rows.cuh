// Rows of 16-bit elements that begin at any multiple of 4 bytes, by way of shared memory: words of 16 bytes
// go between it and global memory, and a thread finds its pairs of elements there.
//
// A row lies in its stage as in global memory, as far from a line of 128 bytes, and the requests of a warp
// begin where lines do: each sector is asked for once. A word at either end that is not the row's alone goes
// by pieces of 4 bytes, as the rest of it is another row's or nobody's. So, of a row that begins 24 bytes
// after a line and ends 8 bytes after a word:
//
//   line           0       16      32      48              112     128           16 k
//   word           |-------|-------|-------|-------| ... |-------|-------| ... |-------|
//   row, stage     . . . . . . pppp WWWWWWW WWWWWWW  ...  WWWWWWW WWWWWWW  ...  pppp . .
//   word copied by  (0)     (1)     2       3              7       8             (k)        thread
//   piece copied by         2..3                                                 4..5       thread
//
// Threads in brackets have no word. Thread t has the pieces 4 t of the first word for t < 4, and of the last
// for 4 <= t < 8. What is computed with is dealt otherwise: vector `v` of a row is the pair of elements 4 v
// bytes from its beginning, of thread v modulo the threads of the row. The lanes of a warp so find theirs in
// 32 banks side by side, wherever the row begins.
//
// A block has kRowsPerBlock rows of one warp each, or one of several warps. Each row has its stages one
// behind the other, a stage for each matrix; in backward two for each input, of which one is read while the
// next row is on its way into the other.
#pragma once

#include "cuda/norm_plan.h"
#include "cuda/norm_rows.cuh"

namespace evakernels::cuda {

constexpr int kPiece = 4;  // bytes

// The threads of a row wait for each other.
__device__ __forceinline__ void synchronize_row() {
  if (blockDim.x > kWarpSize) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}

__device__ __forceinline__ int place_in_line(const void* row) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(row) % kLine);
}

// Calls word(at) for the words of 16 bytes and piece(at) for the pieces of a row that are this thread's, `at`
// bytes from its beginning.
template <class Word, class Piece>
__device__ __forceinline__ void for_each_word(const void* row, int bytes, const Word& word,
                                              const Piece& piece) {
  const int thread = static_cast<int>(threadIdx.x), step = static_cast<int>(blockDim.x) * kWidestAccess;
  const int before = place_in_line(row);
  // Where whole words begin and end.
  const int begin = -before & (kWidestAccess - 1), end = bytes - ((before + bytes) & (kWidestAccess - 1));
  for (int at = thread * kWidestAccess - before; at < end; at += step) {
    if (at >= 0) word(at);
  }
  constexpr int kPieces = kWidestAccess / kPiece;
  const bool last = thread >= kPieces;
  const int at = (last ? end : begin) - kWidestAccess + thread * kPiece;
  if (thread < 2 * kPieces && at >= (last ? begin : 0) && at < bytes) piece(at);
}

// Like RowPart, but for whole rows. With two STAGES the next is on its way while one is read. The matrix may
// be null.
template <class T, int STAGES>
class StagedInput {
 public:
  static constexpr int kStages = STAGES;

  __device__ __forceinline__ void use(int64_t width, char* stages) {
    bytes_ = static_cast<int>(width * int64_t{sizeof(T)});
    stage_ = stages;
    next_stage_ = stages + (STAGES - 1) * stage_bytes(width);
  }

  __device__ __forceinline__ void point_to(const void* matrix, int64_t row, int64_t width) {
    row_ = matrix ? static_cast<const T*>(matrix) + row * width : nullptr;
  }

  // Sends the row that begins `ahead` elements after the one that this points to on its way.
  __device__ __forceinline__ void fetch(int64_t ahead) const {
    const T* const row = row_ + ahead;
    const char* const from = reinterpret_cast<const char*>(row);
    char* const to = next_stage_ + place_in_line(row);
    for_each_word(
        row, bytes_, [&](int at) { copy_async(to + at, from + at); },
        [&](int at) { copy_async<kPiece>(to + at, from + at); });
  }

  __device__ __forceinline__ void change_stages() {
    if constexpr (STAGES == 1) return;
    char* const stage = stage_;
    stage_ = next_stage_;
    next_stage_ = stage;
  }

  __device__ __forceinline__ void get(int vector, int, float (&values)[2]) const {
    load_floats(reinterpret_cast<const T*>(stage_ + place_in_line(row_)) + 2 * vector, values);
  }

 private:
  const T* row_;
  int bytes_;
  char* stage_;
  char* next_stage_;
};

// Like RowOutput, but for the end: when all threads have put what is theirs, they store it.
template <class T>
class StagedOutput {
 public:
  static constexpr int kStages = 1;

  __device__ __forceinline__ void use(int64_t width, char* stage) {
    bytes_ = static_cast<int>(width * int64_t{sizeof(T)});
    stage_ = stage;
  }

  __device__ __forceinline__ void point_to(void* matrix, int64_t row, int64_t width) {
    row_ = matrix ? static_cast<T*>(matrix) + row * width : nullptr;
  }

  __device__ __forceinline__ void put(int vector, const float (&values)[2]) const {
    store_floats(reinterpret_cast<T*>(stage_ + place_in_line(row_)) + 2 * vector, values);
  }

  // Nothing if there is no matrix.
  __device__ __forceinline__ void store() const {
    if (!row_) return;
    const char* const from = stage_ + place_in_line(row_);
    char* const to = reinterpret_cast<char*>(row_);
    for_each_word(
        row_, bytes_, [&](int at) { store_word<kWidestAccess>(to + at, from + at); },
        [&](int at) { store_word<kPiece>(to + at, from + at); });
  }

 private:
  template <int BYTES>
  static __device__ __forceinline__ void store_word(char* to, const char* from) {
    using Word = typename WordOf<BYTES>::type;
    store_whole(reinterpret_cast<Word*>(to), load(reinterpret_cast<const Word*>(from)));
  }

  T* row_;
  int bytes_;
  char* stage_;
};

// The rows of a kernel with the layout L: rows that are read several times, with two STAGES if each is
// fetched while the one before is read; rows that are read once; rows that are written.
template <class T, class L, int STAGES = 1>
using InputRow = std::conditional_t<L::kStaged, StagedInput<T, STAGES>, RowPart<T, L::E, L::V>>;
template <class T, class L, int STAGES = 1>
using PassingInputRow = std::conditional_t<L::kStaged, StagedInput<T, STAGES>, PassingRow<T, L::E>>;
template <class T, class L>
using OutputRow = std::conditional_t<L::kStaged, StagedOutput<T>, RowOutput<T, L::E>>;

// Gives the rows of a kernel their stages, so many in all.
template <class L, int STAGES, class... Rows>
__device__ __forceinline__ void use_stages(int64_t width, Rows&... rows) {
  if constexpr (L::kStaged) {
    static_assert((Rows::kStages + ...) == STAGES);
    const int bytes = stage_bytes(width);
    char* stage = dynamic_shared_memory<char>() + static_cast<int>(threadIdx.y) * STAGES * bytes;
    ((rows.use(width, stage), stage += Rows::kStages * bytes), ...);
  }
}

// Sends rows on their way: fetch(rows ahead) does so with whole rows, fetch(rows ahead, vector, slot) with
// their parts.
template <class L, class Fetch>
__device__ __forceinline__ void fetch_rows(int vectors, const Fetch& fetch) {
  if constexpr (L::kStaged) {
    fetch(0);
  } else {
    for_each_vector<L::V>(vectors, [&](int vector, int slot) { fetch(0, vector, slot); });
  }
}

// Sends the next row on its way, if there is more, while this one is read. Staged rows have another stage for
// it: prefetch_row, as soon as this one is there. Others have but their registers, which prefetch_vector
// fills: when a vector of this row was read for the last time.
template <class L, class Fetch>
__device__ __forceinline__ void prefetch_row(bool more, int64_t ahead, const Fetch& fetch) {
  if constexpr (L::kStaged) {
    if (more) fetch(ahead);
  }
}
template <class L, class Fetch>
__device__ __forceinline__ void prefetch_vector(bool more, int64_t ahead, int vector, int slot,
                                                const Fetch& fetch) {
  if constexpr (!L::kStaged) {
    if (more) fetch(ahead, vector, slot);
  }
}

// Until the rows that were fetched can be read.
template <class L, class... Inputs>
__device__ __forceinline__ void wait_for_rows(Inputs&... inputs) {
  if constexpr (L::kStaged) {
    wait_for_copies();
    synchronize_row();
    (inputs.change_stages(), ...);
  }
}

// Ends the rows that were put.
template <class L, class... Outputs>
__device__ __forceinline__ void finish_rows(const Outputs&... outputs) {
  if constexpr (L::kStaged) {
    synchronize_row();
    (outputs.store(), ...);
  }
}

}  // namespace evakernels::cuda
