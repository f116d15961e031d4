// Conversions between float and the 16-bit formats, for scalars and GCC/Clang vectors.
//
// F is float or a vector of floats, U is uint32_t or a vector as wide; a 16-bit value is in the low half of
// its lane. All round to nearest even and preserve NaN.
//
// Everything is `static`: files that include this are compiled for several instruction sets, and the linker
// would keep one copy of an inline function for all of them.
#pragma once

#include <cstdint>

namespace evakernels {

template <class F, class U>
static inline F bfloat16_to_float(U bits) {
  return __builtin_bit_cast(F, bits << 16);
}

template <class U, class F>
static inline U float_to_bfloat16(F value) {
  const U bits = __builtin_bit_cast(U, value);
  const U rounded = (bits + (0x7FFFu + ((bits >> 16) & 1u))) >> 16;
  const U quiet_nan = (bits >> 16) | 0x40u;
  return value == value ? rounded : quiet_nan;
}

template <class F, class U>
static inline F float16_to_float(U bits) {
  const U sign = (bits & 0x8000u) << 16;
  const U magnitude = (bits & 0x7FFFu) << 13;
  // The multiplication moves the exponent's bias from 15 to 127, for subnormals too.
  const U finite = __builtin_bit_cast(U, __builtin_bit_cast(F, magnitude) * 0x1p112f);
  const U infinite = magnitude | 0x7F800000u;
  return __builtin_bit_cast(F, sign | (magnitude < 0x0F800000u ? finite : infinite));
}

template <class U, class F>
static inline U float_to_float16(F value) {
  const U bits = __builtin_bit_cast(U, value);
  const U sign = (bits >> 16) & 0x8000u;
  const U magnitude = bits & 0x7FFFFFFFu;
  const U normal = (magnitude - (112u << 23) + (0xFFFu + ((magnitude >> 13) & 1u))) >> 13;
  // Floats near 0.5 and float16 subnormals have a spacing of 2^-24: the addition does the rounding.
  const U subnormal = __builtin_bit_cast(U, __builtin_bit_cast(F, magnitude) + 0.5f) - 0x3F000000u;
  const U finite = magnitude < 0x38800000u ? subnormal : normal;
  const U infinite = U{} + 0x7C00u;
  const U quiet_nan = infinite | 0x200u;
  const U overflowed = magnitude > 0x7F800000u ? quiet_nan : infinite;
  return sign | (magnitude < 0x47800000u ? finite : overflowed);
}

}  // namespace evakernels
