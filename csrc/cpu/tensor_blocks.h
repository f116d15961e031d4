// Parts of an optimizer's buffers as floats, for files that are compiled once for each instruction set.
//
// Four buffers of three dtypes each would make 81 loops of one. So the loops know floats only, and work on
// blocks small enough for the L1 cache: float buffers in place, others widened into a scratch block first.
#pragma once

#include "common/optimizer.h"
#include "cpu/simd.h"

namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE {

constexpr int64_t kBlock = 1024;

struct alignas(64) Scratch {
  float values[kBlock];
};

template <class T>
float* widened(const TensorBuffer& buffer, int64_t begin, int64_t size, float* scratch) {
  const T* source = static_cast<const T*>(buffer.data) + begin;
  for_each_vector(size, [&](int64_t i, auto part) { store(scratch + i, load(source + i, part), part); });
  return scratch;
}

// Elements [begin, begin + size) as floats.
inline float* as_floats(const TensorBuffer& buffer, int64_t begin, int64_t size, Scratch& scratch) {
  switch (buffer.dtype) {
    case DType::BFloat16:
      return widened<BFloat16>(buffer, begin, size, scratch.values);
    case DType::Float16:
      return widened<Float16>(buffer, begin, size, scratch.values);
    default:
      return static_cast<float*>(buffer.data) + begin;
  }
}

template <class T>
void narrowed(const TensorBuffer& buffer, int64_t begin, int64_t size, const float* values) {
  T* target = static_cast<T*>(buffer.data) + begin;
  for_each_vector(size, [&](int64_t i, auto part) { store(target + i, load(values + i, part), part); });
}

// Stores what `as_floats` gave, unless that is the buffer itself.
inline void write_back(const TensorBuffer& buffer, int64_t begin, int64_t size, const float* values) {
  switch (buffer.dtype) {
    case DType::BFloat16:
      return narrowed<BFloat16>(buffer, begin, size, values);
    case DType::Float16:
      return narrowed<Float16>(buffer, begin, size, values);
    default:
      return;
  }
}

// Of elements `first` and so on: what is stored as bfloat16 without being rounded again, or the values
// themselves.
inline F32 rounded_by(const RoundingKey& rounding, F32 values, int64_t first) {
  if (!rounding.is_stochastic) return values;
  U32 lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return rounded_to_bfloat16(values, random_bits(rounding, lanes + static_cast<uint32_t>(first)));
}

inline void change_moments(F32 gradient, const MomentRates& rates, F32& average, F32& average_sq) {
  average = average * rates.beta1 + gradient * rates.one_minus_beta1;
  average_sq = average_sq * rates.beta2 + gradient * gradient * rates.one_minus_beta2;
}

}  // namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE
