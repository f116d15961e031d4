// Parameters of the resize launcher: an image of 8 bits, resized with the bits of Pillow's.
#pragma once

#include "include/launcher.h"

namespace evakernels {

enum class ResizeFilter : int32_t { Box, Bilinear, Bicubic, Lanczos };
constexpr int64_t kResizeFilters = 4;

// Of two numbers the first is vertical.
struct Resize {
  const uint8_t* image;  // [sides, channels], the channels of a pixel adjacent
  int64_t channels, sides[2];
  int64_t strides[2];  // in bytes; those of pixels are 4 at most
  float box[4];        // left, top, right and bottom of the part of the image that becomes the result
  int64_t size[2];     // of the whole result
  int64_t crop[4];     // top, left, height and width of the part of the result that is computed
  ResizeFilter filter;
  bool is_copy;  // Pillow copies an image that keeps its size
  bool down_first, is_mirrored;
  const void* table;   // [channels, 256]: the value of each level; null: out has levels
  void* out;           // [channels, crop height, crop width]
  int64_t value_size;  // bytes of a value of table and out
};

namespace cpu {

void resize(const Resize& params, Isa isa, ParallelFor parallel_for);

// Inputs along an axis are grouped in blocks of four taps, whose weights of 22 bits are split into words.
constexpr int kResizeTaps = 4, kResizeWords = 4, kResizeBits = 22;

struct ResizeAxis {
  int64_t outputs;        // a multiple of four; those beyond the result have weights of 0
  int64_t blocks;         // of each output
  const int32_t* first;   // [outputs]: first block
  const uint32_t* words;  // [outputs / 4, blocks, 4, kResizeWords]
};

// Memory of any instruction set's kernel, aligned to cache lines.
struct ResizeScratch {
  static constexpr int64_t kVectorBytes = 64, kExtraBlocks = 3;

  uint8_t* taps;    // [blocks of inputs, channels, kVectorBytes] and kExtraBlocks vectors
  uint8_t* ring;    // [blocks of the second pass + kExtraBlocks, ring_stride]
  uint8_t* levels;  // [channels, outputs], padded to whole vectors
  int64_t ring_stride;
};

// The loops of one instruction set.
struct ResizeKernels {
  // Adds the weights of a block to words, which are 0.
  void (*split)(const int32_t* weights, uint32_t* words);

  // `first` is the axis of the first pass.
  void (*resize)(const Resize& params, const ResizeAxis& first, const ResizeAxis& second,
                 const ResizeScratch& scratch);
};

EVAKERNELS_FOR_EACH_ISA(extern const ResizeKernels resize_kernels;)

}  // namespace cpu

}  // namespace evakernels
