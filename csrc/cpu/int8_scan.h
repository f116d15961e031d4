// Of rows in 8 bits a coordinate, those that can be among the nearest to a query.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/isa.h"

namespace evakernels::cpu {

// A score is code . query, times the factors of both; the true one differs by no more than
// length * rest + error.
struct Int8Row {
  float factor;
  float rest;  // length of what rounding took
};

struct Int16Query {
  float factor;
  float length;
  float error;
};

struct Int8Scan {
  const int8_t* codes;  // [rows, dim]
  const Int8Row* about;
  const int64_t* numbers;  // [compared], of the rows to compare, none twice; null for the first ones
  const int16_t* queries;  // [count, dim], such that no sum of products overflows 32 bits
  const Int16Query* about_queries;
  int64_t compared;
  int64_t dim;
  int64_t count;
  int64_t top;
};

// Of each query the rows, in ascending order, whose scores may be as high as the top-th highest. They depend
// on the arguments alone, never on the number of threads.
std::vector<std::vector<int64_t>> int8_scan(const Int8Scan& scan, Isa isa, int threads);

}  // namespace evakernels::cpu
