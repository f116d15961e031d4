// The products of a scan: one function for each instruction set.
#pragma once

#include <cstdint>

#include "cpu/isa_namespaces.h"

namespace evakernels::cpu {

// products[i] = row . query, for the row first + i of codes [rows, dim], or the row numbers[first + i]; those
// up to `end` come next.
struct Int8Rows {
  const int8_t* codes;
  const int64_t* numbers;
  int64_t first;
  int64_t end;
  int64_t dim;

  int64_t number(int64_t i) const { return numbers ? numbers[first + i] : first + i; }
};

EVAKERNELS_FOR_EACH_ISA(void int8_products(const Int8Rows& rows, const int16_t* query, int64_t count,
                                           int32_t* products);)

}  // namespace evakernels::cpu
