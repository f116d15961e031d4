// An image of 8 bits, resized. CPU only.
#include "include/resize.h"

#include "bind/binding.h"

namespace evakernels {
namespace {

Tensor resize(Input image_in, const std::vector<int64_t>& size, const std::vector<double>& box,
              const std::vector<int64_t>& crop, int64_t filter, bool down_first, bool has_alpha,
              bool is_mirrored, bool channels_first, OptionalInput table_in) {
  Call call;
  const Array image = call.read_pixels(image_in, "image");
  const Array table = call.read_optional(table_in, "table");
  const int64_t height = image.sizes[0], width = image.sizes[1], channels = image.sizes[2];
  require(size.size() == 2 && size[0] > 0 && size[1] > 0, "size must be two numbers of 1 or more");
  require(filter >= 0 && filter < kResizeFilters, "filter must be one of ", std::to_string(kResizeFilters));
  require(box.size() == 4 || box.empty(), "box must be four numbers");
  require(crop.size() == 4 || crop.empty(), "crop must be four numbers");
  const auto side = [&](int i, int64_t whole) { return static_cast<float>(box.empty() ? whole : box[i]); };
  const auto part = [&](int i, int64_t whole) { return crop.empty() ? whole : crop[i]; };
  const int64_t rows = part(2, size[0]), columns = part(3, size[1]);
  const std::array<int64_t, 3> planes = {channels, rows, columns}, pixels = {rows, columns, channels};
  const Sizes sizes = channels_first ? planes : pixels;
  const int64_t pixel_stride = channels_first ? 1 : channels;
  Resize params = {
      .image = static_cast<const uint8_t*>(image.data),
      .height = height,
      .width = width,
      .channels = channels,
      .row_stride = image.strides[0],
      .pixel_stride = image.strides[1],
      .left = side(0, 0),
      .top = side(1, 0),
      .right = side(2, width),
      .bottom = side(3, height),
      .out_height = size[0],
      .out_width = size[1],
      .crop_top = part(0, 0),
      .crop_left = part(1, 0),
      .crop_height = rows,
      .crop_width = columns,
      .filter = static_cast<ResizeFilter>(filter),
      .down_first = down_first,
      .has_alpha = has_alpha,
      .table = table.data,
      .out = nullptr,
      .out_row_stride = columns * pixel_stride,
      .out_pixel_stride = is_mirrored ? -pixel_stride : pixel_stride,
      .out_channel_stride = channels_first ? rows * columns : 1,
      .dtype = table.dtype,
  };
  require(params.left >= 0 && params.top >= 0 && params.left <= params.right && params.top <= params.bottom &&
              params.right <= width && params.bottom <= height,
          "box must lie in the image");
  require(params.crop_top >= 0 && params.crop_left >= 0 && params.crop_height > 0 && params.crop_width > 0 &&
              params.crop_top + params.crop_height <= size[0] &&
              params.crop_left + params.crop_width <= size[1],
          "crop must lie in the result");
  if (table) require_sizes(table, {channels, 256});
  // Pillow returns a copy.
  const bool is_same = size[0] == height && size[1] == width && params.left == 0 && params.top == 0 &&
                       params.right == width && params.bottom == height;
  params.has_alpha = has_alpha && !is_same;
  auto* const out = table ? static_cast<uint8_t*>(call.output("out", sizes, table.dtype).data)
                          : call.output_bytes("out", sizes);
  const int64_t last = is_mirrored ? (columns - 1) * pixel_stride : 0;
  params.out = out + last * (!table ? 1 : table.dtype == DType::Float32 ? 4 : 2);
  call.launch<cpu::resize, nullptr>("resize", params);
  return call.results<1>();
}

}  // namespace

EVAKERNELS_CPU_OPS(resize, m) { EVAKERNELS_OP(m, resize); }

}  // namespace evakernels
