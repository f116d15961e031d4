// Rows of 16-bit elements that begin at any multiple of 4 bytes, staged in shared memory: aligned 16-byte
// words move between global and shared memory, and each thread reads its pairs of elements from shared
// memory.
//
// A stage has the row's offset within a 128-byte line, and a warp's requests begin where lines do, so that
// each sector is requested once. Words at either end that belong only partly to the row are copied in 4-byte
// pieces. Example, a row that begins 24 bytes after a line and ends 8 bytes after a word:
//
//   line           0       16      32      48              112     128           16 k
//   word           |-------|-------|-------|-------| ... |-------|-------| ... |-------|
//   row, stage     . . . . . . pppp WWWWWWW WWWWWWW  ...  WWWWWWW WWWWWWW  ...  pppp . .
//   word copied by  (0)     (1)     2       3              7       8             (k)        thread
//   piece copied by         2..3                                                 4..5       thread
//
// Threads in parentheses copy no word. Thread t copies piece t of the first word for t < 4 and piece t - 4 of
// the last for 4 <= t < 8. Compute uses another distribution: vector v of a row is the pair of elements at
// byte 4 v, of thread v modulo the row's threads, so that the lanes of a warp access 32 consecutive banks.
//
// Each row of a block has one stage per matrix, in backward two per input: one is read while the next row is
// copied into the other.
#pragma once

#include "cuda/norm_plan.h"
#include "cuda/norm_rows.cuh"

namespace evakernels::cuda {

constexpr int kPiece = 4;  // bytes

// Barrier of a row's threads.
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

// Calls word(at) and piece(at) for this thread's 16-byte words and 4-byte pieces, at `at` bytes from the
// row's beginning.
template <class Word, class Piece>
__device__ __forceinline__ void for_each_word(const void* row, int bytes, const Word& word,
                                              const Piece& piece) {
  const int thread = static_cast<int>(threadIdx.x), step = static_cast<int>(blockDim.x) * kWidestAccess;
  const int before = place_in_line(row);
  // Begin and end of the whole words.
  const int begin = -before & (kWidestAccess - 1), end = bytes - ((before + bytes) & (kWidestAccess - 1));
  for (int at = thread * kWidestAccess - before; at < end; at += step) {  // #last-word
    if (at >= 0) word(at);
  }
  constexpr int kPieces = kWidestAccess / kPiece;
  const bool last = thread >= kPieces;
  const int at = (last ? end : begin) - kWidestAccess + thread * kPiece;
  if (thread < 2 * kPieces && at >= (last ? begin : 0) && at < bytes) piece(at);  // #first-word
}

// Staged counterpart of RegisterRow. With two STAGES the next row is copied while one is read. The matrix may
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

  __device__ __forceinline__ void set_row(const void* matrix, int64_t row, int64_t width) {
    row_ = matrix ? static_cast<const T*>(matrix) + row * width : nullptr;
  }

  // Starts the copy of the row that begins `ahead` elements after the current one.
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

// Staged counterpart of RowOutput: store() writes the row once all threads have put their elements.
template <class T>
class StagedOutput {
 public:
  static constexpr int kStages = 1;

  __device__ __forceinline__ void use(int64_t width, char* stage) {
    bytes_ = static_cast<int>(width * int64_t{sizeof(T)});
    stage_ = stage;
  }

  __device__ __forceinline__ void set_row(void* matrix, int64_t row, int64_t width) {
    row_ = matrix ? static_cast<T*>(matrix) + row * width : nullptr;
  }

  __device__ __forceinline__ void put(int vector, const float (&values)[2]) const {
    store_floats(reinterpret_cast<T*>(stage_ + place_in_line(row_)) + 2 * vector, values);
  }

  // No-op without a matrix.
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
    store_vector(reinterpret_cast<Word*>(to), load(reinterpret_cast<const Word*>(from)));
  }

  T* row_;
  int bytes_;
  char* stage_;
};

// Row types of a kernel with layout L: inputs that are read several times, with two STAGES if the next row is
// prefetched; inputs that are read once; outputs.
template <class T, class L, int STAGES = 1>
using InputRow = std::conditional_t<L::kStaged, StagedInput<T, STAGES>, RegisterRow<T, L::E, L::V>>;
template <class T, class L, int STAGES = 1>
using ReadOnceInputRow = std::conditional_t<L::kStaged, StagedInput<T, STAGES>, ReadOnceRow<T, L::E>>;
template <class T, class L>
using OutputRow = std::conditional_t<L::kStaged, StagedOutput<T>, RowOutput<T, L::E>>;

// Distributes a block's STAGES stages per row to the matrices.
template <class L, int STAGES, class... Rows>
__device__ __forceinline__ void assign_stages(int64_t width, Rows&... rows) {
  if constexpr (L::kStaged) {
    static_assert((Rows::kStages + ...) == STAGES);
    const int bytes = stage_bytes(width);
    char* stage = dynamic_shared_memory<char>() + static_cast<int>(threadIdx.y) * STAGES * bytes;
    ((rows.use(width, stage), stage += Rows::kStages * bytes), ...);
  }
}

// Loads rows: fetch(ahead) copies whole rows, fetch(ahead, vector, slot) a thread's vector.
template <class L, class Fetch>
__device__ __forceinline__ void fetch_rows(int vectors, const Fetch& fetch) {
  if constexpr (L::kStaged) {
    fetch(0);
  } else {
    for_each_vector<L::V>(vectors, [&](int vector, int slot) { fetch(0, vector, slot); });
  }
}

// Prefetches the next row while this one is processed. Staged rows have a second stage: prefetch_row runs
// when this row has arrived. Others reuse their registers: prefetch_vector runs when a vector was read for
// the last time.
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

// Waits until fetched rows can be read.
template <class L, class... Inputs>
__device__ __forceinline__ void wait_for_rows(Inputs&... inputs) {
  if constexpr (L::kStaged) {
    wait_for_copies();
    synchronize_row();  // #rows-arrived
    (inputs.change_stages(), ...);
  }
}

// Stores the output rows.
template <class L, class... Outputs>
__device__ __forceinline__ void finish_rows(const Outputs&... outputs) {
  if constexpr (L::kStaged) {
    synchronize_row();  // #rows-put
    (outputs.store(), ...);
  }
}

}  // namespace evakernels::cuda
