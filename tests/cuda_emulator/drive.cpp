// Runs the launchers of csrc/cuda on buffers of its own and compares with sums in double: for what can't run
// under Python, as the thread sanitizer. Prints what is wrong; returns 1 if anything is.
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "common/numerics.h"
#include "cuda/lamb.h"
#include "cuda/layer_norm.h"
#include "cuda/residual_norm.h"

namespace {

using namespace evakernels;

constexpr double kEps = 1e-6;

int failures = 0;

void check(bool good, const std::string& what) {
  if (good) return;
  ++failures;
  std::printf("wrong: %s\n", what.c_str());
}

// Numbers in [-1, 1), the same in every run.
double next_number() {
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<double>(state >> 33) / (1u << 30) - 1.0;
}

// A buffer of any dtype, no byte longer than it must be.
class Buffer {
 public:
  Buffer(DType dtype, int64_t size) : dtype_(dtype), bytes_(size * (dtype == DType::Float32 ? 4 : 2), 0xFF) {}

  static Buffer random(DType dtype, int64_t size) {
    Buffer buffer(dtype, size);
    for (int64_t i = 0; i < size; ++i) buffer.set(i, static_cast<float>(next_number()));
    return buffer;
  }

  void* data() { return bytes_.data(); }
  float* floats() { return reinterpret_cast<float*>(bytes_.data()); }
  DType dtype() const { return dtype_; }

  double at(int64_t i) const {
    if (dtype_ == DType::Float32) return reinterpret_cast<const float*>(bytes_.data())[i];
    const uint32_t bits = reinterpret_cast<const uint16_t*>(bytes_.data())[i];
    return dtype_ == DType::BFloat16 ? bfloat16_to_float<float>(bits) : float16_to_float<float>(bits);
  }

 private:
  void set(int64_t i, float value) {
    if (dtype_ == DType::Float32) {
      floats()[i] = value;
    } else {
      const uint32_t bits =
          dtype_ == DType::BFloat16 ? float_to_bfloat16<uint32_t>(value) : float_to_float16<uint32_t>(value);
      reinterpret_cast<uint16_t*>(bytes_.data())[i] = static_cast<uint16_t>(bits);
    }
  }

  DType dtype_;
  std::vector<unsigned char> bytes_;
};

struct Case {
  int64_t rows;
  int64_t width;
  DType dtype;
};

std::string name_of(const Case& c, const char* what) {
  return std::string(what) + " of " + std::to_string(c.rows) + " rows of " + std::to_string(c.width) +
         ", dtype " + std::to_string(static_cast<int>(c.dtype));
}

// To the precision of `dtype`.
void compare(const Buffer& actual, const std::vector<double>& expected, const std::string& what,
             DType dtype) {
  const double eps = dtype == DType::Float32 ? 1e-5 : dtype == DType::BFloat16 ? 8e-3 : 1e-3;
  double worst = 0.0, largest = 1.0;
  for (double value : expected) largest = std::fmax(largest, std::fabs(value));
  for (size_t i = 0; i < expected.size(); ++i) {
    const double error = std::fabs(actual.at(static_cast<int64_t>(i)) - expected[i]);
    if (!(error <= worst)) worst = error;  // NaN is the worst
  }
  check(worst <= eps * largest, what + ": error " + std::to_string(worst));
}

struct Statistics {
  double mean = 0.0;
  double rstd = 0.0;
};

Statistics statistics_of(const std::vector<double>& x, int64_t row, int64_t width) {
  double mean = 0.0, squares = 0.0;
  for (int64_t i = 0; i < width; ++i) mean += x[row * width + i] / width;
  for (int64_t i = 0; i < width; ++i) squares += std::pow(x[row * width + i] - mean, 2);
  return {mean, 1.0 / std::sqrt(squares / width + kEps)};
}

std::vector<double> values_of(const Buffer& buffer, int64_t size) {
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

std::vector<double> norm_of(const std::vector<double>& x, const Buffer& weight, const Buffer& bias,
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

void run(cuda::Error error, const std::string& what) { check(!error, what + ": " + (error ? error : "")); }

void drive_layer_norm(const Case& c) {
  const int64_t size = c.rows * c.width;
  Buffer x = Buffer::random(c.dtype, size), dy = Buffer::random(c.dtype, size);
  Buffer weight = Buffer::random(DType::Float32, c.width), bias = Buffer::random(DType::Float32, c.width);
  Buffer y(c.dtype, size), mean(DType::Float32, c.rows), rstd(DType::Float32, c.rows);
  const LayerNormForward forward = {x.data(),      weight.data(), bias.data(),    y.data(),
                                    mean.floats(), rstd.floats(), c.rows,         c.width,
                                    kEps,          c.dtype,       DType::Float32, false};
  run(cuda::layer_norm_forward(forward, nullptr), name_of(c, "layer_norm_forward"));
  compare(y, norm_of(values_of(x, size), weight, bias, c.rows, c.width), name_of(c, "y"), y.dtype());

  Buffer dx(c.dtype, size), dweight(DType::Float32, c.width), dbias(DType::Float32, c.width);
  const LayerNormBackward backward = {dy.data(), x.data(),       weight.data(), mean.floats(), rstd.floats(),
                                      dx.data(), dweight.data(), dbias.data(),  c.rows,        c.width,
                                      c.dtype,   DType::Float32, false};
  Buffer workspace(DType::Float32, cuda::layer_norm_backward_workspace(backward));
  run(cuda::layer_norm_backward(backward, workspace.floats(), nullptr), name_of(c, "layer_norm_backward"));
  const NormGradient expected(values_of(dy, size), values_of(x, size), weight, c.rows, c.width);
  compare(dx, expected.dx, name_of(c, "dx"), dx.dtype());
  compare(dweight, expected.dweight, name_of(c, "dweight"), dweight.dtype());
  compare(dbias, expected.dbias, name_of(c, "dbias"), dbias.dtype());
}

void drive_add_norm(const Case& c) {
  const int64_t size = c.rows * c.width;
  Buffer residual = Buffer::random(c.dtype, size), branch = Buffer::random(c.dtype, size);
  Buffer weight = Buffer::random(DType::Float32, c.width), bias = Buffer::random(DType::Float32, c.width);
  Buffer layer_scale = Buffer::random(DType::Float32, c.width),
         row_scale = Buffer::random(DType::Float32, c.rows);
  Buffer y(c.dtype, size), x(c.dtype, size), mean(DType::Float32, c.rows), rstd(DType::Float32, c.rows);
  const ResidualNormShape shape = {c.rows, c.width, 1, c.dtype, c.dtype, false};
  const ResidualNormParameters parameters = {{weight.data(), DType::Float32},
                                             {bias.data(), DType::Float32},
                                             {layer_scale.data(), DType::Float32},
                                             {row_scale.data(), DType::Float32}};
  const AddNormForward forward = {residual.data(), branch.data(), y.data(),   x.data(), mean.floats(),
                                  rstd.floats(),   kEps,          parameters, shape};
  run(cuda::add_norm_forward(forward, nullptr), name_of(c, "add_norm_forward"));
  std::vector<double> total(size);
  for (int64_t i = 0; i < size; ++i) {
    total[i] = residual.at(i) + branch.at(i) * layer_scale.at(i % c.width) * row_scale.at(i / c.width);
  }
  compare(x, total, name_of(c, "the sum"), x.dtype());
  compare(y, norm_of(total, weight, bias, c.rows, c.width), name_of(c, "y of the sum"), y.dtype());

  Buffer dy = Buffer::random(c.dtype, size), dx = Buffer::random(c.dtype, size);
  Buffer dresidual(c.dtype, size), dbranch(c.dtype, size), dweight(DType::Float32, c.width);
  Buffer dbias(DType::Float32, c.width), dlayer_scale(DType::Float32, c.width);
  const AddNormBackward backward = {dy.data(),
                                    dx.data(),
                                    x.data(),
                                    branch.data(),
                                    mean.floats(),
                                    rstd.floats(),
                                    dresidual.data(),
                                    dbranch.data(),
                                    parameters,
                                    {{dweight.data(), DType::Float32},
                                     {dbias.data(), DType::Float32},
                                     {dlayer_scale.data(), DType::Float32}},
                                    shape};
  Buffer workspace(DType::Float32, cuda::add_norm_backward_workspace(backward));
  run(cuda::add_norm_backward(backward, workspace.floats(), nullptr), name_of(c, "add_norm_backward"));
  const NormGradient expected(values_of(dy, size), values_of(x, size), weight, c.rows, c.width);
  // The kernel has the statistics of the sum before it was rounded.
  compare(dweight, expected.dweight, name_of(c, "dweight of add_norm"), c.dtype);
  std::vector<double> expected_dbranch(size), expected_dresidual(size);
  for (int64_t i = 0; i < size; ++i) {
    expected_dresidual[i] = dx.at(i) + expected.dx[i];
    expected_dbranch[i] = expected_dresidual[i] * layer_scale.at(i % c.width) * row_scale.at(i / c.width);
  }
  compare(dresidual, expected_dresidual, name_of(c, "dresidual"), dresidual.dtype());
  compare(dbranch, expected_dbranch, name_of(c, "dbranch"), dbranch.dtype());
}

// One tensor of LAMB: its buffers, the last `offset` elements behind the one that their memory begins with.
struct LambCase {
  int64_t size;
  int64_t offset;  // of the parameter and the gradient
  DType dtype;     // of these
};

class LambState {
 public:
  explicit LambState(const LambCase& c)
      : case_(c),
        w_(Buffer::random(c.dtype, c.offset + c.size)),
        g_(Buffer::random(c.dtype, c.offset + c.size)),
        m_(Buffer::random(DType::Float32, c.size)),
        v_(Buffer::random(DType::Float32, c.size)) {
    for (int64_t i = 0; i < c.size; ++i) v_.floats()[i] = std::fabs(v_.floats()[i]);
  }

  LambTensor tensor() {
    const int64_t skipped = case_.offset * (case_.dtype == DType::Float32 ? 4 : 2);
    const auto part = [&](Buffer& buffer) -> LambBuffer {
      return {static_cast<char*>(buffer.data()) + skipped, buffer.dtype()};
    };
    return {
        part(w_),  part(g_),  {m_.data(), DType::Float32}, {v_.data(), DType::Float32}, &step_, case_.size,
        kLambRate, kLambDecay};
  }

  // The parameter after a step, and the squared norms. Before it is made.
  std::vector<double> expected(double* squared_norms) const {
    std::vector<double> w(case_.size), u(case_.size);
    for (int64_t i = 0; i < case_.size; ++i) {
      const double g = g_.at(case_.offset + i) / kLambScale;
      w[i] = w_.at(case_.offset + i);
      const double m = 0.9 * m_.at(i) + 0.1 * g, v = 0.98 * v_.at(i) + 0.02 * g * g;
      u[i] = m / (std::sqrt(v) + kEps) + kLambDecay * w[i];
      squared_norms[0] += w[i] * w[i];
      squared_norms[1] += u[i] * u[i];
    }
    const double ratio = std::sqrt(squared_norms[0] / squared_norms[1]);
    const double correction = std::sqrt(1.0 - std::pow(0.98, 4)) / (1.0 - std::pow(0.9, 4));
    for (int64_t i = 0; i < case_.size; ++i) w[i] -= kLambRate * correction * ratio * u[i];
    return w;
  }

  void check_result(const std::vector<double>& expected) const {
    Buffer result(DType::Float32, case_.size);
    for (int64_t i = 0; i < case_.size; ++i) {
      result.floats()[i] = static_cast<float>(w_.at(case_.offset + i));
    }
    const std::string name = "a parameter of " + std::to_string(case_.size);
    compare(result, expected, name, case_.dtype);
    check(step_ == 4.0f, name + ": its step");
  }

 private:
  static constexpr double kLambRate = 0.1, kLambDecay = 0.05, kLambScale = 4.0;

  friend void drive_lamb();

  LambCase case_;
  Buffer w_, g_, m_, v_;
  float step_ = 3.0f;
};

void drive_lamb() {
  const LambCase cases[] = {{3, 0, DType::Float32},    {8192, 0, DType::Float32},
                            {0, 0, DType::Float32},    {3 * 8192 + 5, 0, DType::BFloat16},
                            {1037, 1, DType::Float16}, {600, 4, DType::Float32}};
  std::vector<LambState> states(std::begin(cases), std::end(cases));
  std::vector<LambTensor> tensors;
  for (LambState& state : states) tensors.push_back(state.tensor());
  const int64_t count = static_cast<int64_t>(tensors.size());
  std::vector<double> norms(2 * count);
  std::vector<std::vector<double>> expected;
  for (int64_t i = 0; i < count; ++i) expected.push_back(states[i].expected(&norms[2 * i]));

  Buffer squared_norms(DType::Float32, 2 * count);
  const LambOptions options = {0.9, 0.98, kEps, false};
  const float grad_scale = LambState::kLambScale, found_inf = 0.0f;
  const LambUpdate update = {tensors.data(), count, options, squared_norms.floats(), &grad_scale, &found_inf};
  Buffer update_workspace(DType::Float32, cuda::lamb_update_workspace(update));
  run(cuda::lamb_update(update, update_workspace.floats(), nullptr), "lamb_update");
  compare(squared_norms, norms, "the squared norms", DType::Float32);

  for (LambTensor& tensor : tensors) tensor.grad = {};
  const LambApply apply = {tensors.data(), count, options, squared_norms.floats(), &found_inf};
  Buffer apply_workspace(DType::Float32, cuda::lamb_apply_workspace(apply));
  run(cuda::lamb_apply(apply, apply_workspace.floats(), nullptr), "lamb_apply");
  for (int64_t i = 0; i < count; ++i) states[i].check_result(expected[i]);
}

}  // namespace

int main() {
  constexpr DType kHalf = DType::BFloat16;
  // Several rows a warp and a block; several warps; unaligned; a row in memory only.
  const Case cases[] = {{29, 64, DType::Float32}, {14, 264, kHalf},          {5, 1408, kHalf},
                        {4, 2730, kHalf},         {7, 33, DType::Float16},   {4, 513, DType::Float32},
                        {4, 2049, kHalf},         {4, 3072, DType::Float32}, {3, 8200, kHalf}};
  for (const Case& c : cases) {
    drive_layer_norm(c);
    drive_add_norm(c);
  }
  drive_lamb();
  if (failures == 0) std::printf("all right\n");
  return failures == 0 ? 0 : 1;
}
