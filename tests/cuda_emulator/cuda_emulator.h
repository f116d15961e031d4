// Runs CUDA kernels on the CPU, for tests. Each thread of a block is a fiber; the fibers of a block run one
// at a time, in an order drawn from EVAKERNELS_EMULATOR_SEED, each until it waits for others or ends.
//
// What it notices by itself: a deadlock, threads of one block at different barriers, warp functions that name
// lanes which have exited or stand elsewhere, loads and stores that are not aligned. Shared memory is filled
// with NaN before each block, so that what was not written shows in the results; so does a missing barrier,
// under some order. With the compiler's sanitizers it also notices races (for certain, in any order) and
// accesses out of bounds.
//
// What it can't notice: races between blocks, which run one after another, and anything about speed.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace cuda_emulator {

// The GPU that is played: small, so that blocks take several turns in small tests too.
constexpr int kMultiprocessors = 3;
constexpr int kBlocksPerMultiprocessor = 1;
constexpr int kMaxThreads = 1024;
constexpr size_t kSharedMemoryKb = 99;   // of a block, unless EVAKERNELS_EMULATOR_SHARED_KB says so
constexpr size_t kCacheBytes = 1 << 20;  // L2, behind which is memory

size_t max_shared_memory();
// What the runtime was told that a kernel may have.
size_t allowed_shared_memory(const void* kernel);

const uint3& thread_index();
const uint3& block_index();
const dim3& block_size();
const dim3& grid_size();

// Ends the launch with an error. Returns to the calling thread, which goes on until it next waits.
void fail(const char* what, int line);

void synchronize_block(int line);

// What lane `source` brought, when all lanes of the mask have come.
uint64_t exchange(unsigned mask, uint64_t value, int source, const char* what, int line);
int lane();

// All lanes of a warp bring a value each. The last to come calls work(values) for all of them, before any
// goes on.
void work_together(uint64_t value, void (*work)(const uint64_t* values), const char* what, int line);

// The block's copy of a variable in shared memory, which `key` stands for.
void* shared_memory(const void* key, size_t size, size_t alignment);
// And the part whose size the launch tells.
void* dynamic_shared_memory();

// So many bytes, or zeros if `from` is null, on their way to shared memory.
struct Copy {
  void* to;
  const void* from;
  int bytes;
  unsigned place;  // that it was begun at, as who watches tells them apart
};
// A thread's copies, which take place when it waits for them.
void begin_copy(void* to, const void* from, int bytes);
bool next_copy(Copy& copy);

// Null, or what went wrong. `kernel` calls the function at `address`.
const char* launch(const void* address, dim3 grid, dim3 block, size_t dynamic_bytes,
                   const std::function<void()>& kernel);

// Who watches launches (audit.cpp).
struct Observer {
  virtual void launch_begins(const void* kernel, dim3 grid, dim3 block, size_t dynamic_bytes) = 0;
  virtual void block_ends(unsigned barriers) = 0;
  virtual void uses_shared_memory(const void* data, size_t size) = 0;
  // Of what the running thread is about, in the function that returns to `caller`.
  virtual unsigned place(const void* caller) = 0;
};
void watch(Observer* observer);

// The running thread: its number in the block, -1 where no kernel runs; how often it has met others; the
// round of a loop that it is in; and whether memory is its own stack, or the emulator's.
int running_thread();
unsigned meetings_so_far();
// Of the loop that it is in; 0 outside of those that tell.
unsigned& current_round();
bool is_private(const void* address);

class Round {
 public:
  explicit Round(unsigned number) : before_(current_round()) { current_round() = number; }
  ~Round() { current_round() = before_; }

 private:
  unsigned before_;
};

// Else the launch ends with an error.
inline bool is_aligned(const void* pointer, size_t alignment, int line) {
  if (reinterpret_cast<uintptr_t>(pointer) % alignment == 0) return true;
  fail("a misaligned access", line);
  return false;
}

// In one access, which compilers else may cut into those of the word's members.
template <class Word>
Word load_whole(const Word* from) {
  if constexpr (sizeof(Word) <= 4) {
    return *from;
  } else {
    using Bytes [[gnu::vector_size(sizeof(Word)), gnu::may_alias]] = unsigned char;
    const Bytes bytes = *reinterpret_cast<const Bytes*>(from);
    Word word;
    std::memcpy(&word, &bytes, sizeof word);
    return word;
  }
}

template <class Word>
void store_whole(Word* to, const Word& word) {
  if constexpr (sizeof(Word) <= 4) {
    *to = word;
  } else {
    using Bytes [[gnu::vector_size(sizeof(Word)), gnu::may_alias]] = unsigned char;
    Bytes bytes;
    std::memcpy(&bytes, &word, sizeof word);
    *reinterpret_cast<Bytes*>(to) = bytes;
  }
}

// The next three are here so that sanitizers see them as the accesses of the thread that they are.

// Between the beginning and the wait shared memory holds NaN.
template <int BYTES>
void copy_async(void* to, const void* from, int line) {
  if (!is_aligned(to, BYTES, line) || !is_aligned(from, BYTES, line)) return;
  std::memset(to, 0xFF, BYTES);
  begin_copy(to, from, BYTES);
}

template <int BYTES>
void end_copy(const Copy& copy) {
  if (copy.from) {
    std::memcpy(copy.to, copy.from, BYTES);
  } else {
    std::memset(copy.to, 0, BYTES);
  }
}

inline void wait_for_copies() {
  Copy copy;
  while (next_copy(copy)) {
    // A warp's copies are met with each other that were begun at one place.
    const Round round(copy.place);
    copy.bytes == 16 ? end_copy<16>(copy) : end_copy<4>(copy);
  }
}

template <class T>
T shuffle(unsigned mask, T value, int source, const char* what, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(mask, bits, source, what, line);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace cuda_emulator

#define threadIdx (cuda_emulator::thread_index())
#define blockIdx (cuda_emulator::block_index())
#define blockDim (cuda_emulator::block_size())
#define gridDim (cuda_emulator::grid_size())

inline void __syncthreads(int line = __builtin_LINE()) { cuda_emulator::synchronize_block(line); }

inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) {
  cuda_emulator::exchange(mask, 0, cuda_emulator::lane(), "__syncwarp", line);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance, int line = __builtin_LINE()) {
  return cuda_emulator::shuffle(mask, value, cuda_emulator::lane() ^ distance, "__shfl_xor_sync", line);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int line = __builtin_LINE()) {
  return cuda_emulator::shuffle(mask, value, source, "__shfl_sync", line);
}

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

// Rounded before anything is added to it, as every product is that is compiled without FMA instructions.
inline float __fmul_rn(float a, float b) { return a * b; }

inline float __fdividef(float a, float b) { return a / b; }
