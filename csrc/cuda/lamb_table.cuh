// The table of a model's tensors on the device, from which each block takes a chunk of one of them.
//
// It gets there as the arguments of small kernels, which write it down. Arguments are copied by the launch:
// the host neither waits for a transfer nor keeps memory alive for one, and a CUDA graph has a copy of its
// own. The same kernels work out what depends on step counts, norms and flags, none of which the host knows.
#pragma once

#include "common/lamb.h"
#include "cuda/elements.cuh"

namespace evakernels::cuda {

constexpr int64_t kChunk = 8192;  // elements: the unit of work, and of the sums that build a norm
constexpr int kVector = 4;  // elements of one access: 16 bytes of float32, and 8 of what is half as wide
constexpr int kNoVectors = -1;

// u = m_scale m / (sqrt(v_scale v) + eps) + weight_decay w
struct LambDirection {
  float m_scale;
  float v_scale;
  float weight_decay;

  __device__ __forceinline__ float of(float w, float m, float v, float eps) const {
    return m * m_scale / (sqrtf(v * v_scale) + eps) + w * weight_decay;
  }
};

struct LambEntry {
  LambTensor tensor;
  int64_t first_chunk;  // counted over all tensors
  LambDirection direction;
  float factor;  // of u in the step
  int head;  // the elements in front of the first vector; kNoVectors: some buffer would want another number
};

struct LambItem {
  LambTensor tensor;
  int64_t first_chunk;
};

constexpr size_t kArgumentBytes = 32764;  // of a kernel, from CUDA 12.1 on
constexpr size_t kBatchSize = (kArgumentBytes - 128) / sizeof(LambItem);

struct LambBatch {
  const float* found_inf;
  const float* squared_norms;  // null: the phase is update, which counts the step
  double log_beta1;
  double log_beta2;
  bool nvlamb;
  int64_t first;
  LambItem items[kBatchSize];
};
static_assert(sizeof(LambBatch) + sizeof(LambEntry*) <= kArgumentBytes);

__device__ __forceinline__ bool is_set(const float* found_inf) { return found_inf && load(found_inf) > 0.0f; }

__device__ __forceinline__ int head_of(const LambBuffer& buffer) {
  const unsigned bytes = buffer.dtype == DType::Float32 ? 4 : 2;
  const unsigned beyond = static_cast<unsigned>(reinterpret_cast<uintptr_t>(buffer.data) / bytes % kVector);
  return static_cast<int>((kVector - beyond) % kVector);
}

__device__ __forceinline__ int common_head(const LambTensor& tensor) {
  const int head = head_of(tensor.param);
  const bool common = (!tensor.grad.data || head_of(tensor.grad) == head) &&
                      head_of(tensor.exp_avg) == head && head_of(tensor.exp_avg_sq) == head;
  return common ? head : kNoVectors;
}

// What u is multiplied with: the rate, the trust ratio, and the bias correction.
__device__ __forceinline__ double factor_of(const LambTensor& tensor, const float* squared_norms, bool nvlamb,
                                            double bias1, double bias2) {
  const double param = sqrtf(squared_norms[0]), direction = sqrtf(squared_norms[1]);
  const double ratio = param > 0.0 && direction > 0.0 ? param / direction : 1.0;
  if (nvlamb) return tensor.weight_decay != 0.0 ? tensor.lr * ratio : tensor.lr;
  // Not by fmin and fmax, which would lose a NaN.
  const double clipped = ratio < kLowestRatio ? kLowestRatio : ratio > kHighestRatio ? kHighestRatio : ratio;
  return tensor.lr * clipped * sqrt(bias2) / bias1;
}

// One thread a block: that way all threads of a warp read the same argument, which is what constant memory is
// made for.
static __global__ void __launch_bounds__(1)
    lamb_table_kernel(const __grid_constant__ LambBatch batch, LambEntry* entries) {
  const LambItem& item = batch.items[blockIdx.x];
  const LambTensor& tensor = item.tensor;
  const int64_t position = batch.first + blockIdx.x;
  float step = load(tensor.step);
  if (!batch.squared_norms && !is_set(batch.found_inf)) {
    step += 1.0f;
    store(tensor.step, step);
  }
  // 1 - beta^step, to full precision also for beta close to 1.
  const double bias1 = -expm1(step * batch.log_beta1), bias2 = -expm1(step * batch.log_beta2);
  LambEntry entry;
  entry.tensor = tensor;
  entry.first_chunk = item.first_chunk;
  entry.direction.m_scale = batch.nvlamb ? static_cast<float>(1.0 / bias1) : 1.0f;
  entry.direction.v_scale = batch.nvlamb ? static_cast<float>(1.0 / bias2) : 1.0f;
  entry.direction.weight_decay = static_cast<float>(tensor.weight_decay);
  entry.factor = 0.0f;
  if (batch.squared_norms) {
    const float* const norms = batch.squared_norms + 2 * position;
    entry.factor = static_cast<float>(factor_of(tensor, norms, batch.nvlamb, bias1, bias2));
  }
  entry.head = common_head(tensor);
  entries[position] = entry;
}

// The tensor that a chunk is of: the last that begins with it or before it. One without elements has the
// first chunk of its successor.
__device__ __forceinline__ const LambEntry& entry_of(const LambEntry* entries, int64_t count, int64_t chunk) {
  int64_t low = 0, high = count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (entries[middle].first_chunk <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return entries[low];
}

// The elements of a chunk: vectors, and the edges around them, element by element.
struct LambRange {
  int64_t begin;
  int64_t first_vector;
  int vectors;
  int head;
  int edges;

  __device__ __forceinline__ LambRange(const LambEntry& entry, int64_t chunk)
      : begin((chunk - entry.first_chunk) * kChunk) {
    const int64_t left = entry.tensor.size - begin;
    const int size = static_cast<int>(left < kChunk ? left : kChunk);
    head = entry.head == kNoVectors || entry.head > size ? size : entry.head;
    first_vector = begin + head;
    vectors = (size - head) / kVector;
    edges = size - vectors * kVector;
  }

  __device__ __forceinline__ int64_t vector(int i) const { return first_vector + int64_t{i} * kVector; }
  __device__ __forceinline__ int64_t edge(int i) const {
    return begin + i + (i < head ? 0 : vectors * kVector);
  }
};

inline int64_t chunks_of(const LambTensor& tensor) { return (tensor.size + kChunk - 1) / kChunk; }

inline int64_t chunks_of(const LambTensor* tensors, int64_t count) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < count; ++i) chunks += chunks_of(tensors[i]);
  return chunks;
}

// Writes the entries of all tensors; `batch` brings what holds for all of them.
inline Error launch_table(const LambTensor* tensors, int64_t count, LambBatch& batch, LambEntry* entries,
                          Stream stream) {
  int64_t chunk = 0;
  for (batch.first = 0; batch.first < count; batch.first += kBatchSize) {
    const int64_t left = count - batch.first;
    const unsigned size = static_cast<unsigned>(left < int64_t{kBatchSize} ? left : kBatchSize);
    for (unsigned i = 0; i < size; ++i) {
      batch.items[i] = {tensors[batch.first + i], chunk};
      chunk += chunks_of(tensors[batch.first + i]);
    }
    const Error error = launch(lamb_table_kernel, {size, 1, 1}, {1, 1, 1}, stream, batch, entries);
    if (error) return error;
  }
  return nullptr;
}

}  // namespace evakernels::cuda
