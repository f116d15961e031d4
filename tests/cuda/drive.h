// Buffers, and what is expected of the norms, for the programs that drive launchers of csrc/cuda without
// Python.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <string>
#include <vector>

#include "common/numerics.h"
#include "drive_memory.h"
#include "include/launcher.h"

namespace evakernels::drive {

constexpr double kEps = 1e-6;

inline int failures = 0;

inline void check(bool good, const std::string& what) {
  if (good) return;
  ++failures;
  std::printf("wrong: %s\n", what.c_str());
  if (!std::getenv("EVAKERNELS_FIRST_COMPLAINT")) return;
  std::fflush(stdout);
  std::_Exit(1);  // who looks for one fault needn't wait for the rest
}

// Numbers in [-1, 1), the same in every run.
inline double next_number() {
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<double>(state >> 33) / (1u << 30) - 1.0;
}

// A buffer of any dtype, no byte longer than it must be; `before` elements of what is allocated are somebody
// else's.
class Buffer {
 public:
  Buffer(DType dtype, int64_t size, int64_t before = 0)
      : dtype_(dtype), before_(before * size_of(dtype)), bytes_(before_ + size * size_of(dtype), 0xFF) {
    std::fill_n(bytes_.begin(), before_, kOthers);
  }

  static Buffer random(DType dtype, int64_t size, int64_t before = 0) {
    Buffer buffer(dtype, size, before);
    for (int64_t i = 0; i < size; ++i) buffer.set(i, static_cast<float>(next_number()));
    buffer.settle();
    return buffer;
  }

  static Buffer of(float value) {
    Buffer buffer(DType::Float32, 1);
    buffer.set(0, value);
    buffer.settle();
    return buffer;
  }

  // After the host has written to it.
  void settle() { drive::settle(bytes_); }

  void* data() { return bytes_.data() + before_; }
  float* floats() { return static_cast<float*>(data()); }
  DType dtype() const { return dtype_; }

  bool others_are_intact() const {
    return std::all_of(bytes_.begin(), bytes_.begin() + before_, [](int byte) { return byte == kOthers; });
  }

  double at(int64_t i) const {
    const unsigned char* const data = bytes_.data() + before_;
    if (dtype_ == DType::Float32) return reinterpret_cast<const float*>(data)[i];
    const uint32_t bits = reinterpret_cast<const uint16_t*>(data)[i];
    return dtype_ == DType::BFloat16 ? bfloat16_to_float<float>(bits) : float16_to_float<float>(bits);
  }

 private:
  static constexpr unsigned char kOthers = 0x5A;

  static int64_t size_of(DType dtype) { return dtype == DType::Float32 ? 4 : 2; }

  void set(int64_t i, float value) {
    if (dtype_ == DType::Float32) {
      floats()[i] = value;
    } else {
      const uint32_t bits =
          dtype_ == DType::BFloat16 ? float_to_bfloat16<uint32_t>(value) : float_to_float16<uint32_t>(value);
      static_cast<uint16_t*>(data())[i] = static_cast<uint16_t>(bits);
    }
  }

  DType dtype_;
  int64_t before_;  // in bytes
  Vector<unsigned char> bytes_;
};

// What a launcher asks for; it lives until what was launched is done.
class Scratch final : public cuda::Scratch {
 public:
  cuda::Error allocate(float** memory, int64_t floats) override {
    memory_.emplace(DType::Float32, floats);
    *memory = memory_->floats();
    return nullptr;
  }

 private:
  std::optional<Buffer> memory_;
};

struct Case {
  int64_t rows;
  int64_t width;
  DType dtype;
};

// By how many elements the matrices of a case are moved away from a word of 16 bytes: where rows can be
// staged, by several.
inline std::vector<int64_t> shifts_of(const Case& c) {
  if (c.dtype == DType::Float32 || c.width % 2 != 0) return {0};
  return {0, 6};
}

inline std::string name_of(const Case& c, const char* what) {
  return std::string(what) + " of " + std::to_string(c.rows) + " rows of " + std::to_string(c.width) +
         ", dtype " + std::to_string(static_cast<int>(c.dtype));
}

// To the precision of `dtype`; infinities as they are. What lies in front of the numbers is untouched.
inline void compare(const Buffer& actual, const std::vector<double>& expected, const std::string& what,
                    DType dtype) {
  const double eps = dtype == DType::Float32 ? 1e-5 : dtype == DType::BFloat16 ? 8e-3 : 1e-3;
  double worst = 0.0, largest = 1.0;
  for (double value : expected) {
    if (std::isfinite(value)) largest = std::fmax(largest, std::fabs(value));
  }
  for (size_t i = 0; i < expected.size(); ++i) {
    const double value = actual.at(static_cast<int64_t>(i));
    const double error = value == expected[i] ? 0.0 : std::fabs(value - expected[i]);
    worst = std::isnan(error) ? INFINITY : std::fmax(worst, error);
  }
  check(worst <= eps * largest, what + ": error " + std::to_string(worst));
  check(actual.others_are_intact(), "in front of " + what);
}

struct Statistics {
  double mean = 0.0;
  double rstd = 0.0;
};

inline Statistics statistics_of(const std::vector<double>& x, int64_t row, int64_t width) {
  double mean = 0.0, squares = 0.0;
  for (int64_t i = 0; i < width; ++i) mean += x[row * width + i] / width;
  for (int64_t i = 0; i < width; ++i) squares += std::pow(x[row * width + i] - mean, 2);
  return {mean, 1.0 / std::sqrt(squares / width + kEps)};
}

inline std::vector<double> values_of(const Buffer& buffer, int64_t size) {
  std::vector<double> values(size);
  for (int64_t i = 0; i < size; ++i) values[i] = buffer.at(i);
  return values;
}

// The gradient of norm(x) * weight for the gradient dy, and the sums for the gradients of weight and bias.
struct NormGradient {
  std::vector<double> dx, dweight, dbias;

  NormGradient(const std::vector<double>& dy, const std::vector<double>& x, const Buffer& weight,
               int64_t rows, int64_t width)
      : dx(rows * width), dweight(width), dbias(width) {
    for (int64_t row = 0; row < rows; ++row) {
      const Statistics s = statistics_of(x, row, width);
      const auto normalised = [&](int64_t i) { return (x[row * width + i] - s.mean) * s.rstd; };
      double shift = 0.0, slope = 0.0;
      for (int64_t i = 0; i < width; ++i) {
        const double g = dy[row * width + i] * weight.at(i);
        shift += g / width;
        slope += g * normalised(i) / width;
        dweight[i] += dy[row * width + i] * normalised(i);
        dbias[i] += dy[row * width + i];
      }
      for (int64_t i = 0; i < width; ++i) {
        dx[row * width + i] = (dy[row * width + i] * weight.at(i) - shift - normalised(i) * slope) * s.rstd;
      }
    }
  }
};

inline std::vector<double> norm_of(const std::vector<double>& x, const Buffer& weight, const Buffer& bias,
                                   int64_t rows, int64_t width) {
  std::vector<double> y(rows * width);
  for (int64_t row = 0; row < rows; ++row) {
    const Statistics s = statistics_of(x, row, width);
    for (int64_t i = 0; i < width; ++i) {
      y[row * width + i] = (x[row * width + i] - s.mean) * s.rstd * weight.at(i) + bias.at(i);
    }
  }
  return y;
}

inline void run(cuda::Error error, const std::string& what) {
  if (!error) error = finish();
  check(!error, what + ": " + (error ? error : ""));
}

// Each runs the kernels of an op on one matrix.
void drive_gelu(const Case& c);
void drive_norms(const Case& c);
void drive_swiglu(const Case& c);
void drive_token_dropout(const Case& c);
// And on inputs of their own.
void drive_lamb();
void drive_rope_attention();

}  // namespace evakernels::drive
