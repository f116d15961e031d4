// Compiled once for each instruction set.
#include "cpu/tensor_blocks.h"
#include "include/lamb.h"

namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE {
namespace {

// What a load gives after a store.
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
      sums[1] += zero_beyond(u * u, part);  // without eps, 0 / 0 stands beyond the tail
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
