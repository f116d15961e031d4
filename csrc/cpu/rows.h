// Distribution of rows over threads, and sums over all rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <new>
#include <numeric>

#include "common/numerics.h"
#include "include/launcher.h"

namespace evakernels::cpu {

// Minimum elements per task.
constexpr int64_t kElementsPerTask = 16384;

// Rows are summed in chunks. The number of chunks depends on the shape alone, so results don't depend on the
// number of threads.
constexpr int64_t kMaxChunks = 64;
constexpr int64_t kMinRowsPerChunk = 32;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t tasks_grain(int64_t elements_per_item) {
  return std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, elements_per_item));
}

// How many dense rows an elementwise op merges into one, as short rows would be tails only.
inline int64_t rows_in_one(int64_t rows, int64_t width) {
  return width < 64 ? std::gcd(rows, int64_t{64}) : 1;
}

// Floats aligned to a cache line; std::vector aligns to 16 bytes only.
class AlignedFloats {
 public:
  // Uninitialised.
  explicit AlignedFloats(int64_t size)
      : data_(size == 0 ? nullptr : static_cast<float*>(::operator new(size * sizeof(float), kAlignment))),
        size_(size) {}
  AlignedFloats(int64_t size, float value) : AlignedFloats(size) { std::fill(begin(), end(), value); }
  ~AlignedFloats() { ::operator delete(data_, kAlignment); }
  AlignedFloats(const AlignedFloats&) = delete;
  AlignedFloats& operator=(const AlignedFloats&) = delete;

  float* data() { return data_; }
  const float* data() const { return data_; }
  float* begin() { return data_; }
  float* end() { return data_ + size_; }
  float& operator[](int64_t i) { return data_[i]; }
  float operator[](int64_t i) const { return data_[i]; }
  int64_t size() const { return size_; }

 private:
  static constexpr std::align_val_t kAlignment{64};

  float* data_;
  int64_t size_;
};

// A parameter as floats: the caller's buffer if it is float32, otherwise a converted copy.
class FloatVector {
 public:
  FloatVector(const void* data, DType dtype, int64_t width, float missing)
      : copy_(is_floats(data, dtype) ? 0 : width, missing), data_(copy_.data()) {
    if (is_floats(data, dtype)) data_ = static_cast<const float*>(data);
    if (data == nullptr || dtype == DType::Float32) return;
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
  static bool is_floats(const void* data, DType dtype) { return data != nullptr && dtype == DType::Float32; }

  AlignedFloats copy_;
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

// Sums over rows: one row of partial sums per chunk, added in the order of the chunks.
class ChunkedSum {
 public:
  ChunkedSum(void* target, DType dtype, int64_t chunks, int64_t width)
      : target_(target), dtype_(dtype), chunks_(chunks), width_(width), rows_(target ? chunks * width : 0) {}

  // The zeroed row of a chunk, zeroed by the task that uses it; null if no sum is needed.
  float* row(int64_t chunk) {
    if (target_ == nullptr) return nullptr;
    float* sum = rows_.data() + chunk * width_;
    std::fill(sum, sum + width_, 0.0f);
    return sum;
  }

  void write_total(ParallelFor parallel_for) {
    if (target_ == nullptr) return;
    run_parallel(parallel_for, width_, tasks_grain(chunks_), [&](int64_t begin, int64_t end) {
      AlignedFloats total(end - begin, 0.0f);
      for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
        const float* partial = rows_.data() + chunk * width_ + begin;
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
  AlignedFloats rows_;
};

// The chunks of a matrix.
struct RowChunks {
  RowChunks(int64_t rows, int64_t width)
      : rows(rows),
        width(width),
        rows_each(std::max(kMinRowsPerChunk, ceil_div(rows, kMaxChunks))),
        count(ceil_div(rows, rows_each)) {}

  // Runs body(chunk, begin row, end row) for every chunk.
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
