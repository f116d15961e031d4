// The entrance of a vision tower: keeps some patches, adds position embeddings, prepends the prefix. On the
// CPU.
#pragma once

#include "common/token_dropout.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace evakernels::cpu {

// The indices are in range and distinct in a sample; backward throws std::invalid_argument where they are
// not.
EVAKERNELS_API void token_dropout_forward(const TokenDropoutForward& params, Isa isa,
                                          ParallelFor parallel_for);

// The sums over the batch are taken in the order of the samples, whatever the number of threads.
EVAKERNELS_API void token_dropout_backward(const TokenDropoutBackward& params, Isa isa,
                                           ParallelFor parallel_for);

}  // namespace evakernels::cpu
