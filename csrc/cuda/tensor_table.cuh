// The table of a model's tensors on the device, from which each block takes a chunk of one of them.
//
// It gets there as the arguments of small kernels, which write it down. Arguments are copied by the launch:
// the host neither waits for a transfer nor keeps memory alive for one, and a CUDA graph has a copy of its
// own. The same kernels work out what depends on step counts, norms and flags, none of which the host knows:
// the optimizer's rule.
#pragma once

#include "common/optimizer.h"
#include "cuda/elements.cuh"

namespace evakernels::cuda {

constexpr int64_t kChunk = 8192;  // elements: the unit of work, and of the sums that build a norm
constexpr int kVector = 4;  // elements of one access: 16 bytes of float32, and 8 of what is half as wide
constexpr int kNoVectors = -1;

struct TableItem {
  OptimizedTensor tensor;
  int64_t first_chunk;  // counted over all tensors
};

// What every entry begins with; an optimizer adds numbers of its own.
struct TableEntry {
  OptimizedTensor tensor;
  int64_t first_chunk;
  int head;  // the elements in front of the first vector; kNoVectors: some buffer would want another number
};

constexpr size_t kArgumentBytes = 32764;  // of a kernel, from this CUDA on
constexpr int kOldestDriver = 12010;
constexpr size_t kBatchSize = (kArgumentBytes - 128) / sizeof(TableItem);

// Rule::Entry is derived from TableEntry; rule.complete(entry, position) fills in the rest of it.
template <class Rule>
struct TableBatch {
  Rule rule;
  int64_t first;
  TableItem items[kBatchSize];
};

__device__ __forceinline__ bool is_set(const float* found_inf) { return found_inf && load(found_inf) > 0.0f; }

// 1 - beta^step, to full precision also for beta close to 1.
__device__ __forceinline__ double bias_of(double log_beta, float step) { return -expm1(step * log_beta); }

// The number of steps with the one that is being made, which is counted unless found_inf is set.
__device__ __forceinline__ float count_step(float* step, const float* found_inf) {
  const float made = load(step);
  if (is_set(found_inf)) return made;
  store(step, made + 1.0f);
  return made + 1.0f;
}

__device__ __forceinline__ int head_of(const TensorBuffer& buffer) {
  const unsigned bytes = buffer.dtype == DType::Float32 ? 4 : 2;
  const unsigned beyond = static_cast<unsigned>(reinterpret_cast<uintptr_t>(buffer.data) / bytes % kVector);
  return static_cast<int>((kVector - beyond) % kVector);
}

// Of the buffers that are there.
__device__ __forceinline__ int common_head(const OptimizedTensor& tensor) {
  const TensorBuffer buffers[] = {tensor.param, tensor.grad, tensor.exp_avg, tensor.exp_avg_sq};
  int head = kNoVectors;
  bool common = true;
#pragma unroll
  for (const TensorBuffer& buffer : buffers) {
    if (!buffer.data) continue;
    common = common && (head == kNoVectors || head == head_of(buffer));
    head = head_of(buffer);
  }
  return common ? head : kNoVectors;
}

// One thread a block: that way all threads of a warp read the same argument, which is what constant memory is
// made for.
template <class Rule>
__global__ void __launch_bounds__(1)
    table_kernel(const __grid_constant__ TableBatch<Rule> batch, typename Rule::Entry* entries) {
  const TableItem& item = batch.items[blockIdx.x];
  const int64_t position = batch.first + blockIdx.x;
  typename Rule::Entry entry;
  entry.tensor = item.tensor;
  entry.first_chunk = item.first_chunk;
  entry.head = common_head(item.tensor);
  batch.rule.complete(entry, position);
  entries[position] = entry;
}

// The tensor that a chunk is of: the last that begins with it or before it. One without elements has the
// first chunk of its successor.
template <class Entry>
__device__ __forceinline__ const Entry& entry_of(const Entry* entries, int64_t count, int64_t chunk) {
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
struct ChunkRange {
  int64_t begin;
  int64_t first_vector;
  int vectors;
  int head;
  int edges;

  __device__ __forceinline__ ChunkRange(const TableEntry& entry, int64_t chunk)
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

inline int64_t chunks_of(const OptimizedTensor& tensor) { return ceil_div(tensor.size, kChunk); }

inline int64_t chunks_of(const OptimizedTensor* tensors, int64_t count) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < count; ++i) chunks += chunks_of(tensors[i]);
  return chunks;
}

inline Error check_driver() {
  const int driver = driver_version();
  if (driver == 0 || driver >= kOldestDriver) return nullptr;
  return "the driver is too old for 32 KB of kernel arguments; it takes one for CUDA 12.1 or later (530)";
}

// Params has `tensors`, so many as `count` tells. Their table is allocated with room for `floats` behind it,
// and written.
template <class Rule, class Params>
Error write_table(const Params& params, const Rule& rule, int64_t floats, Scratch& scratch, Stream stream,
                  typename Rule::Entry** entries) {
  static_assert(sizeof(TableBatch<Rule>) + sizeof *entries <= kArgumentBytes);
  if (const Error error = check_driver()) return error;
  const int64_t size = params.count * int64_t{sizeof **entries / sizeof(float)} + floats;
  if (const Error error = scratch.allocate(reinterpret_cast<float**>(entries), size)) return error;
  TableBatch<Rule> batch;
  batch.rule = rule;
  int64_t chunk = 0;
  for (batch.first = 0; batch.first < params.count; batch.first += kBatchSize) {
    const int64_t left = params.count - batch.first;
    const unsigned size = static_cast<unsigned>(left < int64_t{kBatchSize} ? left : kBatchSize);
    for (unsigned i = 0; i < size; ++i) {
      batch.items[i] = {params.tensors[batch.first + i], chunk};
      chunk += chunks_of(batch.items[i].tensor);
    }
    const Error error = launch(table_kernel<Rule>, {size, 1, 1}, {1, 1, 1}, stream, batch, *entries);
    if (error) return error;
  }
  return nullptr;
}

}  // namespace evakernels::cuda
