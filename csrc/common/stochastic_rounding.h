// Stochastic rounding of float32 to bfloat16: up with the probability of the part that is cut off, so that
// the mean of many roundings is the value itself, and sums of steps smaller than half a unit aren't lost.
//
// The random numbers are a hash of (seed, step, number of the element), for scalars and for GCC/Clang vectors
// of them: they depend on no thread, no device and no order. tests/evakernels/test_stochastic_rounding.py
// judges them.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define EVAKERNELS_EVERYWHERE static __host__ __device__ __forceinline__
#else
#define EVAKERNELS_EVERYWHERE static inline
#endif

namespace evakernels {

constexpr int64_t kNearest = -1;

// How a parameter is rounded to bfloat16.
struct Rounding {
  int64_t seed;           // kNearest: to the nearest, ties to even
  int64_t first_element;  // number of the buffer's first element within its whole tensor
};

// A rounding in one step.
struct RoundingKey {
  uint32_t start;
  uint32_t mask;
  bool is_stochastic;
};

// lowbias32 of Chris Wellons's hash-prospector (2018): each bit of x changes each of the result in half of
// all cases.
template <class U>
EVAKERNELS_EVERYWHERE U scrambled(U x) {
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  x ^= x >> 16;
  return x;
}

// `step`: its number.
EVAKERNELS_EVERYWHERE RoundingKey key_of(const Rounding& rounding, float step) {
  const uint32_t low = static_cast<uint32_t>(rounding.seed), count = static_cast<uint32_t>(step);
  const uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(rounding.seed) >> 32);
  const uint32_t start = scrambled(scrambled(scrambled(low) + high) + count);
  const uint32_t mask = scrambled(scrambled(scrambled(high ^ 0x9E3779B9u) + low) + count);
  return {start + static_cast<uint32_t>(rounding.first_element), mask, rounding.seed != kNearest};
}

// 32 random bits for element `i` of the buffer; they come again after 2^32 elements.
template <class U>
EVAKERNELS_EVERYWHERE U random_bits(const RoundingKey& key, U i) {
  return scrambled(scrambled(i + key.start) ^ key.mask);
}

// The value with the last 16 bits zero, as bfloat16 holds it. NaN stays as it is.
template <class U, class F>
EVAKERNELS_EVERYWHERE F rounded_to_bfloat16(F value, U random) {
  U bits;
  memcpy(&bits, &value, sizeof bits);
  bits = (bits + (random >> 16)) & 0xFFFF0000u;
  F rounded;
  memcpy(&rounded, &bits, sizeof rounded);
  return value == value ? rounded : value;
}

}  // namespace evakernels
