// The tables of a call as the loops read them.
#pragma once

#include <vector>

#include "common/rope_attention.h"

namespace evakernels::cpu {

// cos and sin with one entry for each element, see Rotation.
class ElementTables {
 public:
  ElementTables(const RotaryTables& tables, const AttentionShape& shape)
      : token_index_(tables.token_index),
        num_prefix_(shape.num_prefix),
        interleaved_(tables.interleaved),
        half_(shape.head_dim / 2) {
    if (tables.cos == nullptr) return;
    const bool per_head = tables.head_stride != 0;
    head_stride_ = per_head ? tables.rows * shape.head_dim : 0;
    const int64_t entries = tables.rows * (per_head ? shape.heads : 1);
    cos_ = expanded(tables.cos, tables.grid, entries, 1.0f);
    sin_ = expanded(tables.sin, tables.grid, entries, -1.0f);
  }

  Rotation rotation(bool backwards) const {
    return {
        .cos = cos_.empty() ? nullptr : cos_.data(),
        .sin = sin_.empty() ? nullptr : sin_.data(),
        .token_index = token_index_,
        .head_stride = head_stride_,
        .num_prefix = num_prefix_,
        .interleaved = interleaved_,
        .backwards = backwards,
    };
  }

 private:
  // grid: of the compact form, or 0. first_sign: that of the first element of a pair.
  std::vector<float> expanded(const float* table, int64_t grid, int64_t entries, float first_sign) const {
    const int64_t width = grid > 0 ? half_ / 2 : half_;
    std::vector<float> target(entries * half_ * 2);
    for (int64_t entry = 0; entry < entries; ++entry) {
      // A compact table has the pairs of a patch's row, then those of its column.
      const float* first = table + (grid > 0 ? entry / grid : entry) * width;
      const float* second = grid > 0 ? table + (grid + entry % grid) * width - width : nullptr;
      float* row = target.data() + entry * half_ * 2;
      for (int64_t pair = 0; pair < half_; ++pair) {
        const float value = pair < width ? first[pair] : second[pair];
        row[interleaved_ ? 2 * pair : pair] = first_sign * value;
        row[interleaved_ ? 2 * pair + 1 : pair + half_] = value;
      }
    }
    return target;
  }

  std::vector<float> cos_, sin_;
  const int64_t* token_index_;
  int64_t head_stride_ = 0;
  int64_t num_prefix_;
  bool interleaved_;
  int64_t half_;
};

}  // namespace evakernels::cpu
