// Parameters of the resize launcher: an image of 8 bits, resized with the bits of Pillow's.
#pragma once

#include "include/launcher.h"

namespace evakernels {

enum class ResizeFilter : int32_t { Box, Bilinear, Hamming, Bicubic, Lanczos };
constexpr int64_t kResizeFilters = 5;

struct Resize {
  const uint8_t* image;  // [height, width, channels], the channels of a pixel adjacent
  int64_t height, width, channels;
  int64_t row_stride, pixel_stride;  // in bytes; a pixel has 4 at most
  float left, top, right, bottom;    // the part of the image that becomes the result
  int64_t out_height, out_width;
  int64_t crop_top, crop_left, crop_height, crop_width;  // the part of the result that is computed
  ResizeFilter filter;
  bool down_first;    // kernels then get sizes of the transposed image, and its memory as it is
  bool has_alpha;     // the last channel: the others are multiplied by it before, and divided after
  const void* table;  // [channels, 256], dtype: the value of each level; null: out has levels
  void* out;          // [crop_height, crop_width, channels], in elements:
  int64_t out_row_stride, out_pixel_stride, out_channel_stride;
  DType dtype;
};

namespace cpu {

void resize(const Resize& params, Isa isa, ParallelFor parallel_for);

// Weights of 22 bits for each output along an axis. Inputs are grouped in blocks of four.
constexpr int kResizeTaps = 4;
constexpr int kResizeBits = 22;

struct ResizeAxis {
  int64_t outputs;         // a multiple of four; those beyond the result have weights of 0
  int64_t blocks;          // of each output
  const int32_t* first;    // [outputs]: first block
  const int32_t* weights;  // [outputs, blocks, kResizeTaps]
};

// The loops of one instruction set.
struct ResizeKernels {
  // Bytes of `scratch`.
  int64_t (*scratch_size)(const Resize& params, const ResizeAxis& across, const ResizeAxis& down);

  void (*resize)(const Resize& params, const ResizeAxis& across, const ResizeAxis& down, uint8_t* scratch);
};

EVAKERNELS_FOR_EACH_ISA(extern const ResizeKernels resize_kernels;)

}  // namespace cpu

}  // namespace evakernels
