// Runs the launchers of csrc/cuda on its own buffers, for NVIDIA's sanitizers and for the interpreter,
// which report races and wrong accesses; the ops' tests compare results. Prints what is wrong; returns 1 if
// anything is. Arguments name the families to drive; without any it drives all.
#include "drive.h"

#include <cstring>

int main(int count, char** names) {
  using namespace evakernels;
  using namespace evakernels::drive;
  constexpr DType kHalf = DType::BFloat16;
  // Several rows a warp and a block; several warps; unaligned, several rows a block too; a row in memory
  // only.
  const Case cases[] = {{29, 64, DType::Float32}, {14, 264, kHalf},          {5, 1408, kHalf},
                        {18, 2730, kHalf},        {7, 225, DType::Float16},  {4, 513, DType::Float32},
                        {4, 2049, kHalf},         {4, 3072, DType::Float32}, {3, 8200, kHalf}};
  const auto wanted = [&](const char* family) {
    return count == 1 || std::any_of(names + 1, names + count,
                                     [&](const char* name) { return std::strcmp(name, family) == 0; });
  };
  for (const Case& c : cases) {
    if (wanted("norms")) drive_norms(c);
    if (wanted("gelu")) drive_gelu(c);
    if (wanted("swiglu")) drive_swiglu(c);
    if (wanted("token_dropout")) drive_token_dropout(c);
  }
  if (wanted("lamb")) drive_lamb();
  if (wanted("rope_attention")) drive_rope_attention();
  if (failures == 0) std::printf("all right\n");
  return failures == 0 ? 0 : 1;
}
