// The tables of a call as the loops read them.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "include/rope_attention.h"

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
    const std::vector<int64_t> rows = rows_in_use(tables, shape);
    const int64_t heads = tables.head_stride != 0 ? shape.heads : 1;
    if (heads > 1) head_stride_ = static_cast<int64_t>(rows.size()) * shape.head_dim;
    cos_ = expanded(tables.cos, tables, rows, heads, 1.0f);
    sin_ = expanded(tables.sin, tables, rows, heads, -1.0f);
  }
  ElementTables(const ElementTables&) = delete;

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
  // No more than tokens ask for: tables of many places may be far longer than what is packed.
  std::vector<int64_t> rows_in_use(const RotaryTables& tables, const AttentionShape& shape) {
    const int64_t patches = shape.tokens - shape.num_prefix;
    const int64_t indices = shape.offsets.data != nullptr ? shape.offsets.tokens : shape.batch * patches;
    std::vector<int64_t> rows;
    if (token_index_ == nullptr || indices >= tables.rows) {
      rows.resize(token_index_ == nullptr ? std::min(patches, tables.rows) : tables.rows);
      std::iota(rows.begin(), rows.end(), 0);
      return rows;
    }
    own_index_.resize(indices);
    for (int64_t i = 0; i < indices; ++i) {
      own_index_[i] = token_index_[i] < 0 ? -1 : static_cast<int64_t>(rows.size());
      if (token_index_[i] >= 0) rows.push_back(token_index_[i]);
    }
    token_index_ = own_index_.data();
    return rows;
  }

  // first_sign: that of the first element of a pair.
  std::vector<float> expanded(const float* table, const RotaryTables& tables,
                              const std::vector<int64_t>& rows, int64_t heads, float first_sign) const {
    const int64_t grid = tables.grid, width = grid > 0 ? half_ / 2 : half_;
    std::vector<float> target(heads * rows.size() * half_ * 2);
    float* to = target.data();
    for (int64_t head = 0; head < heads; ++head) {
      for (const int64_t row : rows) {
        // A compact table has the pairs of a patch's row, then those of its column.
        const float* first = table + (grid > 0 ? row / grid : head * tables.rows + row) * width;
        const float* second = grid > 0 ? table + (grid + row % grid) * width - width : nullptr;
        for (int64_t pair = 0; pair < half_; ++pair) {
          const float value = pair < width ? first[pair] : second[pair];
          to[interleaved_ ? 2 * pair : pair] = first_sign * value;
          to[interleaved_ ? 2 * pair + 1 : pair + half_] = value;
        }
        to += half_ * 2;
      }
    }
    return target;
  }

  std::vector<float> cos_, sin_;
  std::vector<int64_t> own_index_;
  const int64_t* token_index_;
  int64_t head_stride_ = 0;
  int64_t num_prefix_;
  bool interleaved_;
  int64_t half_;
};

}  // namespace evakernels::cpu
