// Rotary embedding of rows in shared memory: (a, b) -> (a cos - b sin, a sin + b cos).
#pragma once

#include "cuda/attention_plan.h"

namespace evakernels::cuda {

// One head's rotation.
struct Rotary {
  const AttentionShape& shape;
  const RotaryTables& tables;
  unsigned head;
  unsigned first;  // offset of the head's first patch in token_index; 32 bits save registers

  // Rotates the pairs with first elements in [i, i + E).
  template <int E, class T>
  __device__ __forceinline__ void rotate(T* row, int token, int i) const {
    int angles;
    if (!find_angles(token, angles)) return;
    if constexpr (E > 1) {
      if (tables.interleaved) {
        float values[E], c[E / 2], s[E / 2];
        load_floats(row + i, values);
        load_angles(angles, i / 2, c, s);
#pragma unroll
        for (int n = 0; n < E / 2; ++n) rotate_pair(values[2 * n], values[2 * n + 1], c[n], s[n]);
        store_floats(row + i, values);
        return;
      }
    }
    const int half = static_cast<int>(shape.head_dim / 2);
    const bool is_first = tables.interleaved ? i % 2 == 0 : i < half;
    if (!is_first) return;
    T* const partners = row + (tables.interleaved ? i + 1 : i + half);
    float a[E], b[E], c[E], s[E];
    load_floats(row + i, a);
    load_floats(partners, b);
    load_angles(angles, tables.interleaved ? i / 2 : i, c, s);
#pragma unroll
    for (int n = 0; n < E; ++n) rotate_pair(a[n], b[n], c[n], s[n]);
    store_floats(row + i, a);
    store_floats(partners, b);
  }

  // Rotates values, a row's elements [i, i + E), by the negative angle; load(n, partners) returns those from
  // n on.
  template <int E, class Load>
  __device__ __forceinline__ void rotate_back(float (&values)[E], int token, int i, const Load& load) const {
    int angles;
    if (!find_angles(token, angles)) return;
    if constexpr (E > 1) {
      if (tables.interleaved) {
        float c[E / 2], s[E / 2];
        load_angles(angles, i / 2, c, s);
#pragma unroll
        for (int n = 0; n < E / 2; ++n) rotate_pair(values[2 * n], values[2 * n + 1], c[n], -s[n]);
        return;
      }
    }
    const int distance = tables.interleaved ? 1 : static_cast<int>(shape.head_dim / 2);
    const bool is_first = tables.interleaved ? i % 2 == 0 : i < distance;
    const int first = is_first ? i : i - distance;
    float partners[E], c[E], s[E];
    load(is_first ? i + distance : first, partners);
    load_angles(angles, tables.interleaved ? first / 2 : first, c, s);
#pragma unroll
    for (int n = 0; n < E; ++n) values[n] = values[n] * c[n] + partners[n] * (is_first ? s[n] : -s[n]);
  }

 private:
  // Finds the token's row of the tables; false if the token isn't rotated.
  __device__ __forceinline__ bool find_angles(int token, int& row) const {
    row = token - static_cast<int>(shape.num_prefix);
    if (row < 0) return false;
    if (!tables.token_index) return true;
    const int64_t index = tables.token_index[first + static_cast<unsigned>(row)];
    if (index < -1 || index >= tables.rows) __trap();  // `fail_launch` takes up to 68 registers
    row = static_cast<int>(index);
    return index >= 0;
  }

  // cos and sin of E pairs from `pair` on.
  template <int E>
  __device__ __forceinline__ void load_angles(int row, int pair, float (&c)[E], float (&s)[E]) const {
    const int64_t column = head * tables.head_stride + pair;  // invariant over rows
    const int at = row * static_cast<int>(shape.head_dim / 2);
    load_floats(tables.cos + column + at, c);
    load_floats(tables.sin + column + at, s);
  }

  static __device__ __forceinline__ void rotate_pair(float& a, float& b, float c, float s) {
    const float before = a;
    a = a * c - b * s;
    b = before * s + b * c;
  }
};

}  // namespace evakernels::cuda
