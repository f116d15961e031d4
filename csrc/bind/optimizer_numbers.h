// What the bindings of the optimizers are given besides tensors: a number for each of them.
#pragma once

#include <vector>

#include "bind/array.h"
#include "common/optimizer.h"

namespace evakernels {

using Numbers = std::vector<int64_t>;

inline void set_lrs(std::vector<OptimizedTensor>& tensors, const std::vector<double>& lrs) {
  require(lrs.size() == tensors.size(), "lrs must be as many as params");
  for (size_t i = 0; i < tensors.size(); ++i) tensors[i].lr = lrs[i];
}

// Without seeds: to the nearest.
inline void set_rounding(std::vector<OptimizedTensor>& tensors, const Numbers& seeds,
                         const Numbers& first_elements) {
  if (seeds.empty()) return;
  require(seeds.size() == tensors.size() && first_elements.size() == tensors.size(),
          "seeds and first_elements must be as many as params");
  for (size_t i = 0; i < tensors.size(); ++i) {
    require(tensors[i].param.dtype == DType::BFloat16, "params must be bfloat16 where there are seeds");
    require(seeds[i] >= 0 && first_elements[i] >= 0, "seeds and first_elements must be 0 or more");
    tensors[i].rounding = {seeds[i], first_elements[i]};
  }
}

}  // namespace evakernels
