// Compiled once for each instruction set.
#include "cpu/int8_scan_kernels.h"

namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE {

constexpr int64_t kLine = 64;
// How far ahead rows are asked for from memory. In bytes, where they follow each other: more than a page, at
// whose end the processor stops doing so itself. In rows, where they don't: what is on its way while one is
// waited for.
constexpr int64_t kBytesAhead = 2048;
constexpr int64_t kRowsAhead = 16;

static inline int32_t product(const int8_t* row, const int16_t* query, int64_t dim) {
  int32_t sum = 0;
  // Compilers know this form: products of 16 bits, added in pairs.
  for (int64_t j = 0; j < dim; ++j) sum += static_cast<int16_t>(row[j]) * query[j];
  return sum;
}

static inline void prefetch(const int8_t* row, int64_t dim) {
  for (int64_t j = 0; j < dim; j += kLine) __builtin_prefetch(row + j);
}

void int8_products(const Int8Rows& rows, const int16_t* query, int64_t count, int32_t* products) {
  const int64_t dim = rows.dim;
  if (rows.numbers == nullptr) {
    const int8_t* first = rows.codes + rows.first * dim;
    for (int64_t i = 0; i < count; ++i) {
      prefetch(first + i * dim + kBytesAhead, dim);
      products[i] = product(first + i * dim, query, dim);
    }
    return;
  }
  const int64_t* numbers = rows.numbers + rows.first;
  for (int64_t i = 0; i < count; ++i) {
    if (i + kRowsAhead < rows.end - rows.first) prefetch(rows.codes + numbers[i + kRowsAhead] * dim, dim);
    products[i] = product(rows.codes + numbers[i] * dim, query, dim);
  }
}

}  // namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE
