// Rows of 16-bit elements that begin at any multiple of 4 bytes, by way of shared memory: words of 16 bytes
// go between it and global memory, and a thread finds its pairs of elements there.
//
// A row lies in its stage as in global memory, as far from a line of 128 bytes, and the requests of a warp
// begin where lines do: each sector is asked for once. What a row has of words that aren't all its own goes
// by pieces of 4 bytes, as the rest is another row's or nobody's.
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

// Where a row of each matrix lies in shared memory, for the threads that share these rows.
class Stages {
 public:
  __device__ __forceinline__ Stages(int count, int64_t width)
      : bytes_(stage_bytes(width)), first_(dynamic_shared_memory<char>() + threadIdx.y * count * bytes_) {}

  __device__ __forceinline__ char* operator[](int number) const { return first_ + number * bytes_; }

 private:
  int bytes_;
  char* first_;
};

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
    const Round round(static_cast<unsigned>((at + before) / step));
    if (at >= 0) word(at);
  }
  constexpr int kPieces = kWidestAccess / kPiece;
  const bool last = thread >= kPieces;
  const int at = (last ? end : begin) - kWidestAccess + thread * kPiece;
  if (thread < 2 * kPieces && at >= (last ? begin : 0) && at < bytes) piece(at);
}

// Like RowPart, but for whole rows. While one is read, the next may be on its way into another stage.
template <class T>
class StagedInput {
 public:
  __device__ __forceinline__ void use(int64_t width, char* stage, char* next_stage) {
    bytes_ = static_cast<int>(width * int64_t{sizeof(T)});
    stage_ = stage;
    next_stage_ = next_stage;
  }

  __device__ __forceinline__ void point_to(const void* matrix, int64_t row, int64_t width) {
    row_ = static_cast<const T*>(matrix) + row * width;
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
    char* const stage = stage_;
    stage_ = next_stage_;
    next_stage_ = stage;
  }

  __device__ __forceinline__ void advance(int64_t elements) { row_ += elements; }

  __device__ __forceinline__ void get(int vector, int, float (&values)[2]) const {
    load_floats(reinterpret_cast<const T*>(stage_ + place_in_line(row_)) + 2 * vector, values);
  }

 private:
  const T* row_;
  int bytes_;
  char* stage_;
  char* next_stage_;
};

// Until the rows that were fetched are in their stages, for all threads.
template <class... Inputs>
__device__ __forceinline__ void wait_for_rows(Inputs&... inputs) {
  wait_for_copies();
  synchronize_row();
  (inputs.change_stages(), ...);
}

// Like RowOutput, but for the end: when all threads have put what is theirs, they store it.
template <class T>
class StagedOutput {
 public:
  __device__ __forceinline__ void use(int64_t width, char* stage) {
    bytes_ = static_cast<int>(width * int64_t{sizeof(T)});
    stage_ = stage;
  }

  __device__ __forceinline__ void point_to(void* matrix, int64_t row, int64_t width) {
    row_ = static_cast<T*>(matrix) + row * width;
  }

  __device__ __forceinline__ void put(int vector, const float (&values)[2]) const {
    store_floats(reinterpret_cast<T*>(stage_ + place_in_line(row_)) + 2 * vector, values);
  }

  __device__ __forceinline__ void store() const {
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

template <class... Outputs>
__device__ __forceinline__ void store_rows(const Outputs&... outputs) {
  synchronize_row();
  (outputs.store(), ...);
}

// The rows of a kernel with the layout L.
template <class T, class L>
using InputRow = std::conditional_t<L::kStaged, StagedInput<T>, RowPart<T, L::E, L::V>>;
template <class T, class L>
using OutputRow = std::conditional_t<L::kStaged, StagedOutput<T>, RowOutput<T, L::E>>;

}  // namespace evakernels::cuda
