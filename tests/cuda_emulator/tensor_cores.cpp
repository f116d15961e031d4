// Compiled without sanitizers, as the scheduler is: one lane works here on what all have brought.
#include "tensor_cores.h"

#include "common/numerics.h"

namespace cuda_emulator {
namespace {

constexpr int kLanes = 32;

void give_all_addresses(const uint64_t* lanes) {
  for (int to = 0; to < kLanes; ++to) {
    for (int from = 0; from < kLanes; ++from) {
      reinterpret_cast<Addresses*>(lanes[to])->all[from] = reinterpret_cast<Addresses*>(lanes[from])->own;
    }
  }
}

float element(uint32_t word, int i, bool bfloat16) {
  const uint32_t bits = i ? word >> 16 : word & 0xFFFF;
  return bfloat16 ? evakernels::bfloat16_to_float<float>(bits) : evakernels::float16_to_float<float>(bits);
}

void multiply_all(const uint64_t* lanes) {
  using Row = float __attribute__((vector_size(16 * sizeof(float))));
  float a[16][16];
  Row b[16], sums[16];
  const auto product_of = [&](int lane) -> const Product& {
    return *reinterpret_cast<Product*>(lanes[lane]);
  };
  // Of the sums of a lane, number i is in row `group` or 8 below, in columns 2 * in_group or one further.
  const auto for_each_sum = [&](const auto& visit) {
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < 8; ++i) {
        visit(lane / 4 + (i % 4 >= 2 ? 8 : 0), lane % 4 * 2 + i % 2 + (i >= 4 ? 8 : 0),
              product_of(lane).sums[i]);
      }
    }
  };
  for (int lane = 0; lane < kLanes; ++lane) {
    const Product& own = product_of(lane);
    const int group = lane / 4, in_group = lane % 4;
    for (int word = 0; word < 4; ++word) {
      for (int i = 0; i < 2; ++i) {
        a[group + word % 2 * 8][2 * in_group + i + word / 2 * 8] = element(own.a[word], i, own.bfloat16);
        b[2 * in_group + i + word / 2 * 8][group + word % 2 * 8] = element(own.b[word], i, own.bfloat16);
      }
    }
  }
  for_each_sum([&](int row, int column, float& sum) { sums[row][column] = sum; });
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) sums[row] += a[row][k] * b[k];
  }
  for_each_sum([&](int row, int column, float& sum) { sum = sums[row][column]; });
}

}  // namespace

void exchange_addresses(Addresses& addresses, int line) {
  work_together(reinterpret_cast<uint64_t>(&addresses), &give_all_addresses, "ldmatrix", line);
}

void multiply(const Product& product, int line) {
  work_together(reinterpret_cast<uint64_t>(&product), &multiply_all, "mma", line);
}

}  // namespace cuda_emulator
