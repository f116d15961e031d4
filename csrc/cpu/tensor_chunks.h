// The tensors of a model as the optimizers' launchers deal them out to threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/optimizer.h"
#include "cpu/rows.h"

namespace evakernels::cpu {

// Elements: the unit of work, and of the sums that build a norm. It depends on nothing.
constexpr int64_t kChunk = 16384;

// The chunks of all tensors, in one row: threads get equal shares of it, whatever the sizes of the tensors.
class Chunks {
 public:
  Chunks(const OptimizedTensor* tensors, int64_t count) : tensors_(tensors), first_(count + 1) {
    for (int64_t i = 0; i < count; ++i) {
      first_[i + 1] = first_[i] + ceil_div(tensors[i].size, kChunk);
      elements_ += tensors[i].size;
    }
  }

  int64_t count() const { return first_.back(); }
  int64_t first_of(int64_t tensor) const { return first_[tensor]; }

  // Calls body(tensor, chunk, begin, end) in parallel, with the range of the tensor's elements.
  template <class Body>
  void for_each(ParallelFor parallel_for, const Body& body) const {
    if (count() == 0) return;
    run_parallel(parallel_for, count(), tasks_grain(elements_ / count()), [&](int64_t from, int64_t to) {
      int64_t tensor = std::upper_bound(first_.begin(), first_.end(), from) - first_.begin() - 1;
      for (int64_t chunk = from; chunk < to; ++chunk) {
        while (chunk >= first_[tensor + 1]) ++tensor;
        const int64_t begin = (chunk - first_[tensor]) * kChunk;
        body(tensor, chunk, begin, std::min(begin + kChunk, tensors_[tensor].size));
      }
    });
  }

 private:
  const OptimizedTensor* tensors_;
  std::vector<int64_t> first_;
  int64_t elements_ = 0;
};

inline bool is_set(const float* found_inf) { return found_inf && *found_inf > 0.0f; }

// 1 - beta^step, to full precision also for beta close to 1.
inline double bias_of(double beta, const OptimizedTensor& tensor) {
  return -std::expm1(*tensor.step * std::log(beta));
}

inline void count_steps(const OptimizedTensor* tensors, int64_t count) {
  for (int64_t i = 0; i < count; ++i) *tensors[i].step += 1.0f;
}

// What gradients are multiplied with. Division by a power of two, as loss scales are, is exact this way too,
// and twice as cheap.
inline float factor_of_gradients(const float* grad_scale) {
  return static_cast<float>(1.0 / (grad_scale ? *grad_scale : 1.0f));
}

}  // namespace evakernels::cpu
