// Tensor cores and what feeds them, emulated: ldmatrix and mma.m16n8k16 as the PTX ISA has them.
#pragma once

#include "cuda_emulator.h"

namespace cuda_emulator {

// What the lanes of a warp bring to ldmatrix.x4, and take from it.
struct Addresses {
  const void* own;
  const void* all[32];
};
void exchange_addresses(Addresses& addresses, int line);

inline void load_matrices(uint32_t (&words)[4], const void* row, bool transposed,
                          int line = __builtin_LINE()) {
  for (uint32_t& word : words) word = ~0u;
  if (!is_aligned(row, 16, line)) return;
  Addresses addresses = {.own = row, .all = {}};
  exchange_addresses(addresses, line);
  if (!addresses.all[0]) return;  // The launch has failed.
  const int group = lane() / 4, in_group = lane() % 4;
  for (int matrix = 0; matrix < 4; ++matrix) {
    // Two neighbours of one row, or of one column.
    for (int i = 0; i < 2; ++i) {
      const int at_row = transposed ? 2 * in_group + i : group,
                column = transposed ? group : 2 * in_group + i;
      const char* from = static_cast<const char*>(addresses.all[matrix * 8 + at_row]) + column * 2;
      std::memcpy(reinterpret_cast<char*>(&words[matrix]) + 2 * i, from, 2);
    }
  }
}

// One lane's part of sums += a * b, where a is 16 x 16 and b two matrices of 16 x 8, each in two registers:
// those of the first are b[0] and b[2].
struct Product {
  float* sums;
  const uint32_t* a;
  const uint32_t* b;
  bool bfloat16;
};
void multiply(const Product& product, int line = __builtin_LINE());

}  // namespace cuda_emulator
