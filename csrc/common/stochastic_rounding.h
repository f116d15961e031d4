// Stochastic rounding of float32 to bfloat16: up with a probability of the truncated fraction, so that the
// expected value is exact and steps below half a ulp aren't lost.
//
// Random numbers are a hash of (seed, step, element index), for scalars and GCC/Clang vectors: independent of
// threads, device and order.
#pragma once

#include <cstdint>
#include <cstring>

namespace evakernels {

constexpr int64_t kNearest = -1;

// How a parameter is rounded to bfloat16.
struct Rounding {
  int64_t seed;           // kNearest: round to nearest even
  int64_t first_element;  // index of the buffer's first element in the unsharded tensor
};

// A rounding in one step.
struct RoundingKey {
  uint32_t start;
  uint32_t mask;
  bool is_stochastic;
};

// lowbias32 of Chris Wellons's hash-prospector (2018).
template <class U>
static inline U scrambled(U x) {
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  x ^= x >> 16;
  return x;
}

// `step`: its number.
static inline RoundingKey key_of(const Rounding& rounding, float step) {
  const uint32_t low = static_cast<uint32_t>(rounding.seed), count = static_cast<uint32_t>(step);
  const uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(rounding.seed) >> 32);
  const uint32_t start = scrambled(scrambled(scrambled(low) + high) + count);
  const uint32_t mask = scrambled(scrambled(scrambled(high ^ 0x9E3779B9u) + low) + count);
  return {start + static_cast<uint32_t>(rounding.first_element), mask, rounding.seed != kNearest};
}

// 32 random bits for element `i` of the buffer, with a period of 2^32 elements.
template <class U>
static inline U random_bits(const RoundingKey& key, U i) {
  return scrambled(scrambled(i + key.start) ^ key.mask);
}

// The value rounded to bfloat16, as a float. Preserves NaN.
template <class U, class F>
static inline F rounded_to_bfloat16(F value, U random) {
  U bits;
  memcpy(&bits, &value, sizeof bits);
  bits = (bits + (random >> 16)) & 0xFFFF0000u;
  F rounded;
  memcpy(&rounded, &bits, sizeof rounded);
  return value == value ? rounded : value;
}

}  // namespace evakernels
