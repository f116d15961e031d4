// Compiled once for each instruction set.
#include "cpu/rope_attention_kernels.h"

#include "cpu/dtype_dispatch.h"
#include "cpu/rotation.h"
#include "cpu/softmax_rows.h"

namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE {
namespace {

// Vector number `row` of the chunk, in the caller's tensor.
Position place_of(const PackHeads& params, int64_t row) {
  Position at = position_of(params.shape, params.first * params.shape.tokens + row);
  at.head /= params.group;
  return at;
}

template <class T>
void pack_rows(const PackHeads& params, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const Position at = place_of(params, row);
    rotate_vector(static_cast<const T*>(at.in<T>(params.heads)), params.packed + row * params.shape.head_dim,
                  params.shape, params.rotation, params.factor, at);
  }
}

template <class T>
void unpack_rows(const PackHeads& params, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const Position at = place_of(params, row);
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

// Of query number `index`; none has more keys behind it than the last one, which sees all.
template <class Params>
int64_t visible_keys(const Params& params, int64_t index) {
  if (!params.causal) return params.keys;
  const int64_t visible = index % params.queries + 1 + params.keys - params.queries;
  return visible > 0 ? visible : 0;
}

void weights(const AttentionWeights& params, int64_t begin, int64_t end) {
  const int64_t keys = params.keys;
  for (int64_t index = begin; index < end; ++index) {
    float* row = params.scores + index * keys;
    const int64_t visible = visible_keys(params, index);
    params.lse[index] = visible > 0 ? softmax_row(row, visible) : -__builtin_inff();
    clear(row + visible, keys - visible);
  }
}

void gradients(const AttentionGradients& params, int64_t begin, int64_t end) {
  const int64_t keys = params.keys;
  for (int64_t index = begin; index < end; ++index) {
    float* scores = params.scores + index * keys;
    float* gradients = params.gradients + index * keys;
    const int64_t visible = visible_keys(params, index);
    softmax_row_backward(scores, gradients, visible, params.lse[index], params.mean[index]);
    clear(scores + visible, keys - visible);
    clear(gradients + visible, keys - visible);
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
