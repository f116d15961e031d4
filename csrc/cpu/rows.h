// What the launchers of row-wise ops share: how rows are dealt out to threads, and sums over all rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/dtype.h"
#include "common/numerics.h"
#include "cpu/parallel.h"

namespace evakernels::cpu {

// Fewer elements than this are not worth waking a thread for.
constexpr int64_t kElementsPerTask = 16384;

// Rows are summed into dweight and dbias in chunks whose number depends on the shape alone: enough to keep
// many cores busy, few enough that the partial sums stay small.
constexpr int64_t kMaxChunks = 64;
constexpr int64_t kMinRowsPerChunk = 16;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t tasks_grain(int64_t elements_per_item) {
  return std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, elements_per_item));
}

// A parameter vector as floats: the caller's own buffer where it already is that, else a converted copy.
class FloatVector {
 public:
  FloatVector(const void* data, DType dtype, int64_t width, float missing) {
    if (data != nullptr && dtype == DType::Float32) {
      data_ = static_cast<const float*>(data);
      return;
    }
    copy_.resize(width, missing);
    data_ = copy_.data();
    if (data == nullptr) return;
    const auto* bits = static_cast<const uint16_t*>(data);
    for (int64_t i = 0; i < width; ++i) {
      const uint32_t lane = bits[i];
      copy_[i] = dtype == DType::BFloat16 ? bfloat16_to_float<float>(lane) : float16_to_float<float>(lane);
    }
  }
  FloatVector(const FloatVector&) = delete;
  FloatVector& operator=(const FloatVector&) = delete;

  const float* data() const { return data_; }

 private:
  std::vector<float> copy_;
  const float* data_;
};

inline void store_as(DType dtype, void* target, int64_t index, float value) {
  switch (dtype) {
    case DType::Float32:
      static_cast<float*>(target)[index] = value;
      break;
    case DType::BFloat16:
      static_cast<uint16_t*>(target)[index] = static_cast<uint16_t>(float_to_bfloat16<uint32_t>(value));
      break;
    case DType::Float16:
      static_cast<uint16_t*>(target)[index] = static_cast<uint16_t>(float_to_float16<uint32_t>(value));
      break;
  }
}

// Sums of rows that several tasks build, one row of floats for each chunk, added up in the order of the
// chunks.
class ChunkedSum {
 public:
  ChunkedSum(void* target, DType dtype, int64_t chunks, int64_t width)
      : target_(target), dtype_(dtype), chunks_(chunks), width_(width), rows_(target ? chunks * width : 0) {}

  float* row(int64_t chunk) { return target_ ? rows_.data() + chunk * width_ : nullptr; }

  void write_total(ParallelFor parallel_for) {
    if (target_ == nullptr) return;
    run_parallel(parallel_for, width_, tasks_grain(chunks_), [&](int64_t begin, int64_t end) {
      std::vector<float> total(end - begin);
      for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
        const float* partial = row(chunk) + begin;
        for (int64_t i = 0; i < end - begin; ++i) total[i] += partial[i];
      }
      for (int64_t i = begin; i < end; ++i) store_as(dtype_, target_, i, total[i - begin]);
    });
  }

 private:
  void* target_;
  DType dtype_;
  int64_t chunks_;
  int64_t width_;
  std::vector<float> rows_;
};

// How many rows a chunk has whose share of such sums is built by one task.
inline int64_t rows_per_chunk(int64_t rows) { return std::max(kMinRowsPerChunk, ceil_div(rows, kMaxChunks)); }

// The chunks of a matrix.
struct RowChunks {
  RowChunks(int64_t rows, int64_t width)
      : rows(rows), width(width), rows_each(rows_per_chunk(rows)), count(ceil_div(rows, rows_each)) {}

  // Runs body(chunk, first row, row behind the last) for every chunk.
  template <class Body>
  void run(ParallelFor parallel_for, const Body& body) const {
    run_parallel(parallel_for, count, tasks_grain(rows_each * width), [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t first = chunk * rows_each;
        body(chunk, first, std::min(first + rows_each, rows));
      }
    });
  }

  int64_t rows, width, rows_each, count;
};

}  // namespace evakernels::cpu
