// Buffers for the programs that drive launchers of csrc/cuda without Python.
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
  int64_t size() const { return (static_cast<int64_t>(bytes_.size()) - before_) / size_of(dtype_); }

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

// Every number was written, as a buffer begins as NaN, and what lies in front of them is untouched.
inline void check_written(const Buffer& buffer, const std::string& what) {
  bool written = true;
  for (int64_t i = 0; i < buffer.size(); ++i) written = written && !std::isnan(buffer.at(i));
  check(written, what + ": not written");
  check(buffer.others_are_intact(), "in front of " + what);
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
