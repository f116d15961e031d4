#include "include/resize.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/isa.h"
#include "cpu/rows.h"

namespace evakernels::cpu {
namespace {

double sinc(double x) {
  constexpr double kPi = 3.14159265358979323846;
  return x == 0.0 ? 1.0 : std::sin(x * kPi) / (x * kPi);
}

// Each sum and product is rounded as Pillow's.
double weight_at(ResizeFilter filter, double x) {
  if (filter == ResizeFilter::Box) return x > -0.5 && x <= 0.5 ? 1.0 : 0.0;
  if (filter == ResizeFilter::Lanczos) return x >= -3.0 && x < 3.0 ? sinc(x) * sinc(x / 3) : 0.0;
  x = std::abs(x);
  if (filter == ResizeFilter::Bilinear) return x < 1.0 ? 1.0 - x : 0.0;
  constexpr double a = -0.5;
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  return x < 2.0 ? (((x - 5) * x + 8) * x - 4) * a : 0.0;
}

// The weights of the outputs along an axis, 0 for the vertical one.
class Axis {
 public:
  Axis(const ResizeKernels& kernels, const Resize& p, int axis)
      : first_(ceil_div(p.crop[2 + axis], kResizeTaps) * kResizeTaps) {
    constexpr double kSupports[] = {0.5, 1.0, 2.0, 3.0};
    const int64_t inputs = p.sides[axis], count = p.crop[2 + axis];
    const float low = p.box[1 - axis], high = p.box[3 - axis];
    const double scale = static_cast<double>(high - low) / p.size[axis], stretch = std::max(scale, 1.0);
    const double support = kSupports[static_cast<int>(p.filter)] * stretch, step = 1.0 / stretch;
    const auto center = [&](int64_t i) {
      const int64_t output = axis == 1 && p.is_mirrored ? count - 1 - i : i;
      return low + (p.crop[axis] + output + 0.5) * scale;
    };
    const auto begin_of = [&](int64_t i) {
      return std::max<int64_t>(0, static_cast<int64_t>(center(i) - support + 0.5));
    };
    const auto end_of = [&](int64_t i) {
      return std::min<int64_t>(inputs, static_cast<int64_t>(center(i) + support + 0.5));
    };
    for (int64_t i = 0; i < count; ++i) {
      blocks_ = std::max(blocks_, ceil_div(end_of(i), kResizeTaps) - begin_of(i) / kResizeTaps);
    }
    const int64_t last = ceil_div(inputs, kResizeTaps) - blocks_;
    words_.resize(first_.size() * blocks_ * kResizeWords);
    std::vector<double> values;
    std::vector<int32_t> weights(blocks_ * kResizeTaps);
    for (int64_t i = 0; i < count; ++i) {
      values.clear();
      double sum = 0.0;
      for (int64_t x = begin_of(i); x < end_of(i); ++x) {
        values.push_back(weight_at(p.filter, (x - center(i) + 0.5) * step));
        sum += values.back();
      }
      first_[i] = static_cast<int32_t>(std::min(begin_of(i) / kResizeTaps, last));
      std::fill(weights.begin(), weights.end(), 0);
      int32_t* weight = weights.data() + begin_of(i) - first_[i] * kResizeTaps;
      for (const double value : values) {
        const double units = (sum != 0.0 ? value / sum : value) * (1 << kResizeBits);
        *weight++ = static_cast<int32_t>(units < 0 ? units - 0.5 : units + 0.5);
      }
      for (int64_t block = 0; block < blocks_; ++block) {
        kernels.split(weights.data() + block * kResizeTaps,
                      words_.data() + ((i / 4 * blocks_ + block) * 4 + i % 4) * kResizeWords);
      }
    }
    std::fill(first_.begin() + count, first_.end(), first_[count - 1]);
  }

  ResizeAxis view() const {
    return {static_cast<int64_t>(first_.size()), blocks_, first_.data(), words_.data()};
  }

 private:
  int64_t blocks_ = 1;
  std::vector<int32_t> first_;
  std::vector<uint32_t> words_;
};

}  // namespace

// On one thread: loaders run several images at once.
void resize(const Resize& p, Isa isa, ParallelFor) {
  const ResizeKernels& kernels = EVAKERNELS_OF_ISA(isa, resize_kernels);
  const Axis axes[] = {{kernels, p, 0}, {kernels, p, 1}};
  const ResizeAxis first = axes[!p.down_first].view(), second = axes[p.down_first].view();
  constexpr int64_t kVector = ResizeScratch::kVectorBytes;
  const int64_t taps =
      (ceil_div(p.sides[!p.down_first], kResizeTaps) * p.channels + ResizeScratch::kExtraBlocks) * kVector;
  const int64_t levels = ceil_div(first.outputs * p.channels, kVector) * kVector;
  const int64_t ring = (second.blocks + ResizeScratch::kExtraBlocks) * levels * kResizeTaps;
  AlignedFloats memory((taps + ring + levels) / static_cast<int64_t>(sizeof(float)));
  auto* const bytes = reinterpret_cast<uint8_t*>(memory.data());
  kernels.resize(p, first, second, {bytes, bytes + taps, bytes + taps + ring, levels * kResizeTaps});
}

}  // namespace evakernels::cpu
