// Kernels of one warp whose requests are known, so that tests see whether the audit counts them right.
#include "cuda_emulator.h"

namespace {

using cuda_emulator::Round;

constexpr int kRounds = 4;

unsigned char* shared() { return static_cast<unsigned char*>(cuda_emulator::dynamic_shared_memory()); }

template <class Word>
void put(unsigned char* at) {
  *reinterpret_cast<Word*>(at) = Word{};
}

int lane() { return static_cast<int>(threadIdx.x); }

// A store of a Word for each lane, `stride` bytes apart.
template <class Word>
void store_apart(int stride) {
  put<Word>(shared() + lane() * stride);
}

// Rows of so many 16-byte words, `stride` bytes apart, which lanes have one after the other.
void store_rows(int words, int stride) {
  put<uint4>(shared() + lane() / words * stride + lane() % words * 16);
}

// Each lane leaves out one round of a loop, in which the others share a line of 128 bytes, one place further
// in each round.
void store_in_rounds(bool tells, unsigned char* memory) {
  for (int i = 0; i < kRounds; ++i) {
    const Round round(static_cast<unsigned>(tells ? i : 0));
    if (lane() % kRounds != i) put<unsigned>(memory + i * 128 + (lane() + i) % 32 * 4);
  }
}

// A part of so many bytes for each block, which it reads twice.
void read_twice(int bytes, const unsigned char* memory) {
  for (int i = 0; i < 2 * bytes; i += 32 * 16) {
    const Round round(static_cast<unsigned>(i));
    const volatile unsigned char* const own = memory + blockIdx.x * bytes + i % bytes + lane() * 16;
    (void)*own;
  }
}

}  // namespace

// global_memory: of 512 bytes; of `stride` for each of six blocks where they read twice.
extern "C" __attribute__((visibility("default"))) const char* run_pattern(int pattern, int stride, int words,
                                                                          unsigned char* global_memory) {
  const auto kernel = [&] {
    switch (pattern) {
      case 0:
        return store_apart<unsigned>(stride);
      case 1:
        return store_apart<uint2>(stride);
      case 2:
        return store_apart<uint4>(stride);
      case 3:
        return store_rows(words, stride);
      case 4:
        return store_in_rounds(true, shared());
      case 5:
        return store_in_rounds(false, shared());
      case 6:
        return store_in_rounds(true, global_memory);
      case 7:
        return read_twice(stride, global_memory);
      default:
        return cuda_emulator::fail("no such pattern", __LINE__);
    }
  };
  return cuda_emulator::launch(reinterpret_cast<const void*>(&run_pattern), {pattern == 7 ? 6u : 1u, 1, 1},
                               {32, 1, 1}, 1 << 14, kernel);
}
