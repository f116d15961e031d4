// Compiled once for each instruction set.
//
// Four buffers of three dtypes each would make 81 loops, so the loops process floats, in blocks that fit into
// the L1 cache: float buffers in place, others converted to a scratch block first.
#include "cpu/simd.h"
#include "include/lamb.h"

namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE {
namespace {

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

// Elements [begin, begin + size) as floats, in place if possible.
float* as_floats(const TensorBuffer& buffer, int64_t begin, int64_t size, Scratch& scratch) {
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

// Stores the result of as_floats, unless it is the buffer itself.
void write_back(const TensorBuffer& buffer, int64_t begin, int64_t size, const float* values) {
  switch (buffer.dtype) {
    case DType::BFloat16:
      return narrowed<BFloat16>(buffer, begin, size, values);
    case DType::Float16:
      return narrowed<Float16>(buffer, begin, size, values);
    default:
      return;
  }
}

// Elements from `first` on, rounded to bfloat16 stochastically if there is a seed.
F32 rounded_by(const RoundingKey& rounding, F32 values, int64_t first) {
  if (!rounding.is_stochastic) return values;
  U32 lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return rounded_to_bfloat16(values, random_bits(rounding, lanes + static_cast<uint32_t>(first)));
}

void change_moments(F32 gradient, const MomentRates& rates, F32& average, F32& average_sq) {
  average = average * rates.beta1 + gradient * rates.one_minus_beta1;
  average_sq = average_sq * rates.beta2 + gradient * gradient * rates.one_minus_beta2;
}

// The value after a store and a load.
inline F32 as_stored(F32 value, DType dtype) {
  switch (dtype) {
    case DType::BFloat16:
      return widen(narrow(value, BFloat16{}), BFloat16{});
    case DType::Float16:
      return widen(narrow(value, Float16{}), Float16{});
    default:
      return value;
  }
}

inline F32 direction_of(F32 w, F32 m, F32 v, const LambDirection& d) {
  return m * d.m_scale / (sqrt(v * d.v_scale) + d.eps) + w * d.weight_decay;
}

LambSquaredNorms update(const OptimizedTensor& tensor, const LambMoments* moments,
                        const LambDirection& direction, int64_t begin, int64_t end) {
  Scratch scratch[4];
  LambSquaredNorms norms = {};
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t size = end - first < kBlock ? end - first : kBlock;
    const float* w = as_floats(tensor.param, first, size, scratch[0]);
    const float* g = as_floats(tensor.grad, first, size, scratch[1]);
    float* m = as_floats(tensor.exp_avg, first, size, scratch[2]);
    float* v = as_floats(tensor.exp_avg_sq, first, size, scratch[3]);
    float sum[2];
    sum_over_row(size, sum, [&](int64_t i, auto part, F32* sums) {
      F32 average = load(m + i, part), average_sq = load(v + i, part);
      if (moments) {
        change_moments(load(g + i, part) * moments->grad_factor, moments->rates, average, average_sq);
        average = as_stored(average, tensor.exp_avg.dtype);
        average_sq = as_stored(average_sq, tensor.exp_avg_sq.dtype);
        store(m + i, average, part);
        store(v + i, average_sq, part);
      }
      const F32 value = load(w + i, part);
      const F32 u = direction_of(value, average, average_sq, direction);
      sums[0] += value * value;
      sums[1] += zero_beyond(u * u, part);  // without eps the padding is 0 / 0
    });
    norms.param += sum[0];
    norms.direction += sum[1];
    if (moments) {
      write_back(tensor.exp_avg, first, size, m);
      write_back(tensor.exp_avg_sq, first, size, v);
    }
  }
  return norms;
}

void apply(const OptimizedTensor& tensor, const LambDirection& direction, float factor,
           const RoundingKey& rounding, int64_t begin, int64_t end) {
  Scratch scratch[3];
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t size = end - first < kBlock ? end - first : kBlock;
    const float* m = as_floats(tensor.exp_avg, first, size, scratch[0]);
    const float* v = as_floats(tensor.exp_avg_sq, first, size, scratch[1]);
    float* w = as_floats(tensor.param, first, size, scratch[2]);
    for_each_vector(size, [&](int64_t i, auto part) {
      const F32 value = load(w + i, part);
      const F32 u = direction_of(value, load(m + i, part), load(v + i, part), direction);
      store(w + i, rounded_by(rounding, value - u * factor, first + i), part);
    });
    write_back(tensor.param, first, size, w);
  }
}

}  // namespace

const LambKernels lamb = {update, apply};

}  // namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE
