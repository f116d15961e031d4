// Runs the launchers of the norms joined with a residual connection, and those of token_dropout, over awkward
// shapes on buffers of exactly the right size, for the sanitizers to watch.
#include <cstdio>
#include <vector>

#include "cpu/residual_norm.h"
#include "cpu/token_dropout.h"
#include "sanitizer_buffers.h"

using namespace evakernels;

namespace {

using Bytes = std::vector<unsigned char>;

struct NormBuffers {
  NormBuffers(DType dtype, DType branch_dtype, int64_t rows, int64_t width)
      : rows(ones(dtype, rows * width)),
        branch(ones(branch_dtype, rows * width)),
        vector(ones(branch_dtype, width)),
        row_scale(ones(DType::Float32, rows)),
        y(rows_of_outputs(dtype, rows * width)),
        x(y),
        dbranch(rows_of_outputs(branch_dtype, rows * width)),
        dvectors(3, Bytes(ones(branch_dtype, width).size())),
        mean(rows),
        rstd(rows),
        shape{rows, width, 1, dtype, branch_dtype, false},
        parameters{{vector.data(), branch_dtype},
                   {vector.data(), branch_dtype},
                   {vector.data(), branch_dtype},
                   {row_scale.data(), DType::Float32}},
        gradients{{dvectors[0].data(), branch_dtype},
                  {dvectors[1].data(), branch_dtype},
                  {dvectors[2].data(), branch_dtype}} {}

  static Bytes rows_of_outputs(DType dtype, int64_t count) { return Bytes(count * item_size(dtype)); }

  Bytes rows, branch, vector, row_scale, y, x, dbranch;
  std::vector<Bytes> dvectors;
  std::vector<float> mean, rstd;
  ResidualNormShape shape;
  ResidualNormParameters parameters;
  ResidualNormGradients gradients;
};

// In a row of equal numbers the norm is the bias, here 1, and passes no gradient.
bool check_add_norm(cpu::Isa isa, DType dtype, DType branch_dtype, int64_t rows, int64_t width) {
  NormBuffers b(dtype, branch_dtype, rows, width);
  const AddNormForward forward = {b.rows.data(), b.branch.data(), b.y.data(),   b.x.data(), b.mean.data(),
                                  b.rstd.data(), 1e-6f,           b.parameters, b.shape};
  cpu::add_norm_forward(forward, isa, halves);
  Bytes dresidual(b.x.size());
  AddNormBackward backward = {b.rows.data(), b.rows.data(), b.x.data(),       b.branch.data(),
                              b.mean.data(), b.rstd.data(), dresidual.data(), b.dbranch.data(),
                              b.parameters,  b.gradients,   b.shape};
  cpu::add_norm_backward(backward, isa, halves);
  const bool scaled = b.y == b.rows && dresidual == b.rows && b.dbranch == b.branch;
  backward.branch = nullptr;
  backward.dbranch = nullptr;
  backward.parameters.layer_scale.data = backward.parameters.row_scale.data = nullptr;
  backward.gradients = {};
  cpu::add_norm_backward(backward, isa, halves);
  return scaled && dresidual == b.rows;
}

bool check_norm_add(cpu::Isa isa, DType dtype, DType branch_dtype, int64_t rows, int64_t width) {
  NormBuffers b(dtype, branch_dtype, rows, width);
  const NormAddForward forward = {b.rows.data(), b.branch.data(), b.x.data(),   b.mean.data(),
                                  b.rstd.data(), 1e-6f,           b.parameters, b.shape};
  cpu::norm_add_forward(forward, isa, halves);
  const NormAddBackward backward = {b.rows.data(),    b.branch.data(), b.mean.data(), b.rstd.data(),
                                    b.dbranch.data(), b.parameters,    b.gradients,   b.shape};
  cpu::norm_add_backward(backward, isa, halves);
  for (unsigned char byte : b.dbranch) {
    if ((byte & 0x7F) != 0) return false;
  }
  return true;
}

// Without position embeddings every token is a copy; `tokens - 1` of them are kept, in reverse order.
bool check_token_dropout(cpu::Isa isa, DType dtype, bool by_channel, int64_t tokens, int64_t channels) {
  const int64_t batch = 3, prefix_tokens = 2, kept = tokens - 1;
  const Bytes patches = ones(dtype, batch * tokens * channels),
              prefix = ones(dtype, prefix_tokens * channels);
  const Bytes zeros(item_size(dtype) * (prefix_tokens + tokens) * channels);
  std::vector<int64_t> index;
  for (int64_t i = 0; i < batch * kept; ++i) index.push_back(tokens - 1 - i % kept);
  Bytes out(item_size(dtype) * batch * (prefix_tokens + kept) * channels);
  const TokenDropoutShape shape = {batch, tokens, kept, prefix_tokens, channels};
  const PatchTensor view = {patches.data(), tokens * channels, by_channel ? 1 : channels,
                            by_channel ? tokens : 1, dtype};
  const TokenDropoutForward forward = {view,  index.data(), prefix.data(), zeros.data(), out.data(),
                                       shape, dtype,        dtype,         dtype};
  cpu::token_dropout_forward(forward, isa, halves);
  Bytes dpatches(patches.size()), dprefix(prefix.size()), dpos_embed(zeros.size());
  const TokenDropoutBackward backward = {
      out.data(), index.data(), dpatches.data(), dprefix.data(), dpos_embed.data(), shape, dtype};
  cpu::token_dropout_backward(backward, isa, halves);
  const auto token = dpatches.begin() + item_size(dtype) * channels;
  return out == ones(dtype, batch * (prefix_tokens + kept) * channels) &&
         Bytes(dpatches.begin(), token) == Bytes(item_size(dtype) * channels) &&
         Bytes(token, dpatches.begin() + item_size(dtype) * tokens * channels) ==
             ones(dtype, kept * channels);
}

bool check_all(cpu::Isa isa, DType dtype, int64_t width) {
  for (DType branch_dtype : {DType::Float32, DType::BFloat16, DType::Float16}) {
    for (int64_t rows : {0, 1, 16, 40, 1100}) {
      if (!check_add_norm(isa, dtype, branch_dtype, rows, width)) return false;
      if (!check_norm_add(isa, dtype, branch_dtype, rows, width)) return false;
    }
  }
  for (int64_t tokens : {2, 3, 17}) {
    for (bool by_channel : {false, true}) {
      if (!check_token_dropout(isa, dtype, by_channel, tokens, width)) return false;
    }
  }
  return true;
}

}  // namespace

int main() {
  int checks = 0;
  for (cpu::Isa isa : cpu::available_isas()) {
    for (DType dtype : {DType::Float32, DType::BFloat16, DType::Float16}) {
      for (int64_t width : {1, 3, 7, 16, 63, 64, 65, 130}) {
        if (!check_all(isa, dtype, width)) {
          std::printf("wrong: %s, dtype %d, width %lld\n", cpu::name(isa), static_cast<int>(dtype),
                      static_cast<long long>(width));
          return 1;
        }
        ++checks;
      }
    }
  }
  std::printf("%d checks\n", checks);
}
