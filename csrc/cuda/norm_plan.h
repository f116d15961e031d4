// How the rows of a norm are laid over threads, and the kernel that is compiled for it.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "common/residual_norm.h"
#include "cuda/elements.cuh"

namespace evakernels::cuda {

constexpr int kRowsPerBlock = 4;  // where a row is one warp's
constexpr int kStreamingThreads = 256;
constexpr int kStep = 8;  // kernels are compiled for multiples of so many elements a thread

// What registers allow.
struct RowLimits {
  int elements;  // of a thread
  int threads;   // of a block
};

// E elements a vector, V vectors a thread (see norm_rows.cuh), THREADS a block at most.
template <int E_, int V_, int THREADS>
struct Layout {
  static constexpr int E = E_;
  static constexpr int V = V_;
  static constexpr int kThreads = THREADS;
  // Of a multiprocessor, at least: with 16-bit elements the registers of twelve warps, which keep enough
  // loads on their way; in streaming kernels the compiler would else spill to make room for twice as many.
  static constexpr int kBlocks = V == 0 ? 4 : E < 8 ? 1 : std::max(1, 384 / THREADS);
  static constexpr bool kStaged = false;
};

// Pairs of 16-bit elements, of rows that go by way of shared memory (staged_rows.cuh).
template <int V, int THREADS>
struct Staged : Layout<2, V, THREADS> {
  static constexpr int kBlocks = 512 / THREADS;  // with more, backward kernels would spill
  static constexpr bool kStaged = true;
};

constexpr int kLine = 128;  // bytes that a cache holds side by side

// Of shared memory, for a row that begins anywhere in a line.
__host__ __device__ inline int stage_bytes(int64_t width) {
  return (static_cast<int>(width) * 2 + kLine + kWidestAccess - 1) / kWidestAccess * kWidestAccess;
}

// The elements of a thread where E at a time are accessed: fewer where the accesses themselves take
// registers.
constexpr int elements_per_thread(int E, const RowLimits& limits) {
  return E == 1 ? kStep : E == 2 ? limits.elements * 3 / 4 : limits.elements;
}

struct RowPlan {
  int elements;  // of a vector
  int vectors;   // of a thread; 0: the row doesn't fit into registers
  dim3 block;
};

// A matrix or vector that is read or written E elements at a time.
struct Buffer {
  const void* data;
  DType dtype;
};

inline int size_of(DType dtype) { return dtype == DType::Float32 ? 4 : 2; }

// The most elements, up to `most`, that can be accessed at once in every row of every buffer.
inline int aligned_elements(int most, int64_t width, const std::vector<Buffer>& buffers) {
  for (const int elements : {most, 2}) {
    bool aligned = width % elements == 0;
    for (const Buffer& buffer : buffers) {
      const int bytes = std::min(kWidestAccess, elements * size_of(buffer.dtype));
      aligned = aligned && reinterpret_cast<uintptr_t>(buffer.data) % bytes == 0;
    }
    if (aligned) return elements;
  }
  return 1;
}

// `wide`: elements of 16 bytes.
inline RowPlan plan_rows(int64_t width, int wide, int elements, const RowLimits& limits) {
  const int per_thread = elements_per_thread(elements, limits);
  const int64_t per_warp = per_thread * kWarpSize;
  const int64_t warps = std::max<int64_t>(1, (width + per_warp - 1) / per_warp);
  if (warps * kWarpSize > limits.threads) return {elements == wide ? wide : 1, 0, {kStreamingThreads, 1, 1}};
  const unsigned threads = static_cast<unsigned>(warps * kWarpSize);
  const dim3 block = {threads, warps == 1 ? kRowsPerBlock : 1u, 1};
  if (elements < wide) return {elements, per_thread / elements, block};
  // No more steps than the row needs: empty vectors would cost time.
  const int64_t step = threads * kStep;
  const int steps = static_cast<int>(std::max<int64_t>(1, (width + step - 1) / step));
  return {elements, steps * kStep / elements, block};
}

inline int64_t blocks_for(int64_t rows, const RowPlan& plan) {
  return (rows + plan.block.y - 1) / plan.block.y;
}

// With a block for every plan.block.y rows.
template <class Kernel, class Params>
Error launch_on_rows(Kernel* kernel, int64_t rows, const RowPlan& plan, size_t shared_bytes, Stream stream,
                     const Params& params) {
  const int64_t blocks = std::min<int64_t>(blocks_for(rows, plan), std::numeric_limits<int>::max());
  return launch_with_memory(kernel, {static_cast<unsigned>(blocks), 1, 1}, plan.block, shared_bytes, stream,
                            params);
}

// Calls body(run, blocks) with as many blocks as run at the same time, or fewer if the rows are few: each
// block leaves partial sums behind. run(stream, params, workspace) launches them.
template <class Kernel, class Body>
Error with_resident_blocks(Kernel* kernel, int64_t rows, const RowPlan& plan, size_t shared_bytes,
                           const Body& body) {
  const int threads = static_cast<int>(plan.block.x * plan.block.y);
  const int resident = std::max(1, resident_blocks(kernel, threads, shared_bytes));
  const int64_t blocks = std::min<int64_t>(blocks_for(rows, plan), resident);
  const auto run = [&](auto... arguments) {
    return launch_with_memory(kernel, {static_cast<unsigned>(blocks), 1, 1}, plan.block, shared_bytes,
                              arguments...);
  };
  return body(run, blocks);
}

// Rows with fewer steps than are possible are shared by three warps at most, or a block has kRowsPerBlock.
constexpr int kThreadsOfFewSteps = 128;

template <int WIDE, RowLimits LIMITS, int STEPS, class Body>
Error with_steps(int steps, const Body& body) {
  if constexpr (STEPS * kStep < LIMITS.elements) {
    if (steps == STEPS) return body(Layout<WIDE, STEPS * kStep / WIDE, kThreadsOfFewSteps>{});
    return with_steps<WIDE, LIMITS, STEPS + 1>(steps, body);
  } else {
    return body(Layout<WIDE, STEPS * kStep / WIDE, LIMITS.threads>{});
  }
}

// Where 2 elements at a time are accessed.
template <RowLimits LIMITS>
using Pairs = Layout<2, elements_per_thread(2, LIMITS) / 2, LIMITS.threads>;
template <RowLimits LIMITS>
using StagedPairs = Staged<Pairs<LIMITS>::V, LIMITS.threads>;

// Calls body with the Layout of a plan. WIDE: elements of 16 bytes; 1: only the layout for all cases is
// built.
template <int WIDE, RowLimits LIMITS, class Body>
Error with_layout(const RowPlan& plan, const Body& body) {
  using Streaming = Layout<1, 0, kStreamingThreads>;
  if constexpr (WIDE == 1) {
    return body(Streaming{});
  } else {
    if (plan.vectors == 0) {
      return plan.elements == WIDE ? body(Layout<WIDE, 0, kStreamingThreads>{}) : body(Streaming{});
    }
    if (plan.elements == 1) return body(Layout<1, elements_per_thread(1, LIMITS), LIMITS.threads>{});
    if (plan.elements == 2) return body(std::conditional_t<WIDE == 8, StagedPairs<LIMITS>, Pairs<LIMITS>>{});
    return with_steps<WIDE, LIMITS, 1>(plan.vectors * WIDE / kStep, body);
  }
}

// Of shared memory, for a block of kernels with the layout L in which a row has so many stages.
template <class L>
size_t bytes_of_stages(int stages, int64_t width, const RowPlan& plan) {
  return L::kStaged ? size_t{plan.block.y} * static_cast<size_t>(stages * stage_bytes(width)) : 0;
}

// The element types of residual and branch. kWide: elements of 16 bytes of the larger; 1 for pairs that no
// model uses, for which one kernel has to do.
template <class Residual_, class Branch_>
struct ElementTypes {
  using Residual = Residual_;
  using Branch = Branch_;
  static constexpr bool kUsed = std::is_same_v<Residual, Branch> || std::is_same_v<Residual, float>;
  static constexpr int kWide = kUsed ? kWidestAccess / int{sizeof(Residual)} : 1;
};

template <class Residual, class Body>
Error with_branch_type(DType branch, const Body& body) {
  if (branch == DType::Float32) return body(ElementTypes<Residual, float>{});
  if (branch == DType::BFloat16) return body(ElementTypes<Residual, BFloat16>{});
  return body(ElementTypes<Residual, Float16>{});
}

template <class Body>
Error with_element_types(const ResidualNormShape& shape, const Body& body) {
  if (shape.dtype == DType::Float32) return with_branch_type<float>(shape.branch_dtype, body);
  if (shape.dtype == DType::BFloat16) return with_branch_type<BFloat16>(shape.branch_dtype, body);
  return with_branch_type<Float16>(shape.branch_dtype, body);
}

inline Buffer buffer_of(const ParameterVector& vector) { return {vector.data, vector.dtype}; }

}  // namespace evakernels::cuda
