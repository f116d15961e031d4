// Compiled once for each instruction set.
#include "cpu/simd.h"
#include "include/row_quantization.h"

namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE {
namespace {

typedef uint8_t U8 __attribute__((vector_size(kLanes)));

inline F32 magnitude(F32 x) { return __builtin_bit_cast(F32, __builtin_bit_cast(U32, x) & 0x7FFFFFFFu); }

// Stores integral values from 0 to 255.
template <class Part>
inline void store_bytes(uint8_t* target, F32 value, Part part) {
  const I32 whole = __builtin_convertvector(value, I32);
#if defined(__AVX512F__)
  const U8 bytes = __builtin_bit_cast(U8, _mm512_cvtepi32_epi8(__builtin_bit_cast(__m512i, whole)));
#else
  const U8 bytes = __builtin_convertvector(whole, U8);
#endif
  __builtin_memcpy(target, &bytes, part.lanes);
}

template <class T>
void quantize_row(const T* x, uint8_t* codes, float* scale, int64_t width) {
  F32 largest{}, no_number{};
  for_each_vector(width, [&](int64_t i, auto part) {
    const F32 value = load(x + i, part);
    largest = larger(magnitude(value), largest);
    no_number += value - value;  // 0, but NaN for infinities and NaN
  });
  const float bound = horizontal_max(largest), nan = horizontal_sum(no_number);
  // The scale is 0 if all values are 0 or so small that the reciprocal is infinite.
  const float inverse = kInt8Largest / bound;
  const bool is_finite = inverse <= 3.0e38f && nan == 0.0f;
  *scale = (is_finite ? bound / kInt8Largest : 0.0f) + nan;
  const F32 factor = broadcast(is_finite ? inverse : 0.0f);
  for_each_vector(width, [&](int64_t i, auto part) {
    const F32 value = is_finite ? load(x + i, part) : F32{};
    store_bytes(codes + i, nearest_integer(value * factor) + kUint8Zero, part);
  });
}

void quantize(const QuantizeRows& params, int64_t begin, int64_t end) {
  with_element_type(params.dtype, [&]<class T>(T) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t start = row * params.width;
      quantize_row(static_cast<const T*>(params.x) + start, params.codes + start, params.scale + row,
                   params.width);
    }
  });
}

void dequantize(const DequantizeRows& params, const float* bias, int64_t begin, int64_t end) {
  with_element_type(params.dtype, [&]<class T>(T) {
    for (int64_t row = begin; row < end; ++row) {
      const T* y = static_cast<const T*>(params.y) + row * params.width;
      T* out = static_cast<T*>(params.out) + row * params.width;
      const float scale = params.scale[row];
      for_each_vector(params.width, [&](int64_t i, auto part) {
        store(out + i, load(y + i, part) * scale + load(bias + i, part), part);
      });
    }
  });
}

}  // namespace

const RowQuantizationKernels row_quantization = {quantize, dequantize};

}  // namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE
