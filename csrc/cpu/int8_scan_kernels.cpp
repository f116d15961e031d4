// Compiled once for each instruction set.
#include "cpu/int8_scan_kernels.h"

namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE {

// Rows that are read from memory: further ahead than a page, where the processor's own prefetching ends.
constexpr int64_t kAhead = 2048;
constexpr int64_t kLine = 64;

void int8_products(const int8_t* rows, const int16_t* query, int64_t count, int64_t dim, int32_t* products) {
  for (int64_t i = 0; i < count; ++i) {
    const int8_t* row = rows + i * dim;
    for (int64_t j = 0; j < dim; j += kLine) __builtin_prefetch(row + j + kAhead);
    int32_t sum = 0;
    // Compilers know this form: products of 16 bits, added in pairs.
    for (int64_t j = 0; j < dim; ++j) sum += static_cast<int16_t>(row[j]) * query[j];
    products[i] = sum;
  }
}

}  // namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE
