// Compiled once for each instruction set.
//
// The exponential dominates, so rows and columns of a block share it where possible: they are summed relative
// to one common shift, unless a row or column is so far below it that its terms would underflow. Otherwise
// each is summed relative to its own maximum.
#include "cpu/simd.h"
#include "include/contrastive.h"

namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE {
namespace {

// Maximum distance of a row's or column's largest logit from the common shift. exp underflows below -87.3:
// lost terms are e^-27 of the row's largest.
constexpr float kSpread = 60.0f;
constexpr float kInfinity = __builtin_inff();

inline F32 smaller(F32 a, F32 b) { return a < b ? a : b; }

// 0 for infinite values: inf - inf would be NaN.
inline F32 finite(F32 x) { return ((x < kInfinity) & (x > -kInfinity)) ? x : F32{}; }

// Minimum and maximum, ignoring NaN.
struct Range {
  F32 low = broadcast(kInfinity);
  F32 high = broadcast(-kInfinity);

  template <class Part>
  void add(F32 value, Part part) {
    low = smaller(fill_beyond(value, kInfinity, part), low);
    high = larger(fill_beyond(value, -kInfinity, part), high);
  }
  void add(const float* values, int64_t count) {
    for_each_vector(count, [&](int64_t i, auto part) { add(load(values + i, part), part); });
  }
  float lowest() const { return -horizontal_max(-low); }
  float highest() const { return horizontal_max(high); }
  // False if a bound is infinite.
  bool is_narrow() const { return highest() - lowest() <= kSpread; }
};

// Rows [first, last) of a tile and one column block.
struct Block {
  float* values;
  int64_t stride;
  int64_t rows;
  int64_t width;
  int64_t pair;  // column of the first row's positive

  float* row(int64_t i) const { return values + i * stride; }
};

// A gradient of the scale is a small difference of large terms.
typedef double F64 __attribute__((vector_size(kLanes * sizeof(double))));

inline void add_product(F64& sums, F32 a, F32 b) {
  sums += __builtin_convertvector(a, F64) * __builtin_convertvector(b, F64);
}

inline double total_of(const F64& sums) {
  double total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += sums[lane];
  return total;
}

// Calls body(first column, columns, whether it is the positive) for the parts of a row.
template <class Body>
inline void for_each_part(const Block& block, int64_t row, const Body& body) {
  const int64_t pair = block.pair + row;
  if (pair < 0 || pair >= block.width) return body(0, block.width, false);
  if (pair > 0) body(0, pair, false);
  body(pair, 1, true);
  if (pair + 1 < block.width) body(pair + 1, block.width - pair - 1, false);
}

// Calls body(block, first row) for the blocks of columns [begin, end) of a tile.
template <class Body>
inline void for_each_row_block(const LogitTile& tile, int64_t begin, int64_t end, const Body& body) {
  for (int64_t first = 0; first < tile.rows; first += kBlockRows) {
    const int64_t left = tile.rows - first;
    const int64_t rows = left < kBlockRows ? left : kBlockRows;
    body(Block{.values = tile.values + first * tile.columns + begin,
               .stride = tile.columns,
               .rows = rows,
               .width = end - begin,
               .pair = tile.pair + first - begin},
         first);
  }
}

// --- forward ---

// Also scales products to logits.
void find_maxima(const Block& block, float scale, float* row_max, float* col_max) {
  for_each_vector(block.width,
                  [&](int64_t i, auto part) { store(col_max + i, broadcast(-kInfinity), part); });
  for (int64_t row = 0; row < block.rows; ++row) {
    float* logits = block.row(row);
    Range range;
    for_each_vector(block.width, [&](int64_t i, auto part) {
      const F32 s = load(logits + i, part) * scale;
      store(logits + i, s, part);
      range.high = larger(fill_beyond(s, -kInfinity, part), range.high);
      store(col_max + i, larger(s, load(col_max + i, part)), part);
    });
    row_max[row] = range.highest();
  }
}

// Sums of exp(logit - shift) with one shift for the block.
void sum_together(const Block& block, float shift, float* row_sum, float* col_sum) {
  for (int64_t row = 0; row < block.rows; ++row) {
    const float* logits = block.row(row);
    float sum[1];
    sum_over_row(block.width, sum, [&](int64_t i, auto part, F32* sums) {
      const F32 e = zero_beyond(exp(load(logits + i, part) - shift), part);
      store(col_sum + i, load(col_sum + i, part) + e, part);
      sums[0] += e;
    });
    row_sum[row] = sum[0];
  }
}

// Sums relative to the maximum of each row and each column.
void sum_apart(const Block& block, const float* row_max, const float* col_max, float* row_sum,
               float* col_sum) {
  for (int64_t row = 0; row < block.rows; ++row) {
    const float* logits = block.row(row);
    const F32 row_shift = finite(broadcast(row_max[row]));
    float sum[1];
    sum_over_row(block.width, sum, [&](int64_t i, auto part, F32* sums) {
      const F32 s = load(logits + i, part);
      const F32 col_shift = finite(load(col_max + i, part));
      store(col_sum + i, load(col_sum + i, part) + exp(s - col_shift), part);
      sums[0] += zero_beyond(exp(s - row_shift), part);
    });
    row_sum[row] = sum[0];
  }
}

// Adds a block's sums of columns, relative to `shift`, to those of earlier tiles.
void add_to_columns(int64_t width, const float* highest, const float* shift, const float* sum, float* col_max,
                    float* col_sum) {
  for_each_vector(width, [&](int64_t i, auto part) {
    const F32 old_max = load(col_max + i, part);
    const F32 new_max = larger(load(highest + i, part), old_max);
    const F32 new_shift = finite(new_max);
    const F32 old_sum = load(col_sum + i, part) * exp(old_max - new_shift);
    store(col_sum + i, old_sum + load(sum + i, part) * exp(load(shift + i, part) - new_shift), part);
    store(col_max + i, new_max, part);
  });
}

void forward(const ContrastiveForward& params, const RowSums& row_sums, int64_t begin, int64_t end) {
  for_each_row_block(params.tile, begin, end, [&](const Block& block, int64_t first) {
    float* row_max = row_sums.highest + first;
    float* row_shift = row_sums.shift + first;
    float* row_sum = row_sums.sum + first;
    float col_max[kBlockColumns], col_shift[kBlockColumns], col_sum[kBlockColumns] = {};
    find_maxima(block, params.tile.scale, row_max, col_max);
    Range maxima;
    maxima.add(row_max, block.rows);
    maxima.add(col_max, block.width);
    if (maxima.is_narrow()) {
      const float shift = maxima.highest();
      for (int64_t i = 0; i < block.rows; ++i) row_shift[i] = shift;
      for (int64_t i = 0; i < block.width; ++i) col_shift[i] = shift;
      sum_together(block, shift, row_sum, col_sum);
    } else {
      for (int64_t i = 0; i < block.rows; ++i) row_shift[i] = row_max[i];
      for (int64_t i = 0; i < block.width; ++i) col_shift[i] = col_max[i];
      sum_apart(block, row_max, col_max, row_sum, col_sum);
    }
    add_to_columns(block.width, col_max, col_shift, col_sum, params.col_max + begin, params.col_lse + begin);
  });
}

// --- backward ---

// factor = gradient * exp(shift - lse).
void factors(const float* gradient, const float* lse, float shift, int64_t count, float* factor) {
  for_each_vector(count, [&](int64_t i, auto part) {
    store(factor + i, load(gradient + i, part) * exp(shift - load(lse + i, part)), part);
  });
}

// Replaces the values of a row, without the positive, by gradient_of(logit, column, part) * tile.scale.
// Returns the sum of gradient * value.
template <class Gradient>
double replace_row(const ContrastiveBackward& params, const Block& block, int64_t row,
                   const Gradient& gradient_of) {
  float* values = block.row(row);
  // Rounded as in the forward pass: a fused multiply-add would compute exp(logit - lse) of another logit.
  float scaled[kBlockColumns];
  const float* logits = params.are_logits ? values : scaled;
  if (!params.are_logits) {
    for_each_vector(block.width, [&](int64_t i, auto part) {
      store(scaled + i, load(values + i, part) * params.tile.scale, part);
    });
  }
  F64 sums = {};
  for_each_part(block, row, [&](int64_t first, int64_t count, bool is_pair) {
    if (is_pair) return;
    for_each_vector(count, [&](int64_t i, auto part) {
      const F32 value = load(values + first + i, part);
      const F32 gradient = gradient_of(load(logits + first + i, part), first + i, part);
      store(values + first + i, gradient * params.tile.scale, part);
      add_product(sums, zero_beyond(gradient, part), value);
    });
  });
  return total_of(sums);
}

double backward(const ContrastiveBackward& params, int64_t begin, int64_t end) {
  const float* dcol = params.dcol_lse + begin;
  const float* col_lse = params.col_lse + begin;
  double total = 0;
  for_each_row_block(params.tile, begin, end, [&](const Block& block, int64_t first) {
    const float* drow = params.drow_lse + first;
    const float* row_lse = params.row_lse + first;
    Range range;
    range.add(row_lse, block.rows);
    range.add(col_lse, block.width);
    const float shift = range.highest();
    const bool is_narrow = range.is_narrow();
    float of_row[kBlockRows], of_col[kBlockColumns];
    if (is_narrow) {
      factors(drow, row_lse, shift, block.rows, of_row);
      factors(dcol, col_lse, shift, block.width, of_col);
    }
    for (int64_t row = 0; row < block.rows; ++row) {
      const auto with_shift = [&](F32 s, int64_t i, auto part) {
        return exp(s - shift) * (of_row[row] + load(of_col + i, part));
      };
      const auto apart = [&](F32 s, int64_t i, auto part) {
        return exp(s - row_lse[row]) * drow[row] + exp(s - load(col_lse + i, part)) * load(dcol + i, part);
      };
      total +=
          is_narrow ? replace_row(params, block, row, with_shift) : replace_row(params, block, row, apart);
    }
  });
  return total;
}

// --- siglip ---

// log(1 + t) for t in [0, 1]: the series of 2 artanh(z) with z = t / (2 + t) <= 1 / 3, to float32's
// resolution.
inline F32 log1p(F32 t) {
  const F32 z = t / (2.0f + t), square = z * z;
  F32 series = broadcast(1.0f / 15);
  series = series * square + 1.0f / 13;
  series = series * square + 1.0f / 11;
  series = series * square + 1.0f / 9;
  series = series * square + 1.0f / 7;
  series = series * square + 1.0f / 5;
  series = series * square + 1.0f / 3;
  series = series * square + 1.0f;
  return 2.0f * z * series;
}

// log(1 + e^x) from power = e^-|x|.
inline F32 softplus(F32 x, F32 power) {
  const F32 positive = x < 0.0f ? F32{} : x;  // keeps NaN
  return positive + log1p(power);
}

inline F32 power_of(F32 x) { return exp(x < 0.0f ? x : -x); }

// With negated positives the loss is the same function of every logit. Negating them before and after the
// sigmoid computes sigmoid(x) - 1 without cancellation.
template <bool kNeedsGrad>
SiglipSums siglip_sums(const SiglipTile& params, int64_t begin, int64_t end) {
  const float scale = params.tile.scale, bias = params.bias;
  SiglipSums total;
  for_each_row_block(params.tile, begin, end, [&](const Block& block, int64_t) {
    for (int64_t row = 0; row < block.rows; ++row) {
      for_each_part(block, row, [&](int64_t first, int64_t count, bool is_pair) {
        float* values = block.row(row) + first;
        const float sign = is_pair ? -1.0f : 1.0f;
        float sum[kNeedsGrad ? 3 : 1];
        sum_over_row(count, sum, [&](int64_t i, auto part, F32* sums) {
          const F32 value = load(values + i, part);
          const F32 x = sign * (value * scale + bias);
          const F32 power = power_of(x);
          sums[0] += zero_beyond(softplus(x, power), part);
          if constexpr (kNeedsGrad) {
            const F32 gradient = sign * (x < 0.0f ? power : broadcast(1.0f)) / (1.0f + power);
            store(values + i, gradient * scale, part);
            sums[1] += zero_beyond(gradient * value, part);
            sums[2] += zero_beyond(gradient, part);
          }
        });
        total.loss += sum[0];
        if constexpr (kNeedsGrad) {
          total.dscale += sum[1];
          total.dbias += sum[2];
        }
      });
    }
  });
  return total;
}

SiglipSums siglip(const SiglipTile& params, int64_t begin, int64_t end) {
  return params.needs_grad ? siglip_sums<true>(params, begin, end) : siglip_sums<false>(params, begin, end);
}

}  // namespace

const ContrastiveKernels contrastive = {forward, backward, siglip};

}  // namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE
