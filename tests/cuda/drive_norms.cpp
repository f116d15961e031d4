#include "drive.h"
#include "include/layer_norm.h"
#include "include/residual_norm.h"

namespace evakernels::drive {
namespace {

Buffer vector_of(int64_t size) { return Buffer::random(DType::Float32, size); }

// `before`: 0, or the matrices begin so many elements after a word of 16 bytes, and others farther.
struct Shift {
  int64_t before;

  int64_t operator()(int64_t more) const { return before ? before + more : 0; }
  const char* name() const { return before ? ", shifted" : ""; }
};

// The parameters of a norm that is joined with a residual connection; those that scale may be missing.
struct Parameters {
  Buffer weight, bias, layer_scale, row_scale, dweight, dbias, dlayer_scale;
  bool scaled;

  Parameters(const Case& c, bool scaled)
      : weight(vector_of(c.width)),
        bias(vector_of(c.width)),
        layer_scale(vector_of(c.width)),
        row_scale(vector_of(c.rows)),
        dweight(DType::Float32, c.width),
        dbias(DType::Float32, c.width),
        dlayer_scale(DType::Float32, c.width),
        scaled(scaled) {}

  ResidualNormParameters pointers() {
    const auto if_scaled = [&](Buffer& buffer) { return scaled ? buffer.data() : nullptr; };
    return {{weight.data(), DType::Float32},
            {bias.data(), DType::Float32},
            {if_scaled(layer_scale), DType::Float32},
            {if_scaled(row_scale), DType::Float32}};
  }

  // What a backward pass writes for them.
  ResidualNormGradients gradients() {
    return {{dweight.data(), DType::Float32},
            {dbias.data(), DType::Float32},
            {scaled ? dlayer_scale.data() : nullptr, DType::Float32}};
  }
};

void drive_layer_norm(const Case& c, Shift shifted) {
  const int64_t size = c.rows * c.width;
  const auto called = [&](const std::string& what) { return name_of(c, (what + shifted.name()).c_str()); };
  Buffer x = Buffer::random(c.dtype, size, shifted(0)), y(c.dtype, size, shifted(2));
  Buffer weight = vector_of(c.width), bias = vector_of(c.width);
  Buffer mean(DType::Float32, c.rows), rstd(DType::Float32, c.rows);
  const LayerNormForward forward = {.x = x.data(),
                                    .weight = weight.data(),
                                    .bias = bias.data(),
                                    .y = y.data(),
                                    .mean = mean.floats(),
                                    .rstd = rstd.floats(),
                                    .rows = c.rows,
                                    .width = c.width,
                                    .eps = kEps,
                                    .dtype = c.dtype,
                                    .y_dtype = c.dtype,
                                    .weight_dtype = DType::Float32,
                                    .rms = false};
  run(cuda::layer_norm_forward(forward, nullptr), called("layer_norm_forward"));
  check_written(y, called("y"));

  Buffer dy = Buffer::random(c.dtype, size, shifted(4)), dx(c.dtype, size, shifted(6));
  Buffer dweight(DType::Float32, c.width), dbias(DType::Float32, c.width);
  const LayerNormBackward backward = {.dy = dy.data(),
                                      .x = x.data(),
                                      .weight = weight.data(),
                                      .mean = mean.floats(),
                                      .rstd = rstd.floats(),
                                      .dx = dx.data(),
                                      .dweight = dweight.data(),
                                      .dbias = dbias.data(),
                                      .rows = c.rows,
                                      .width = c.width,
                                      .dtype = c.dtype,
                                      .y_dtype = c.dtype,
                                      .weight_dtype = DType::Float32,
                                      .rms = false};
  Scratch scratch;
  run(cuda::layer_norm_backward(backward, scratch, nullptr), called("layer_norm_backward"));
  check_written(dx, called("dx"));
  check_written(dweight, called("dweight"));
  check_written(dbias, called("dbias"));
}

void drive_add_norm(const Case& c, bool scaled, Shift shifted) {
  const int64_t size = c.rows * c.width;
  const std::string name = std::string(scaled ? " of scaled add_norm" : " of add_norm") + shifted.name();
  const auto called = [&](const std::string& what) { return name_of(c, (what + name).c_str()); };
  Buffer residual = Buffer::random(c.dtype, size, shifted(0));
  Buffer branch = Buffer::random(c.dtype, size, shifted(2));
  Buffer y(c.dtype, size, shifted(4)), x(c.dtype, size, shifted(6));
  Buffer mean(DType::Float32, c.rows), rstd(DType::Float32, c.rows);
  Parameters parameters(c, scaled);
  const ResidualNormShape shape = {c.rows, c.width, 1, c.dtype, c.dtype, c.dtype, false};
  const AddNormForward forward = {.residual = residual.data(),
                                  .branch = branch.data(),
                                  .y = y.data(),
                                  .x = x.data(),
                                  .mean = mean.floats(),
                                  .rstd = rstd.floats(),
                                  .eps = kEps,
                                  .parameters = parameters.pointers(),
                                  .shape = shape};
  run(cuda::add_norm_forward(forward, nullptr), called("forward"));
  check_written(x, called("x"));
  check_written(y, called("y"));

  Buffer dy = Buffer::random(c.dtype, size, shifted(8)), dx = Buffer::random(c.dtype, size, shifted(10));
  Buffer dresidual(c.dtype, size, shifted(12)), dbranch(c.dtype, size, shifted(14));
  const AddNormBackward backward = {.dy = dy.data(),
                                    .dx = dx.data(),
                                    .x = x.data(),
                                    .branch = branch.data(),
                                    .mean = mean.floats(),
                                    .rstd = rstd.floats(),
                                    .dresidual = dresidual.data(),
                                    .dbranch = scaled ? dbranch.data() : nullptr,
                                    .parameters = parameters.pointers(),
                                    .gradients = parameters.gradients(),
                                    .shape = shape};
  Scratch scratch;
  run(cuda::add_norm_backward(backward, scratch, nullptr), called("backward"));
  check_written(dresidual, called("dresidual"));
  check_written(parameters.dweight, called("dweight"));
  check_written(parameters.dbias, called("dbias"));
  if (!scaled) return;
  check_written(dbranch, called("dbranch"));
  check_written(parameters.dlayer_scale, called("dlayer_scale"));
}

void drive_norm_add(const Case& c, bool scaled, Shift shifted) {
  const int64_t size = c.rows * c.width;
  const std::string name = std::string(scaled ? " of scaled norm_add" : " of norm_add") + shifted.name();
  const auto called = [&](const std::string& what) { return name_of(c, (what + name).c_str()); };
  Buffer residual = Buffer::random(c.dtype, size, shifted(0));
  Buffer branch = Buffer::random(c.dtype, size, shifted(2)), x(c.dtype, size, shifted(4));
  Buffer mean(DType::Float32, c.rows), rstd(DType::Float32, c.rows);
  Parameters parameters(c, scaled);
  const ResidualNormShape shape = {c.rows, c.width, 1, c.dtype, c.dtype, c.dtype, false};
  const NormAddForward forward = {.residual = residual.data(),
                                  .branch = branch.data(),
                                  .x = x.data(),
                                  .mean = mean.floats(),
                                  .rstd = rstd.floats(),
                                  .eps = kEps,
                                  .parameters = parameters.pointers(),
                                  .shape = shape};
  run(cuda::norm_add_forward(forward, nullptr), called("forward"));
  Buffer dx = Buffer::random(c.dtype, size, shifted(6)), dbranch(c.dtype, size, shifted(8));
  check_written(x, called("x"));

  const NormAddBackward backward = {.dx = dx.data(),
                                    .branch = branch.data(),
                                    .mean = mean.floats(),
                                    .rstd = rstd.floats(),
                                    .dbranch = dbranch.data(),
                                    .parameters = parameters.pointers(),
                                    .gradients = parameters.gradients(),
                                    .shape = shape};
  Scratch scratch;
  run(cuda::norm_add_backward(backward, scratch, nullptr), called("backward"));
  check_written(dbranch, called("dbranch"));
  check_written(parameters.dweight, called("dweight"));
  check_written(parameters.dbias, called("dbias"));
  if (scaled) check_written(parameters.dlayer_scale, called("dlayer_scale"));
}

}  // namespace

void drive_norms(const Case& c) {
  for (const int64_t before : shifts_of(c)) {
    drive_layer_norm(c, {before});
    drive_add_norm(c, before == 0, {before});
    drive_norm_add(c, before == 0, {before});
  }
}

}  // namespace evakernels::drive
