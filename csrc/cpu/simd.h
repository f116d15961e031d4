// Vectors of floats of the instruction set that the including file is compiled for.
//
// Everything is in a namespace of the instruction set (EVAKERNELS_ISA_NAMESPACE), so that builds of a kernel
// share no symbol. For the same reason neither this nor the kernels use inline functions of namespace std.
#pragma once

#include <cstdint>

#include "common/numerics.h"
#include "include/launcher.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float F32 __attribute__((vector_size(4 * kLanes)));
typedef int32_t I32 __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U32 __attribute__((vector_size(4 * kLanes)));
typedef uint16_t U16 __attribute__((vector_size(2 * kLanes)));

// A whole vector, or the last `lanes` elements of a row if its width is no multiple of kLanes.
struct Whole {
  static constexpr int lanes = kLanes;
};
struct Tail {
  int lanes;
};

// value - 0 is an identity that compilers simplify; value + 0 isn't, for -0.
static inline F32 broadcast(float value) { return value - F32{}; }

// Lane i is lane from[i] of a and b concatenated. clang needs the loop, GCC the builtin, for one instruction.
template <class Vector>
static inline Vector shuffle(Vector a, Vector b, U32 from) {
#if defined(__clang__)
  Vector result;
  for (int i = 0; i < kLanes; ++i) result[i] = from[i] < kLanes ? a[from[i]] : b[from[i] - kLanes];
  return result;
#else
  return __builtin_shuffle(a, b, from);
#endif
}

// GCC splits __builtin_convertvector in halves.
static inline U32 zero_extend(U16 bits) {
#if defined(__AVX512F__)
  return __builtin_bit_cast(U32, _mm512_cvtepu16_epi32(__builtin_bit_cast(__m256i, bits)));
#elif defined(__AVX2__)
  return __builtin_bit_cast(U32, _mm256_cvtepu16_epi32(__builtin_bit_cast(__m128i, bits)));
#else
  return __builtin_convertvector(bits, U32);
#endif
}

static inline F32 widen(U16 bits, BFloat16) { return bfloat16_to_float<F32>(zero_extend(bits)); }

#if defined(__AVX512BF16__)
// Subnormal values become 0.
static inline U16 narrow_normal(F32 value) {
  return __builtin_bit_cast(U16, _mm512_cvtneps_pbh(__builtin_bit_cast(__m512, value)));
}

static inline bool has_subnormal(F32 value) {
  constexpr int kSubnormal = 0x20;
  return _mm512_fpclass_ps_mask(__builtin_bit_cast(__m512, value), kSubnormal) != 0;
}
#endif

static inline U16 narrow(F32 value, BFloat16) {
#if defined(__AVX512BF16__)
  if (!__builtin_expect(has_subnormal(value), 0)) return narrow_normal(value);
#endif
  const U32 bits = float_to_bfloat16<U32>(value);
#if defined(__AVX512F__)
  return __builtin_bit_cast(U16, _mm512_cvtepi32_epi16(__builtin_bit_cast(__m512i, bits)));
#else
  return __builtin_convertvector(bits, U16);
#endif
}

static inline F32 widen(U16 bits, Float16) {
#if defined(__AVX512F__)
  return __builtin_bit_cast(F32, _mm512_cvtph_ps(__builtin_bit_cast(__m256i, bits)));
#elif defined(__F16C__)
  return __builtin_bit_cast(F32, _mm256_cvtph_ps(__builtin_bit_cast(__m128i, bits)));
#else
  return float16_to_float<F32>(zero_extend(bits));
#endif
}

static inline U16 narrow(F32 value, Float16) {
#if defined(__AVX512F__)
  return __builtin_bit_cast(U16, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  return __builtin_bit_cast(U16, _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
#else
  return __builtin_convertvector(float_to_float16<U32>(value), U16);
#endif
}

static inline F32 load(const float* source, Whole) {
  F32 value;
  __builtin_memcpy(&value, source, sizeof value);
  return value;
}

template <class T>
static inline F32 load(const T* source, Whole) {
  U16 bits;
  __builtin_memcpy(&bits, source, sizeof bits);
  return widen(bits, T{});
}

#if defined(__AVX512F__)
static inline uint16_t mask_of(Tail tail) { return static_cast<uint16_t>((1u << tail.lanes) - 1); }
#endif

// Lanes beyond the tail are zero.
static inline F32 load(const float* source, Tail tail) {
#if defined(__AVX512F__)
  return __builtin_bit_cast(F32, _mm512_maskz_loadu_ps(mask_of(tail), source));
#else
  float padded[kLanes] = {};
  __builtin_memcpy(padded, source, tail.lanes * sizeof(float));
  return load(padded, Whole{});
#endif
}

template <class T>
static inline F32 load(const T* source, Tail tail) {
#if defined(__AVX512F__)
  return widen(__builtin_bit_cast(U16, _mm256_maskz_loadu_epi16(mask_of(tail), source)), T{});
#else
  T padded[kLanes] = {};
  __builtin_memcpy(padded, source, tail.lanes * sizeof(T));
  return load(padded, Whole{});
#endif
}

static inline void store(float* target, F32 value, Whole) { __builtin_memcpy(target, &value, sizeof value); }

template <class T>
static inline void store(T* target, F32 value, Whole) {
  const U16 bits = narrow(value, T{});
  __builtin_memcpy(target, &bits, sizeof bits);
}

static inline void store(float* target, F32 value, Tail tail) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(target, mask_of(tail), __builtin_bit_cast(__m512, value));
#else
  __builtin_memcpy(target, &value, tail.lanes * sizeof(float));
#endif
}

template <class T>
static inline void store(T* target, F32 value, Tail tail) {
  const U16 bits = narrow(value, T{});
#if defined(__AVX512F__)
  _mm256_mask_storeu_epi16(target, mask_of(tail), __builtin_bit_cast(__m256i, bits));
#else
  __builtin_memcpy(target, &bits, tail.lanes * sizeof(T));
#endif
}

static inline F32 fill_beyond(F32 value, float, Whole) { return value; }

static inline F32 fill_beyond(F32 value, float fill, Tail tail) {
  I32 lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < tail.lanes ? value : broadcast(fill);
}

template <class Part>
static inline F32 zero_beyond(F32 value, Part part) {
  return fill_beyond(value, 0.0f, part);
}

// Returns b where a is NaN.
static inline F32 larger(F32 a, F32 b) { return a > b ? a : b; }

static inline F32 sqrt(F32 value) {
#if defined(__AVX512F__)
  return __builtin_bit_cast(F32, _mm512_sqrt_ps(__builtin_bit_cast(__m512, value)));
#elif defined(__AVX2__)
  return __builtin_bit_cast(F32, _mm256_sqrt_ps(__builtin_bit_cast(__m256, value)));
#else
  for (int i = 0; i < kLanes; ++i) value[i] = __builtin_sqrtf(value[i]);
  return value;
#endif
}

// Preserves NaN.
static inline F32 at_most(F32 x, float limit) {
#if defined(__AVX512F__)
  return __builtin_bit_cast(F32, _mm512_min_ps(broadcast(limit), x));
#elif defined(__AVX2__)
  return __builtin_bit_cast(F32, _mm256_min_ps(broadcast(limit), x));
#else
  return x > limit ? broadcast(limit) : x;
#endif
}

static inline F32 at_least(F32 x, float limit) {
#if defined(__AVX512F__)
  return __builtin_bit_cast(F32, _mm512_max_ps(broadcast(limit), x));
#elif defined(__AVX2__)
  return __builtin_bit_cast(F32, _mm256_max_ps(broadcast(limit), x));
#else
  return x < limit ? broadcast(limit) : x;
#endif
}

// value 2^n for integral n; without AVX-512 for -126 to 127.
static inline F32 multiplied_by_power(F32 value, F32 n) {
#if defined(__AVX512F__)
  return __builtin_bit_cast(F32, _mm512_scalef_ps(value, n));
#else
  return value * __builtin_bit_cast(F32, (__builtin_convertvector(n, I32) + 127) << 23);
#endif
}

// For |x| below 2^22.
static inline F32 nearest_integer(F32 x) {
#if defined(__AVX512F__)
  return __builtin_bit_cast(F32,
                            _mm512_roundscale_ps(__builtin_bit_cast(__m512, x), _MM_FROUND_TO_NEAREST_INT));
#else
  constexpr float kNoFraction = 12582912.0f;  // 1.5 * 2^23: a sum with it has no bits for a fraction
  return (x + kNoFraction) - kNoFraction;
#endif
}

// coefficients: highest power first.
template <int kTerms>
static inline F32 polynomial(const float (&coefficients)[kTerms], F32 x) {
  F32 sum = broadcast(coefficients[0]);
  for (int i = 1; i < kTerms; ++i) sum = sum * x + coefficients[i];
  return sum;
}

// 2^n e^r for |r| <= ln 2 / 2, to about 1 ulp: a Taylor polynomial of degree 7 with a relative error of 5e-9.
static inline F32 exp_of_parts(F32 n, F32 r) {
  F32 series = broadcast(1.0f / 5040);
  series = series * r + 1.0f / 720;
  series = series * r + 1.0f / 120;
  series = series * r + 1.0f / 24;
  series = series * r + 1.0f / 6;
  series = series * r + 0.5f;
  series = series * r + 1.0f;
  series = series * r + 1.0f;
  return multiplied_by_power(series, n);
}

// Fitted to 2^r for |r| <= 1/2, for results of type T: relative error 2e-9, for 16 bits 3e-6.
template <class T>
inline constexpr float kExp2Series[] = {9.582861327e-03f, 5.590644479e-02f, 2.402409911e-01f,
                                        6.931241751e-01f, 1.0f};
template <>
inline constexpr float kExp2Series<float>[] = {1.535336633e-04f,
                                               1.339887618e-03f,
                                               9.618436918e-03f,
                                               5.550332367e-02f,
                                               2.402264774e-01f,
                                               6.931471825e-01f,
                                               1.0f};

// e^x, for results of type T. Preserves NaN. On some instruction sets subnormal results are 0 and results
// above e^88.37 infinite.
template <class T = float>
static inline F32 exp(F32 x) {
  // ln 2 in two parts, so that n times the first is exact.
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
#if defined(__AVX512F__)
  constexpr float kLow = -104.0f, kHigh = 89.0f;
#else
  constexpr float kLow = -87.3f, kHigh = 88.37f;
#endif
  const F32 clamped = at_least(at_most(x, kHigh), kLow);
  const F32 n = nearest_integer(clamped * kLog2E);
  F32 value;
  if constexpr (sizeof(T) == sizeof(float)) {
    value = exp_of_parts(n, (clamped - n * kLn2High) - n * kLn2Low);
  } else {
    value = multiplied_by_power(polynomial(kExp2Series<T>, clamped * kLog2E - n), n);
  }
#if defined(__AVX512F__)
  return value;
#else
  return x > kHigh ? broadcast(__builtin_inff()) : (x < kLow ? F32{} : value);
#endif
}

// 2^x for x in [-2^22, 0]. Preserves NaN; on some instruction sets subnormal results are 0.
template <class T = float>
static inline F32 exp2_of_negative(F32 x) {
#if defined(__AVX512F__)
  const F32 n = nearest_integer(x);
  return multiplied_by_power(polynomial(kExp2Series<T>, x - n), n);
#else
  const F32 clamped = at_least(x, -126.0f);
  const F32 n = nearest_integer(clamped);
  return x < -126.0f ? F32{} : multiplied_by_power(polynomial(kExp2Series<T>, clamped - n), n);
#endif
}

static inline F32 sigmoid(F32 x) { return 1.0f / (1.0f + exp(-x)); }

// Keeps the compiler from fusing the multiplication that made the value with a following addition.
static inline F32 rounded(F32 value) {
#if defined(__x86_64__)
  asm("" : "+v"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#endif
  return value;
}

static inline float horizontal_sum(F32 value) {
  float lanes[kLanes];
  __builtin_memcpy(lanes, &value, sizeof value);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

static inline float horizontal_max(F32 value) {
  float result = value[0];
  for (int i = 1; i < kLanes; ++i) result = value[i] > result ? value[i] : result;
  return result;
}

// Calls body(offset, Whole or Tail) for each vector of a row.
template <class Body>
static inline void for_each_vector(int64_t width, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) body(i, Whole{});
  if (i < width) body(i, Tail{static_cast<int>(width - i)});
}

// write(offset, compute(offset, part), part) for each vector, part: Whole or Tail. Four vectors are computed
// before any is written, to overlap long dependency chains.
template <class Compute, class Write>
static inline void for_several_vectors(int64_t width, const Compute& compute, const Write& write) {
  constexpr int kAtOnce = 4;
  int64_t i = 0;
  for (; i + kAtOnce * kLanes <= width; i += kAtOnce * kLanes) {
    F32 values[kAtOnce];
    for (int k = 0; k < kAtOnce; ++k) values[k] = compute(i + k * kLanes, Whole{});
    for (int k = 0; k < kAtOnce; ++k) write(i + k * kLanes, values[k], Whole{});
  }
  for (; i + kLanes <= width; i += kLanes) write(i, compute(i, Whole{}), Whole{});
  if (i < width) {
    const Tail tail{static_cast<int>(width - i)};
    write(i, compute(i, tail), tail);
  }
}

// Sums kCount values: body(offset, Whole or Tail, sums) adds one vector to sums[0..kCount). Four independent
// sets of sums hide the latency of additions.
template <int kCount, class Body>
static inline void sum_over_row(int64_t width, float (&totals)[kCount], const Body& body) {
  F32 sums[4][kCount] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= width; i += 4 * kLanes) {
    body(i, Whole{}, sums[0]);
    body(i + kLanes, Whole{}, sums[1]);
    body(i + 2 * kLanes, Whole{}, sums[2]);
    body(i + 3 * kLanes, Whole{}, sums[3]);
  }
  for (; i + kLanes <= width; i += kLanes) body(i, Whole{}, sums[0]);
  if (i < width) body(i, Tail{static_cast<int>(width - i)}, sums[1]);
  for (int k = 0; k < kCount; ++k) {
    totals[k] = horizontal_sum((sums[0][k] + sums[1][k]) + (sums[2][k] + sums[3][k]));
  }
}

// Calls body(T{}) for the element type.
template <class Body>
static inline void with_element_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::Float32:
      return body(float{});
    case DType::BFloat16:
      return body(BFloat16{});
    case DType::Float16:
      return body(Float16{});
  }
}

// Swaps the off-diagonal blocks of each square of 2 kStep lanes in rows i and i + kStep.
template <int kStep>
static inline void swap_squares(U32 (&rows)[kLanes]) {
  U32 low, high;
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    low[lane] = lane & kStep ? kLanes + lane - kStep : lane;
    high[lane] = lane & kStep ? kLanes + lane : lane + kStep;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kStep) continue;
    const U32 a = rows[i], b = rows[i + kStep];
    rows[i] = shuffle(a, b, low);
    rows[i + kStep] = shuffle(a, b, high);
  }
}

// Transposes in place.
template <int kStep = kLanes / 2>
static inline void transpose_square(U32 (&rows)[kLanes]) {
  swap_squares<kStep>(rows);
  if constexpr (kStep > 1) transpose_square<kStep / 2>(rows);
}

}  // namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE
