// The products of a scan: one function for each instruction set.
#pragma once

#include <cstdint>

#include "cpu/isa_namespaces.h"

namespace evakernels::cpu {

// products[i] = rows[i] . query, for rows [count, dim].
EVAKERNELS_FOR_EACH_ISA(void int8_products(const int8_t* rows, const int16_t* query, int64_t count,
                                           int64_t dim, int32_t* products);)

}  // namespace evakernels::cpu
