// Compiled once for each instruction set.
#include "cpu/rope_attention_kernels.h"

#include "cpu/dtype_dispatch.h"
#include "cpu/rotation.h"
#include "cpu/softmax_rows.h"

namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE {
namespace {

template <class T>
void pack_rows(const PackHeads& params, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const Position at = position_of(params.shape, params.first * params.shape.tokens + row);
    rotate_vector(static_cast<const T*>(at.in<T>(params.heads)), params.packed + row * params.shape.head_dim,
                  params.shape, params.rotation, params.factor, at);
  }
}

template <class T>
void unpack_rows(const PackHeads& params, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const Position at = position_of(params.shape, params.first * params.shape.tokens + row);
    const float* packed = params.packed + row * params.shape.head_dim;
    rotate_vector(packed, at.in<T>(params.heads), params.shape, params.rotation, params.factor, at);
  }
}

void pack(const PackHeads& params, int64_t begin, int64_t end) {
  with_element_type(params.dtype, [&](auto type) { pack_rows<decltype(type)>(params, begin, end); });
}

void unpack(const PackHeads& params, int64_t begin, int64_t end) {
  with_element_type(params.dtype, [&](auto type) { unpack_rows<decltype(type)>(params, begin, end); });
}

// --- softmax -----------------------------------------------------------------------------------------------

void weights(const AttentionWeights& params, int64_t begin, int64_t end) {
  const int64_t tokens = params.tokens;
  for (int64_t index = begin; index < end; ++index) {
    float* row = params.scores + index * tokens;
    const int64_t visible = params.causal ? index % tokens + 1 : tokens;
    params.lse[index] = softmax_row(row, visible);
    clear(row + visible, tokens - visible);
  }
}

void gradients(const AttentionGradients& params, int64_t begin, int64_t end) {
  const int64_t tokens = params.tokens;
  for (int64_t index = begin; index < end; ++index) {
    float* scores = params.scores + index * tokens;
    float* gradients = params.gradients + index * tokens;
    const int64_t visible = params.causal ? index % tokens + 1 : tokens;
    softmax_row_backward(scores, gradients, visible, params.lse[index], params.mean[index]);
    clear(scores + visible, tokens - visible);
    clear(gradients + visible, tokens - visible);
  }
}

// --- dot products ------------------------------------------------------------------------------------------

template <class T>
void dot_rows(const HeadDots& params, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const Position at = position_of(params.shape, params.first * params.shape.tokens + row);
    params.products[row] = dot<T>(at.in<T>(params.a), at.in<T>(params.b), params.shape.head_dim);
  }
}

void dots(const HeadDots& params, int64_t begin, int64_t end) {
  with_element_type(params.dtype, [&](auto type) { dot_rows<decltype(type)>(params, begin, end); });
}

}  // namespace

const RopeAttentionKernels rope_attention = {pack, unpack, weights, gradients, dots};

}  // namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE
