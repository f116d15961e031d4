// The parts of the contrastive losses that are no matrix products, on the CPU. Each takes one tile of logits
// and goes over it once. Results depend on the shapes alone, never on the number of threads.
#pragma once

#include "common/contrastive.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace evakernels::cpu {

void contrastive_forward(const ContrastiveForward& params, Isa isa, ParallelFor parallel_for);

// Turns the columns' sums into their log-sum-exps, when every tile has been seen.
void finish_columns(const float* col_sum, float* col_max, float* col_lse, int64_t columns);

void contrastive_backward(const ContrastiveBackward& params, Isa isa, ParallelFor parallel_for);

// Without a gradient.
SiglipSums siglip_value(const SiglipTile& params, Isa isa, ParallelFor parallel_for);

// With that of the logits in their place.
SiglipSums siglip_forward(const SiglipTile& params, Isa isa, ParallelFor parallel_for);

// scaled = scale * image.
void scale_image(const ImageRows& params, Isa isa, ParallelFor parallel_for);

// dimage = scale * scaled, and the dot products that the gradient of the scale is the sum of.
void finish_image(const ImageRows& params, Isa isa, ParallelFor parallel_for);

}  // namespace evakernels::cpu
