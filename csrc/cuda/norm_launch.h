// The way from the parameters of a norm to the launch of the kernel that was compiled for their dtypes, width
// and alignment. kernel_of(ElementTypes, Layout) names it.
#pragma once

#include <vector>

#include "cuda/norm_plan.h"

namespace evakernels::cuda {

constexpr RowLimits kForwardLimits = {32, 256};

// Of a multiprocessor, at least. Rows that go by way of shared memory leave registers for as many as hide the
// latency of the memory.
template <class L>
constexpr int kForwardBlocks = L::kStaged ? 1024 / L::kThreads : L::kBlocks;

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

// STAGES: of a row that goes by way of shared memory, here and below.
template <int STAGES, class Params, class KernelOf>
Error launch_forward(const Params& params, Stream stream, const std::vector<Buffer>& buffers,
                     const KernelOf& kernel_of) {
  const ResidualNormShape& shape = params.shape;
  if (shape.rows == 0) return nullptr;
  return with_element_types(shape, [&](auto types) {
    constexpr int kWide = decltype(types)::kWide;
    const RowPlan plan = plan_rows<kWide>(shape, kForwardLimits, buffers);
    return with_layout<kWide, kForwardLimits>(plan, [&](auto layout) {
      const size_t shared_bytes = bytes_of_stages<decltype(layout)>(STAGES, shape.width, plan);
      return launch_on_rows(kernel_of(types, layout), shape.rows, plan, shared_bytes, stream, params);
    });
  });
}

// Calls body(run, blocks) as with_resident_blocks does.
template <RowLimits LIMITS, int STAGES, class Params, class KernelOf, class Body>
Error with_backward_kernel(const Params& params, const std::vector<Buffer>& buffers,
                           const KernelOf& kernel_of, const Body& body) {
  const ResidualNormShape& shape = params.shape;
  return with_element_types(shape, [&](auto types) {
    constexpr int kWide = decltype(types)::kWide;
    const RowPlan plan = plan_rows<kWide>(shape, LIMITS, buffers);
    return with_layout<kWide, LIMITS>(plan, [&](auto layout) {
      const size_t shared_bytes = bytes_of_stages<decltype(layout)>(STAGES, shape.width, plan);
      return with_resident_blocks(kernel_of(types, layout), shape.rows, plan, shared_bytes, body);
    });
  });
}

inline bool any_wanted(const ResidualNormGradients& gradients) {
  return gradients.weight.data || gradients.bias.data || gradients.layer_scale.data;
}

// The floats that `launch_backward` needs for partial sums, `count` for each column and block.
template <RowLimits LIMITS, int STAGES, class Params, class KernelOf>
int64_t backward_workspace(const Params& params, int count, const std::vector<Buffer>& buffers,
                           const KernelOf& kernel_of) {
  if (!any_wanted(params.gradients)) return 0;
  int64_t size = 0;
  with_backward_kernel<LIMITS, STAGES>(params, buffers, kernel_of, [&](const auto&, int64_t blocks) -> Error {
    size = count * blocks * params.shape.width;
    return nullptr;
  });
  return size;
}

// finish(partials, blocks) launches the second pass.
template <RowLimits LIMITS, int STAGES, class Params, class KernelOf, class Finish>
Error launch_backward(const Params& params, float* workspace, Stream stream,
                      const std::vector<Buffer>& buffers, const KernelOf& kernel_of, const Finish& finish) {
  if (params.shape.width == 0) return nullptr;
  return with_backward_kernel<LIMITS, STAGES>(
      params, buffers, kernel_of, [&](const auto& run, int64_t blocks) -> Error {
        const bool wanted = any_wanted(params.gradients);
        if (blocks > 0) {
          const Error error = run(stream, params, wanted ? workspace : nullptr);
          if (error) return error;
        }
        return wanted ? finish(workspace, blocks) : nullptr;
      });
}

}  // namespace evakernels::cuda
