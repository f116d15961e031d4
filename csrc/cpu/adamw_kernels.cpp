// Compiled once for each instruction set.
#include "cpu/adamw_kernels.h"

#include "cpu/tensor_blocks.h"

namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE {
namespace {

template <class Param, class Moment>
void step(int64_t size, Param* w, const Param* g, Moment* m, Moment* v, const MomentRates& rates,
          float grad_factor, const AdamwFactors& factors, const RoundingKey& rounding, int64_t first) {
  for_each_vector(size, [&](int64_t i, auto part) {
    F32 average = load(m + i, part), average_sq = load(v + i, part);
    change_moments(load(g + i, part) * grad_factor, rates, average, average_sq);
    store(m + i, average, part);
    store(v + i, average_sq, part);
    const F32 direction = average / (sqrt(average_sq) * factors.v_factor + factors.eps);
    const F32 value = load(w + i, part) * factors.kept - direction * factors.rate;
    store(w + i, rounded_by(rounding, value, first + i), part);
  });
}

template <class T>
T* at(const TensorBuffer& buffer, int64_t begin) {
  return static_cast<T*>(buffer.data) + begin;
}

void update(const OptimizedTensor& tensor, const MomentRates& rates, float grad_factor,
            const AdamwFactors& factors, const RoundingKey& rounding, int64_t begin, int64_t end) {
  // bfloat16 alone has a loop of its own: it would spend more time in the scratch blocks than on memory.
  const auto is_bfloat16 = [](const TensorBuffer& buffer) { return buffer.dtype == DType::BFloat16; };
  if (is_bfloat16(tensor.param) && is_bfloat16(tensor.grad) && is_bfloat16(tensor.exp_avg) &&
      is_bfloat16(tensor.exp_avg_sq)) {
    return step(end - begin, at<BFloat16>(tensor.param, begin), at<const BFloat16>(tensor.grad, begin),
                at<BFloat16>(tensor.exp_avg, begin), at<BFloat16>(tensor.exp_avg_sq, begin), rates,
                grad_factor, factors, rounding, begin);
  }
  Scratch scratch[4];
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t size = end - first < kBlock ? end - first : kBlock;
    float* w = as_floats(tensor.param, first, size, scratch[0]);
    const float* g = as_floats(tensor.grad, first, size, scratch[1]);
    float* m = as_floats(tensor.exp_avg, first, size, scratch[2]);
    float* v = as_floats(tensor.exp_avg_sq, first, size, scratch[3]);
    step(size, w, g, m, v, rates, grad_factor, factors, rounding, first);
    write_back(tensor.param, first, size, w);
    write_back(tensor.exp_avg, first, size, m);
    write_back(tensor.exp_avg_sq, first, size, v);
  }
}

}  // namespace

const AdamwKernels adamw = {update};

}  // namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE
