// Launch plans of the norm kernels, from sizes and buffers.
//
// An op has a table of kernels per combination of element types:
//
//   kWide             elements per 16 bytes of the widest matrix
//   kLimits           elements per thread and threads per block that registers allow
//   kSums             sums over rows, of which each block writes partial ones
//   kernel<Layout>()  the kernel for a layout
#pragma once

#include <algorithm>
#include <array>
#include <limits>
#include <numeric>
#include <type_traits>
#include <utility>

#include "cuda/norm_plan.h"
#include "include/swiglu.h"

namespace evakernels::cuda {

// Bound for kernels with fewer steps than the maximum: three warps share a row, or a block has kRowsPerBlock.
constexpr int kThreadsOfFewSteps = 128;

// Threads of 16-bit backward kernels with two sums per column that an SM must hold; 0: as the layout has it.
// The compiler for 10.0 and later would take a third more registers than for 9.0, and fewer warps would be
// resident.
template <class L>
constexpr int kResidentThreads =
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
    L::E == 8 && L::V == 2  ? 512
    : L::E == 8 && L::V > 2 ? 384
                            : 0;
#else
    0;
#endif
template <class L>
constexpr int kBackwardThreads = kResidentThreads<L> > 0 ? kResidentThreads<L> : L::kThreads;
template <class L>
constexpr int kBackwardBlocks = kResidentThreads<L> > 0 ? 1 : L::kBlocks;

constexpr RowLimits kForwardLimits = {32, 256};

// Base of a table; `First` and `Others` are the element types of the matrices. Kernels of one type are
// compiled for every number of steps, those of mixed types only for the largest.
template <RowLimits LIMITS, int SUMS, class First, class... Others>
struct RowKernels {
  static constexpr int kWide = std::min({kWidestVector<First>, kWidestVector<Others>...});
  static constexpr int kMaxSteps = LIMITS.elements / kStep;
  static constexpr int kMinSteps = (std::is_same_v<First, Others> && ...) ? 1 : kMaxSteps;
  static constexpr RowLimits kLimits = LIMITS;
  static constexpr int kSums = SUMS;
};

// The kernel for 16-byte vectors and `steps` steps.
template <class Kernels, int... I>
auto wide_kernel(int steps, std::integer_sequence<int, I...>) {
  constexpr int kWide = Kernels::kWide, kMin = Kernels::kMinSteps;
  const std::array kernels = {
      Kernels::template kernel <
      Layout<kWide, (kMin + I) * kStep / kWide,
             kMin + I<Kernels::kMaxSteps ? kThreadsOfFewSteps : Kernels::kLimits.threads>>()...};
  return kernels[steps - kMin];
}

template <class Kernels>
auto kernel_for(const RowPlan& row) {
  constexpr int kWide = Kernels::kWide;
  constexpr RowLimits kLimits = Kernels::kLimits;
  if (row.vectors == 0) {
    return row.elements == kWide ? Kernels::template kernel<Layout<kWide, 0, kStreamingThreads>>()
                                 : Kernels::template kernel<Layout<1, 0, kStreamingThreads>>();
  }
  if (row.elements == 1) {
    return Kernels::template kernel<Layout<1, elements_per_thread(1, kLimits), kLimits.threads>>();
  }
  if constexpr (kWide == 4) {
    if (row.elements == 2) {
      return Kernels::template kernel<Layout<2, elements_per_thread(2, kLimits) / 2, kLimits.threads>>();
    }
  }
  return wide_kernel<Kernels>(row.vectors * kWide / kStep,
                              std::make_integer_sequence<int, Kernels::kMaxSteps - Kernels::kMinSteps + 1>{});
}

// `step`: a divisor of the width and of every row stride. Unaligned rows of 16 bits are read by element.
template <class Kernels>
auto plan_rows(int64_t rows, int64_t width, int64_t step, const std::vector<Buffer>& buffers) {
  constexpr int kWide = Kernels::kWide;
  const int aligned = aligned_elements(kWide, step, buffers);
  const int elements = aligned == kWide || kWide == 4 ? aligned : 1;
  const RowPlan row = plan_row(width, kWide, elements, Kernels::kLimits, Kernels::kMinSteps);
  LaunchPlan plan = {kernel_for<Kernels>(row), {1, 1, 1}, row.block, 0};
  // Kernels with partial sums launch no more blocks than are resident.
  const int64_t most = Kernels::kSums > 0 ? plan.resident_blocks() : std::numeric_limits<int>::max();
  plan.grid.x = static_cast<unsigned>(std::min(ceil_div(rows, row.block.y), most));
  return plan;
}

template <class Body>
auto with_half_type(DType dtype, const Body& body) {
  return dtype == DType::BFloat16 ? body(BFloat16{}) : body(Float16{});
}

// Plan of norm + add, with a table by the types of residual and branch that gpu_serves accepts.
template <template <class Residual, class Branch> class Kernels>
auto plan_norm_add(const NormShape& shape, const std::vector<Buffer>& buffers) {
  const auto plan = [&](auto residual, auto branch) {
    return plan_rows<Kernels<decltype(residual), decltype(branch)>>(shape.rows, shape.width, shape.width,
                                                                    buffers);
  };
  if (shape.branch_dtype == shape.dtype) {
    return with_element_type(shape.dtype, [&](auto type) { return plan(type, type); });
  }
  return shape.dtype == DType::Float32
             ? with_half_type(shape.branch_dtype, [&](auto branch) { return plan(float{}, branch); })
             : with_half_type(shape.dtype, [&](auto residual) { return plan(residual, float{}); });
}

// Plan of add + norm, with a table by the types of residual, branch and y that gpu_serves and norm_serves
// accept.
template <template <class Residual, class Branch, class Y> class Kernels>
auto plan_add_norm(const NormShape& shape, const std::vector<Buffer>& buffers) {
  const auto plan = [&](auto residual, auto branch, auto y) {
    return plan_rows<Kernels<decltype(residual), decltype(branch), decltype(y)>>(shape.rows, shape.width,
                                                                                 shape.width, buffers);
  };
  if (shape.branch_dtype == shape.dtype) {
    return with_element_type(shape.dtype, [&](auto type) { return plan(type, type, type); });
  }
  return with_half_type(shape.branch_dtype, [&](auto branch) {
    return shape.y_dtype == DType::Float32 ? plan(float{}, branch, float{}) : plan(float{}, branch, branch);
  });
}

// Launch bounds of SwiGLU with a norm: THREADS per block, more than most launches have, which limits
// registers and so leaves enough resident threads to hide memory latency.
template <class L, int THREADS>
constexpr int kThreadsFor = L::V == 0 ? L::kThreads : THREADS;
template <class L>
constexpr int kBlocksFor = L::V == 0 ? L::kBlocks : 1;

// The greatest common divisor of the width and of the row strides of gate and up.
inline int64_t common_step(int64_t width, const SwigluRows& gate, const SwigluRows& up) {
  return std::gcd(width, std::gcd(gate.stride, up.stride));
}

template <template <class T> class Kernels, class Params>
auto plan_swiglu_norm(const Params& params, const std::vector<Buffer>& buffers) {
  const int64_t step = common_step(params.width, params.gate, params.up);
  return with_element_type(params.dtype, [&](auto element) {
    return plan_rows<Kernels<decltype(element)>>(params.rows, params.width, step, buffers);
  });
}

}  // namespace evakernels::cuda
