// The way from the parameters of a norm to the launch of the kernel that was compiled for their dtypes, width
// and alignment. kernel_of(ElementTypes, Layout) names it.
#pragma once

#include <limits>
#include <vector>

#include "cuda/norm_plan.h"

namespace evakernels::cuda {

constexpr RowLimits kForwardLimits = {32, 256};

// The plan for kernels whose buffers these are.
template <int WIDE>
RowPlan plan_rows(const ResidualNormShape& shape, const RowLimits& limits,
                  const std::vector<Buffer>& buffers) {
  if constexpr (WIDE == 1) {
    return {1, 0, {kStreamingThreads, 1, 1}};
  } else {
    return plan_rows(shape.width, WIDE, aligned_elements(WIDE, shape.width, buffers), limits);
  }
}

template <class Params, class KernelOf>
Error launch_forward(const Params& params, Stream stream, const std::vector<Buffer>& buffers,
                     const KernelOf& kernel_of) {
  const ResidualNormShape& shape = params.shape;
  if (shape.rows == 0) return nullptr;
  return with_element_types(shape, [&](auto types) {
    constexpr int kWide = decltype(types)::kWide;
    const RowPlan plan = plan_rows<kWide>(shape, kForwardLimits, buffers);
    return with_layout<kWide, kForwardLimits>(plan, [&](auto layout) {
      const int64_t blocks = std::min<int64_t>(blocks_for(shape.rows, plan), std::numeric_limits<int>::max());
      return launch(kernel_of(types, layout), {static_cast<unsigned>(blocks), 1, 1}, plan.block, stream,
                    params);
    });
  });
}

// Calls body(kernel, plan, blocks) with as many blocks as run at the same time, or fewer if the rows are few:
// each block leaves partial sums behind.
template <RowLimits LIMITS, class Params, class KernelOf, class Body>
Error with_backward_kernel(const Params& params, const std::vector<Buffer>& buffers,
                           const KernelOf& kernel_of, const Body& body) {
  const ResidualNormShape& shape = params.shape;
  return with_element_types(shape, [&](auto types) {
    constexpr int kWide = decltype(types)::kWide;
    const RowPlan plan = plan_rows<kWide>(shape, LIMITS, buffers);
    return with_layout<kWide, LIMITS>(plan, [&](auto layout) {
      const auto kernel = kernel_of(types, layout);
      const int resident = resident_blocks(kernel, static_cast<int>(plan.block.x * plan.block.y));
      return body(kernel, plan, std::min<int64_t>(blocks_for(shape.rows, plan), std::max(1, resident)));
    });
  });
}

inline bool any_wanted(const ResidualNormGradients& gradients) {
  return gradients.weight.data || gradients.bias.data || gradients.layer_scale.data;
}

// The floats that `launch_backward` needs for partial sums, `count` for each column and block.
template <RowLimits LIMITS, class Params, class KernelOf>
int64_t backward_workspace(const Params& params, int count, const std::vector<Buffer>& buffers,
                           const KernelOf& kernel_of) {
  if (!any_wanted(params.gradients)) return 0;
  int64_t size = 0;
  with_backward_kernel<LIMITS>(params, buffers, kernel_of,
                               [&](auto, const RowPlan&, int64_t blocks) -> Error {
                                 size = count * blocks * params.shape.width;
                                 return nullptr;
                               });
  return size;
}

// finish(partials, blocks) launches the second pass.
template <RowLimits LIMITS, class Params, class KernelOf, class Finish>
Error launch_backward(const Params& params, float* workspace, Stream stream,
                      const std::vector<Buffer>& buffers, const KernelOf& kernel_of, const Finish& finish) {
  if (params.shape.width == 0) return nullptr;
  return with_backward_kernel<LIMITS>(
      params, buffers, kernel_of, [&](auto kernel, const RowPlan& plan, int64_t blocks) -> Error {
        const bool wanted = any_wanted(params.gradients);
        if (blocks > 0) {
          const Error error = launch(kernel, {static_cast<unsigned>(blocks), 1, 1}, plan.block, stream,
                                     params, wanted ? workspace : nullptr);
          if (error) return error;
        }
        return wanted ? finish(workspace, blocks) : nullptr;
      });
}

}  // namespace evakernels::cuda
