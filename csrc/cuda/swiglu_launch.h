// The way from the parameters of a swiglu with a norm to the kernel for their dtype, width and alignment.
#pragma once

#include <vector>

#include "cuda/swiglu.cuh"

namespace evakernels::cuda {

// What __launch_bounds__ is told: a block of THREADS, though most have fewer. So no thread takes more
// registers than leave room for as many on a multiprocessor, which hide the latency of the memory.
template <class L, int THREADS>
constexpr int kThreadsFor = L::V == 0 ? L::kThreads : THREADS;
template <class L>
constexpr int kBlocksFor = L::V == 0 ? L::kBlocks : 1;

// Calls body(kernel, plan, bytes of shared memory). kernel_of(T{}, Layout{}) names the kernel; STAGES: of a
// row that goes by way of shared memory.
template <RowLimits LIMITS, int STAGES, class Params, class KernelOf, class Body>
Error with_norm_kernel(const Params& params, const std::vector<Buffer>& buffers, const KernelOf& kernel_of,
                       const Body& body) {
  return with_element_type(params.dtype, [&](auto element) {
    constexpr int kWide = kWidestAccess / int{sizeof(element)};
    const int64_t step = common_step(params.width, params.gate, params.up);
    const RowPlan plan = plan_rows(params.width, kWide, aligned_elements(kWide, step, buffers), LIMITS);
    return with_layout<kWide, LIMITS>(plan, [&](auto layout) {
      const size_t shared_bytes = bytes_of_stages<decltype(layout)>(STAGES, params.width, plan);
      return body(kernel_of(element, layout), plan, shared_bytes);
    });
  });
}

}  // namespace evakernels::cuda
