// An image of 8 bits, resized. CPU only.
#include "include/resize.h"

#include "bind/binding.h"

namespace evakernels {
namespace {

Tensor resize(Input image_in, const std::vector<int64_t>& size, const std::vector<double>& box,
              const std::vector<int64_t>& crop, int64_t filter, bool down_first, bool is_mirrored,
              OptionalInput table_in) {
  Call call;
  const Array image = call.read_pixels(image_in, "image");
  const Array table = call.read_optional(table_in, "table");
  require(size.size() == 2 && box.size() == 4 && crop.size() == 4, "size, box or crop must be longer");
  require(filter >= 0 && filter < kResizeFilters, "filter must be one of ", std::to_string(kResizeFilters));
  const int64_t channels = image.sizes[2];
  if (table) require_sizes(table, {channels, 256});
  const std::array<int64_t, 3> sizes = {channels, crop[2], crop[3]};
  Resize params = {
      .image = static_cast<const uint8_t*>(image.data),
      .channels = channels,
      .sides = {image.sizes[0], image.sizes[1]},
      .strides = {image.strides[0], image.strides[1]},
      .box = {},
      .size = {size[0], size[1]},
      .crop = {crop[0], crop[1], crop[2], crop[3]},
      .filter = static_cast<ResizeFilter>(filter),
      .is_copy = true,
      .down_first = down_first,
      .is_mirrored = is_mirrored,
      .table = table.data,
      .out = nullptr,
      .value_size = !table                          ? 1
                    : table.dtype == DType::Float32 ? 4
                                                    : 2,
  };
  std::copy(box.begin(), box.end(), params.box);
  for (int axis = 0; axis < 2; ++axis) {
    const float low = params.box[1 - axis], high = params.box[3 - axis];
    const int64_t side = params.sides[axis];
    require(low >= 0 && low <= high && high <= side, "box must lie in the image");
    require(crop[axis] >= 0 && crop[2 + axis] > 0 && crop[axis] + crop[2 + axis] <= size[axis],
            "crop must lie in the result");
    params.is_copy &= size[axis] == side && low == 0 && high == side;
  }
  params.out = table ? call.output("out", sizes, table.dtype).data : call.output_bytes("out", sizes);
  call.launch<cpu::resize, nullptr>("resize", params);
  return call.results<1>();
}

}  // namespace

EVAKERNELS_CPU_OPS(resize, m) { EVAKERNELS_OP(m, resize); }

}  // namespace evakernels
