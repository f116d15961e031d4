#include "drive.h"
#include "include/token_dropout.h"

namespace evakernels::drive {
namespace {

constexpr int64_t kPrefix = 2;

// Every second token of each sample, the last ones first, so that samples differ.
Vector<int64_t> every_second(int64_t tokens, int64_t batch) {
  Vector<int64_t> index;
  for (int64_t sample = 0; sample < batch; ++sample) {
    for (int64_t i = 0; i < tokens / 2; ++i) index.push_back(tokens - 1 - 2 * i - (sample + tokens) % 2);
  }
  settle(index);
  return index;
}

void drive(const Case& c, bool by_channel) {
  const int64_t tokens = 2 * c.rows + 6, channels = c.width;
  // Once more samples than the backward pass has warps.
  const int64_t batch = by_channel || c.width > 1000 ? 3 : 10;
  const Vector<int64_t> index = every_second(tokens, batch);
  const int64_t kept = tokens / 2, rows = kPrefix + kept;
  const auto called = [&](const char* what) {
    return name_of(c, (std::string("token_dropout") + (by_channel ? " by channel, " : ", ") + what).c_str());
  };
  const TokenDropoutShape shape = {batch, tokens, kept, kPrefix, channels};
  Buffer patches = Buffer::random(c.dtype, batch * tokens * channels);
  Buffer prefix = Buffer::random(c.dtype, kPrefix * channels);
  Buffer pos_embed = Buffer::random(c.dtype, (kPrefix + tokens) * channels);
  Buffer out(c.dtype, batch * rows * channels);
  const PatchTensor view = {patches.data(), tokens * channels, by_channel ? 1 : channels,
                            by_channel ? tokens : 1, c.dtype};
  const TokenDropoutForward forward = {.patches = view,
                                       .token_index = index.data(),
                                       .prefix = prefix.data(),
                                       .pos_embed = pos_embed.data(),
                                       .out = out.data(),
                                       .shape = shape,
                                       .prefix_dtype = c.dtype,
                                       .pos_embed_dtype = c.dtype,
                                       .out_dtype = c.dtype};
  run(cuda::token_dropout_forward(forward, nullptr), called("forward"));
  Buffer dout = Buffer::random(c.dtype, batch * rows * channels);
  check_written(out, called("out"));

  Buffer to_patches(c.dtype, batch * tokens * channels), to_prefix(c.dtype, kPrefix * channels);
  Buffer to_pos_embed(c.dtype, (kPrefix + tokens) * channels);
  const TokenDropoutBackward backward = {.dout = dout.data(),
                                         .token_index = index.data(),
                                         .dpatches = to_patches.data(),
                                         .dprefix = to_prefix.data(),
                                         .dpos_embed = to_pos_embed.data(),
                                         .shape = shape,
                                         .dtype = c.dtype};
  Scratch scratch;
  run(cuda::token_dropout_backward(backward, scratch, nullptr), called("backward"));
  check_written(to_patches, called("dpatches"));
  check_written(to_prefix, called("dprefix"));
  check_written(to_pos_embed, called("dpos_embed"));
}

}  // namespace

void drive_token_dropout(const Case& c) {
  drive(c, false);
  drive(c, true);
}

}  // namespace evakernels::drive
