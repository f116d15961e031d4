// Runs the launchers of csrc/cuda on buffers of its own and compares with sums in double: for what can't run
// under Python, as the thread sanitizer. Prints what is wrong; returns 1 if anything is.
#include "drive.h"

int main() {
  using namespace evakernels;
  using namespace evakernels::drive;
  constexpr DType kHalf = DType::BFloat16;
  // Several rows a warp and a block; several warps; unaligned, several rows a block too; a row in memory
  // only.
  const Case cases[] = {{29, 64, DType::Float32}, {14, 264, kHalf},          {5, 1408, kHalf},
                        {18, 2730, kHalf},        {7, 33, DType::Float16},   {4, 513, DType::Float32},
                        {4, 2049, kHalf},         {4, 3072, DType::Float32}, {3, 8200, kHalf}};
  for (const Case& c : cases) {
    drive_norms(c);
    drive_gelu(c);
    drive_swiglu(c);
    drive_token_dropout(c);
  }
  drive_adamw();
  drive_lamb();
  drive_rope_attention();
  if (failures == 0) std::printf("all right\n");
  return failures == 0 ? 0 : 1;
}
