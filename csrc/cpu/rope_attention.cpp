#include "include/rope_attention.h"

#include <cstring>
#include <stdexcept>
#include <vector>

#include "cpu/bfloat16_attention.h"
#include "cpu/isa.h"
#include "cpu/rotary_tables.h"
#include "cpu/rows.h"

namespace evakernels::cpu {
namespace {

// The heads of all samples or sequences, dealt out by the work that they are: sequences differ in length.
class Heads {
 public:
  explicit Heads(const AttentionShape& shape)
      : shape_(shape),
        is_packed_(shape.offsets.data != nullptr),
        firsts_(shape.batch + 1),
        work_(shape.batch + 1) {
    if (is_packed_) read_offsets();
    for (int64_t i = 0; i < shape.batch; ++i) {
      most_keys_ = std::max(most_keys_, keys(i));
      work_[i + 1] = work_[i] + shape.heads * work_of_head(i);
    }
  }

  int64_t most_keys() const { return most_keys_; }

  // Calls visit(workspace, heads) for the heads of each sample or sequence that are one thread's, with as
  // many floats.
  template <class Visit>
  void share_out(ParallelFor parallel_for, int64_t floats, const Visit& visit) const {
    run_parallel(parallel_for, work_.back(), kElementsPerTask, [&](int64_t begin, int64_t end) {
      AlignedFloats workspace(floats);
      visit_work(begin, end, [&](const SequenceHeads& heads) { visit(workspace.data(), heads); });
    });
  }

 private:
  void read_offsets() {
    for (int64_t i = 0; i <= shape_.batch; ++i) {
      const void* data = shape_.offsets.data;
      firsts_[i] = shape_.offsets.is_int64 ? static_cast<const int64_t*>(data)[i]
                                           : static_cast<const int32_t*>(data)[i];
      const bool fits = i == 0 ? firsts_[0] == 0 : firsts_[i] >= firsts_[i - 1];
      if (!fits) throw std::invalid_argument("cu_seqlens must rise from 0");
      if (i > 0 && tokens(i - 1) > shape_.tokens) {
        throw std::invalid_argument("a sequence has more tokens than max_seqlen");
      }
    }
    if (firsts_.back() != shape_.offsets.tokens) {
      throw std::invalid_argument("cu_seqlens must end with the number of tokens");
    }
  }

  int64_t tokens(int64_t i) const { return is_packed_ ? firsts_[i + 1] - firsts_[i] : shape_.tokens; }
  int64_t keys(int64_t i) const { return is_packed_ ? tokens(i) : shape_.keys; }
  int64_t work_of_head(int64_t i) const { return tokens(i) * (keys(i) + shape_.head_dim); }

  // The heads whose work begins in [begin, end).
  template <class Visit>
  void visit_work(int64_t begin, int64_t end, const Visit& visit) const {
    const auto behind = std::upper_bound(work_.begin(), work_.end(), begin);
    for (int64_t i = behind - work_.begin() - 1; i < shape_.batch && work_[i] < end; ++i) {
      const int64_t work = work_of_head(i);
      if (work == 0) continue;
      const int64_t first = ceil_div(std::max<int64_t>(begin - work_[i], 0), work);
      const int64_t last = std::min(shape_.heads, ceil_div(end - work_[i], work));
      if (first < last) visit(SequenceHeads{is_packed_ ? 0 : i, firsts_[i], tokens(i), keys(i), first, last});
    }
  }

  const AttentionShape& shape_;
  bool is_packed_;
  std::vector<int64_t> firsts_;  // tokens, of a packed batch
  std::vector<int64_t> work_;    // of those in front
  int64_t most_keys_ = 0;
};

// Heads that share keys, another number of keys than of queries and, in packed batches, rotated heads go in
// float32.
template <class Params>
bool is_bfloat16_product(const Params& params, Isa isa, const SequenceHeads& heads) {
  const AttentionShape& shape = params.shape;
  if (shape.kv_heads != shape.heads || heads.keys != heads.tokens) return false;
  if (shape.offsets.data != nullptr && params.tables.cos != nullptr) return false;
  return shape.dtype == DType::BFloat16 &&
         has_bfloat16_attention(isa, {heads.tokens, shape.heads, shape.head_dim});
}

// What is computed in products of bfloat16 at a time: all samples, or some heads of one sequence.
struct BFloat16Part {
  SequenceHeads heads;
  int64_t samples;
  Rotation rotation;

  AttentionOfHeads attention(const AttentionShape& shape) const {
    const int64_t count = heads.end - heads.begin;
    return {
        .shape = {heads.tokens, count, shape.head_dim},
        .rotation = rotation,
        .count = samples * count,
        .scale = shape.scale,
        .causal = shape.causal,
    };
  }

  HeadsView of(const HeadsView& view) const {
    HeadsView part = view;
    part.data =
        static_cast<BFloat16*>(view.data) + heads.first * view.token_stride + heads.begin * view.head_stride;
    return part;
  }

  HeadsView of_dense(void* data, const AttentionShape& shape) const {
    return of(dense_heads(data, shape, heads.tokens));
  }
};

void forward_in_bfloat16(const RopeAttentionForward& params, const BFloat16Part& part, Isa isa,
                         ParallelFor parallel_for) {
  const AttentionShape& shape = params.shape;
  const BFloat16AttentionForward given = {
      .q = part.of(params.q),
      .k = part.of(params.k),
      .v = part.of(params.v),
      .out = part.of_dense(params.out, shape),
      .lse = lse_of_head(params.lse, shape, part.heads, part.heads.begin),
      .lse_stride = lse_stride(shape),
      .of = part.attention(shape),
  };
  bfloat16_attention_forward(given, isa, parallel_for);
}

void backward_in_bfloat16(const RopeAttentionBackward& params, const BFloat16Part& part, Isa isa,
                          ParallelFor parallel_for) {
  const AttentionShape& shape = params.shape;
  const BFloat16AttentionBackward given = {
      .dout = part.of(params.dout),
      .q = part.of(params.q),
      .k = part.of(params.k),
      .v = part.of(params.v),
      .out = part.of(params.out),
      .lse = lse_of_head(params.lse, shape, part.heads, part.heads.begin),
      .lse_stride = lse_stride(shape),
      .dq = part.of_dense(params.dq, shape),
      .dk = part.of_dense(params.dk, shape),
      .dv = part.of_dense(params.dv, shape),
      .of = part.attention(shape),
  };
  bfloat16_attention_backward(given, isa, parallel_for);
}

// Calls in_bfloat16(part, parallel_for) or in_float32(rotation, workspace, heads) until all heads have been
// taken. workspace: that of the kernels, as a function of the number of keys.
template <class Params, class InBFloat16, class InFloat32>
void attend(const Params& params, Isa isa, ParallelFor parallel_for, int64_t (*workspace)(int64_t, int64_t),
            const InBFloat16& in_bfloat16, const InFloat32& in_float32) {
  const AttentionShape& shape = params.shape;
  const Heads all(shape);
  const ElementTables tables(params.tables, shape);
  const Rotation rotation = tables.rotation(false);
  // Of samples each is like the other, and a head needn't be one thread's.
  const SequenceHeads sample = {0, 0, shape.tokens, shape.keys, 0, shape.heads};
  if (shape.offsets.data == nullptr && is_bfloat16_product(params, isa, sample)) {
    return in_bfloat16(BFloat16Part{sample, shape.batch, rotation}, parallel_for);
  }
  const int64_t floats = workspace(all.most_keys(), shape.head_dim);
  all.share_out(parallel_for, floats, [&](float* memory, const SequenceHeads& heads) {
    if (is_bfloat16_product(params, isa, heads)) return in_bfloat16(BFloat16Part{heads, 1, {}}, serial_for);
    in_float32(rotation, memory, heads);
  });
}

}  // namespace

void rope_attention_forward(const RopeAttentionForward& params, Isa isa, ParallelFor parallel_for) {
  const RopeAttentionKernels& kernels = EVAKERNELS_OF_ISA(isa, rope_attention);
  attend(
      params, isa, parallel_for, kernels.forward_workspace,
      [&](const BFloat16Part& part, ParallelFor threads) { forward_in_bfloat16(params, part, isa, threads); },
      [&](const Rotation& rotation, float* workspace, const SequenceHeads& heads) {
        kernels.forward(params, rotation, workspace, heads);
      });
}

void rope_attention_backward(const RopeAttentionBackward& params, Isa isa, ParallelFor parallel_for) {
  // Keys that no query has seen are nobody's work.
  const AttentionShape& shape = params.shape;
  if (shape.offsets.data == nullptr && shape.tokens == 0) {
    const int64_t elements = shape.batch * shape.keys * shape.heads * shape.head_dim;
    const int64_t bytes = elements * (shape.dtype == DType::Float32 ? 4 : 2);
    for (void* gradient : {params.dk, params.dv}) std::memset(gradient, 0, bytes);
    return;
  }
  const RopeAttentionKernels& kernels = EVAKERNELS_OF_ISA(isa, rope_attention);
  attend(
      params, isa, parallel_for, kernels.backward_workspace,
      [&](const BFloat16Part& part, ParallelFor threads) {
        backward_in_bfloat16(params, part, isa, threads);
      },
      [&](const Rotation& rotation, float* workspace, const SequenceHeads& heads) {
        kernels.backward(params, rotation, workspace, heads);
      });
}

}  // namespace evakernels::cpu
