#include "include/resize.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "cpu/rows.h"

namespace evakernels::cpu {
namespace {

constexpr double kPi = 3.14159265358979323846;

double sinc(double x) { return x == 0.0 ? 1.0 : std::sin(x * kPi) / (x * kPi); }

double support_of(ResizeFilter filter) {
  constexpr double kSupports[] = {0.5, 1.0, 1.0, 2.0, 3.0};
  return kSupports[static_cast<int>(filter)];
}

// Each sum and product is rounded as Pillow's.
double weight_at(ResizeFilter filter, double x) {
  if (filter == ResizeFilter::Box) return x > -0.5 && x <= 0.5 ? 1.0 : 0.0;
  if (filter == ResizeFilter::Lanczos) return x >= -3.0 && x < 3.0 ? sinc(x) * sinc(x / 3) : 0.0;
  x = std::abs(x);
  if (filter == ResizeFilter::Bilinear) return x < 1.0 ? 1.0 - x : 0.0;
  if (filter == ResizeFilter::Hamming) {
    if (x == 0.0) return 1.0;
    return x < 1.0 ? sinc(x) * (0.54f + 0.46f * std::cos(x * kPi)) : 0.0;
  }
  constexpr double a = -0.5;
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  return x < 2.0 ? (((x - 5) * x + 8) * x - 4) * a : 0.0;
}

// The weights of outputs [begin, begin + count) of `size`, of inputs [0, inputs).
class Axis {
 public:
  Axis(ResizeFilter filter, int64_t inputs, float low, float high, int64_t size, int64_t begin, int64_t count)
      : first_(ceil_div(count, 4) * 4) {
    const double scale = static_cast<double>(high - low) / size, stretch = std::max(scale, 1.0);
    const double support = support_of(filter) * stretch, step = 1.0 / stretch;
    std::vector<Window> windows(count);
    for (int64_t i = 0; i < count; ++i) {
      Window& window = windows[i];
      window.center = low + (begin + i + 0.5) * scale;
      window.begin = std::max<int64_t>(0, static_cast<int64_t>(window.center - support + 0.5));
      window.end = std::min<int64_t>(inputs, static_cast<int64_t>(window.center + support + 0.5));
      if (window.begin < window.end) {
        blocks_ = std::max(blocks_, (window.end - 1) / kResizeTaps - window.begin / kResizeTaps + 1);
      }
    }
    const int64_t last = ceil_div(inputs, kResizeTaps) - blocks_;
    weights_.resize(first_.size() * blocks_ * kResizeTaps);
    std::vector<double> weights;
    for (int64_t i = 0; i < count; ++i) {
      const Window& window = windows[i];
      first_[i] = static_cast<int32_t>(std::min(window.begin / kResizeTaps, last));
      weights.clear();
      double sum = 0.0;
      for (int64_t x = window.begin; x < window.end; ++x) {
        weights.push_back(weight_at(filter, (x - window.center + 0.5) * step));
        sum += weights.back();
      }
      int32_t* target = weights_.data() + ((i * blocks_ - first_[i]) * kResizeTaps + window.begin);
      for (const double weight : weights) {
        const double units = (sum != 0.0 ? weight / sum : weight) * (1 << kResizeBits);
        *target++ = static_cast<int32_t>(units < 0 ? units - 0.5 : units + 0.5);
      }
    }
    std::fill(first_.begin() + count, first_.end(), first_[count - 1]);
  }

  ResizeAxis view() const {
    return {static_cast<int64_t>(first_.size()), blocks_, first_.data(), weights_.data()};
  }

 private:
  struct Window {
    double center;
    int64_t begin, end;
  };

  int64_t blocks_ = 1;
  std::vector<int32_t> first_, weights_;
};

// The resize of the transposed image, whose first pass is across.
Resize transposed(const Resize& p) {
  Resize swapped = p;
  std::swap(swapped.height, swapped.width);
  std::swap(swapped.left, swapped.top);
  std::swap(swapped.right, swapped.bottom);
  std::swap(swapped.out_height, swapped.out_width);
  std::swap(swapped.crop_top, swapped.crop_left);
  std::swap(swapped.crop_height, swapped.crop_width);
  std::swap(swapped.out_row_stride, swapped.out_pixel_stride);
  return swapped;
}

}  // namespace

// On one thread: loaders run several images at once.
void resize(const Resize& params, Isa isa, ParallelFor) {
  const ResizeKernels& kernels = EVAKERNELS_OF_ISA(isa, resize_kernels);
  const Resize p = params.down_first ? transposed(params) : params;
  const Axis across(p.filter, p.width, p.left, p.right, p.out_width, p.crop_left, p.crop_width);
  const Axis down(p.filter, p.height, p.top, p.bottom, p.out_height, p.crop_top, p.crop_height);
  AlignedFloats scratch(ceil_div(kernels.scratch_size(p, across.view(), down.view()), sizeof(float)));
  kernels.resize(p, across.view(), down.view(), reinterpret_cast<uint8_t*>(scratch.data()));
}

}  // namespace evakernels::cpu
