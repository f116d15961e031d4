// Vectorised loads and stores of elements of any dtype, and dispatch on it.
#pragma once

#include "cuda/device.h"

namespace evakernels::cuda {

// Returns body(T{}) for the element type. nv_exec_check_disable: body is a host or a device function.
#pragma nv_exec_check_disable
template <class Body>
__host__ __device__ __forceinline__ auto with_element_type(DType dtype, const Body& body) {
  if (dtype == DType::Float32) return body(float{});
  if (dtype == DType::BFloat16) return body(BFloat16{});
  return body(Float16{});
}

template <int N>
using Constant = std::integral_constant<int, N>;

// Returns body(Constant<N>{}) for the number of elements per access, see aligned_elements (norm_plan.h).
template <int WIDE, class Body>
Error with_elements(int elements, const Body& body) {
  if constexpr (WIDE > 2) {
    if (elements == WIDE) return body(Constant<WIDE>{});
  }
  if constexpr (WIDE > 1) {
    if (elements == 2) return body(Constant<2>{});
  }
  return body(Constant<1>{});
}

constexpr int kWidestAccess = 16;  // bytes

template <class T>
constexpr int kWidestVector = kWidestAccess / int{sizeof(T)};  // elements

template <int BYTES>
struct WordOf;
template <>
struct WordOf<16> {
  using type = uint4;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<4> {
  using type = uint32_t;
};
template <>
struct WordOf<2> {
  using type = uint16_t;
};

__host__ __device__ constexpr int smaller(int a, int b) { return a < b ? a : b; }

// E elements of type T in one word, or in several of 16 bytes.
template <class T, int E>
struct Packed {
  static constexpr int kBytes = smaller(kWidestAccess, E* int{sizeof(T)});
  static constexpr int kWords = E * int{sizeof(T)} / kBytes;
  using Word = typename WordOf<kBytes>::type;

  Word words[kWords];

  static __device__ __forceinline__ Packed load(const T* from) {
    Packed packed;
#pragma unroll
    for (int i = 0; i < kWords; ++i) packed.words[i] = cuda::load(reinterpret_cast<const Word*>(from) + i);
    return packed;
  }

  static __device__ __forceinline__ Packed load_once(const T* from) {
    Packed packed;
#pragma unroll
    for (int i = 0; i < kWords; ++i)
      packed.words[i] = cuda::load_once(reinterpret_cast<const Word*>(from) + i);
    return packed;
  }

  __device__ __forceinline__ void store(T* to) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) cuda::store(reinterpret_cast<Word*>(to) + i, words[i]);
  }

  __device__ __forceinline__ void store_vector(T* to) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) cuda::store_vector(reinterpret_cast<Word*>(to) + i, words[i]);
  }

  __device__ __forceinline__ void unpack(float (&values)[E]) const {
    if constexpr (std::is_same_v<T, float>) {
      memcpy(values, words, sizeof values);
    } else if constexpr (std::is_same_v<T, BFloat16> && E % 2 == 0) {
      // One instruction per element; the compiler would take three for the upper halves.
      uint32_t pairs[E / 2];
      memcpy(pairs, words, sizeof pairs);
#pragma unroll
      for (int i = 0; i < E; ++i) {
        values[i] = __uint_as_float(i % 2 == 0 ? pairs[i / 2] << 16 : pairs[i / 2] & 0xffff0000u);
      }
    } else {
      T elements[E];
      memcpy(elements, words, sizeof elements);
#pragma unroll
      for (int i = 0; i < E; ++i) values[i] = to_float(elements[i]);
    }
  }

  static __device__ __forceinline__ Packed pack(const float (&values)[E]) {
    Packed packed;
    if constexpr (std::is_same_v<T, float>) {
      memcpy(packed.words, values, sizeof values);
    } else if constexpr (E == 1) {
      packed.words[0] = static_cast<uint16_t>(pack_pair(values[0], 0.0f, T{}));
    } else {
      uint32_t pairs[E / 2];
#pragma unroll
      for (int i = 0; i < E / 2; ++i) pairs[i] = pack_pair(values[2 * i], values[2 * i + 1], T{});
      memcpy(packed.words, pairs, sizeof pairs);
    }
    return packed;
  }
};

template <class T, int E>
__device__ __forceinline__ void load_floats(const T* from, float (&values)[E]) {
  Packed<T, E>::load(from).unpack(values);
}

template <class T, int E>
__device__ __forceinline__ void store_floats(T* to, const float (&values)[E]) {
  Packed<T, E>::pack(values).store(to);
}

// Loads elements [first, first + E) of a vector with a dtype known at run time.
template <int E>
__device__ __forceinline__ void load_floats(const void* vector, DType dtype, int64_t first,
                                            float (&values)[E]) {
  with_element_type(
      dtype, [&](auto type) { load_floats(static_cast<const decltype(type)*>(vector) + first, values); });
}

__device__ __forceinline__ void store_float(void* vector, DType dtype, int64_t position, float value) {
  const float values[1] = {value};
  with_element_type(
      dtype, [&](auto type) { store_floats(static_cast<decltype(type)*>(vector) + position, values); });
}

}  // namespace evakernels::cuda
