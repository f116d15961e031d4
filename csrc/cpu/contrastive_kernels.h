// The loops of the contrastive losses: one table of functions for each instruction set.
#pragma once

#include <cstdint>

#include "common/contrastive.h"
#include "cpu/isa_namespaces.h"

namespace evakernels::cpu {

// A tile is worked on in blocks that the L2 cache holds (256 KiB): each is read from memory once and then
// again from the cache.
constexpr int64_t kBlockColumns = 512;
constexpr int64_t kBlockRows = 128;

// Of one column block and every row of the tile: the sum of exp(logit - shift), [rows] each.
struct RowSums {
  float* highest;
  float* shift;
  float* sum;
};

struct ContrastiveKernels {
  // Columns [begin, end), kBlockColumns at most.
  void (*forward)(const ContrastiveForward& params, const RowSums& row_sums, int64_t begin, int64_t end);
  void (*backward)(const ContrastiveBackward& params, int64_t begin, int64_t end);
  SiglipSums (*siglip_value)(const SiglipTile& params, int64_t begin, int64_t end);
  SiglipSums (*siglip_forward)(const SiglipTile& params, int64_t begin, int64_t end);

  // Rows [begin, end).
  void (*scale_image)(const ImageRows& params, int64_t begin, int64_t end);
  void (*finish_image)(const ImageRows& params, int64_t begin, int64_t end);
};

EVAKERNELS_FOR_EACH_ISA(extern const ContrastiveKernels contrastive;)

}  // namespace evakernels::cpu
