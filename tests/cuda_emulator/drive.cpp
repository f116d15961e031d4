// Runs the launchers of csrc/cuda on buffers of its own and compares with sums in double: for what can't run
// under Python, as the thread sanitizer. Prints what is wrong; returns 1 if anything is.
#include "drive.h"

#include "cuda/layer_norm.h"
#include "cuda/residual_norm.h"

namespace evakernels::drive {
namespace {

void drive_layer_norm(const Case& c) {
  const int64_t size = c.rows * c.width;
  Buffer x = Buffer::random(c.dtype, size), dy = Buffer::random(c.dtype, size);
  Buffer weight = Buffer::random(DType::Float32, c.width), bias = Buffer::random(DType::Float32, c.width);
  Buffer y(c.dtype, size), mean(DType::Float32, c.rows), rstd(DType::Float32, c.rows);
  const LayerNormForward forward = {x.data(),      weight.data(), bias.data(),    y.data(),
                                    mean.floats(), rstd.floats(), c.rows,         c.width,
                                    kEps,          c.dtype,       DType::Float32, false};
  run(cuda::layer_norm_forward(forward, nullptr), name_of(c, "layer_norm_forward"));
  compare(y, norm_of(values_of(x, size), weight, bias, c.rows, c.width), name_of(c, "y"), y.dtype());

  Buffer dx(c.dtype, size), dweight(DType::Float32, c.width), dbias(DType::Float32, c.width);
  const LayerNormBackward backward = {dy.data(), x.data(),       weight.data(), mean.floats(), rstd.floats(),
                                      dx.data(), dweight.data(), dbias.data(),  c.rows,        c.width,
                                      c.dtype,   DType::Float32, false};
  Buffer workspace(DType::Float32, cuda::layer_norm_backward_workspace(backward));
  run(cuda::layer_norm_backward(backward, workspace.floats(), nullptr), name_of(c, "layer_norm_backward"));
  const NormGradient expected(values_of(dy, size), values_of(x, size), weight, c.rows, c.width);
  compare(dx, expected.dx, name_of(c, "dx"), dx.dtype());
  compare(dweight, expected.dweight, name_of(c, "dweight"), dweight.dtype());
  compare(dbias, expected.dbias, name_of(c, "dbias"), dbias.dtype());
}

void drive_add_norm(const Case& c) {
  const int64_t size = c.rows * c.width;
  Buffer residual = Buffer::random(c.dtype, size), branch = Buffer::random(c.dtype, size);
  Buffer weight = Buffer::random(DType::Float32, c.width), bias = Buffer::random(DType::Float32, c.width);
  Buffer layer_scale = Buffer::random(DType::Float32, c.width),
         row_scale = Buffer::random(DType::Float32, c.rows);
  Buffer y(c.dtype, size), x(c.dtype, size), mean(DType::Float32, c.rows), rstd(DType::Float32, c.rows);
  const ResidualNormShape shape = {c.rows, c.width, 1, c.dtype, c.dtype, false};
  const ResidualNormParameters parameters = {{weight.data(), DType::Float32},
                                             {bias.data(), DType::Float32},
                                             {layer_scale.data(), DType::Float32},
                                             {row_scale.data(), DType::Float32}};
  const AddNormForward forward = {residual.data(), branch.data(), y.data(),   x.data(), mean.floats(),
                                  rstd.floats(),   kEps,          parameters, shape};
  run(cuda::add_norm_forward(forward, nullptr), name_of(c, "add_norm_forward"));
  std::vector<double> total(size);
  for (int64_t i = 0; i < size; ++i) {
    total[i] = residual.at(i) + branch.at(i) * layer_scale.at(i % c.width) * row_scale.at(i / c.width);
  }
  compare(x, total, name_of(c, "the sum"), x.dtype());
  compare(y, norm_of(total, weight, bias, c.rows, c.width), name_of(c, "y of the sum"), y.dtype());

  Buffer dy = Buffer::random(c.dtype, size), dx = Buffer::random(c.dtype, size);
  Buffer dresidual(c.dtype, size), dbranch(c.dtype, size), dweight(DType::Float32, c.width);
  Buffer dbias(DType::Float32, c.width), dlayer_scale(DType::Float32, c.width);
  const AddNormBackward backward = {dy.data(),
                                    dx.data(),
                                    x.data(),
                                    branch.data(),
                                    mean.floats(),
                                    rstd.floats(),
                                    dresidual.data(),
                                    dbranch.data(),
                                    parameters,
                                    {{dweight.data(), DType::Float32},
                                     {dbias.data(), DType::Float32},
                                     {dlayer_scale.data(), DType::Float32}},
                                    shape};
  Buffer workspace(DType::Float32, cuda::add_norm_backward_workspace(backward));
  run(cuda::add_norm_backward(backward, workspace.floats(), nullptr), name_of(c, "add_norm_backward"));
  const NormGradient expected(values_of(dy, size), values_of(x, size), weight, c.rows, c.width);
  // The kernel has the statistics of the sum before it was rounded.
  compare(dweight, expected.dweight, name_of(c, "dweight of add_norm"), c.dtype);
  std::vector<double> expected_dbranch(size), expected_dresidual(size);
  for (int64_t i = 0; i < size; ++i) {
    expected_dresidual[i] = dx.at(i) + expected.dx[i];
    expected_dbranch[i] = expected_dresidual[i] * layer_scale.at(i % c.width) * row_scale.at(i / c.width);
  }
  compare(dresidual, expected_dresidual, name_of(c, "dresidual"), dresidual.dtype());
  compare(dbranch, expected_dbranch, name_of(c, "dbranch"), dbranch.dtype());
}

}  // namespace
}  // namespace evakernels::drive

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
    drive_layer_norm(c);
    drive_add_norm(c);
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
