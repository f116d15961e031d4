// How a launcher asks for threads. The caller brings them, so that the kernels know no threading library.
#pragma once

#include <cstdint>

namespace evakernels::cpu {

enum class Isa;  // cpu/isa.h

using RangeBody = void (*)(int64_t begin, int64_t end, void* context);

// Calls body on disjoint ranges that cover [0, count), none (but the last) shorter than grain.
using ParallelFor = void (*)(int64_t count, int64_t grain, RangeBody body, void* context);

inline void serial_for(int64_t count, int64_t, RangeBody body, void* context) {
  if (count > 0) body(0, count, context);
}

// Runs a callable body(begin, end) through a ParallelFor.
template <class Body>
void run_parallel(ParallelFor parallel_for, int64_t count, int64_t grain, Body&& body) {
  const auto call = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<Body*>(context))(begin, end);
  };
  parallel_for(count, grain, call, &body);
}

}  // namespace evakernels::cpu
