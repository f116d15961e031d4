#include "cpu/packed_attention.h"

#include <stdexcept>
#include <vector>

#include "cpu/bfloat16_attention.h"
#include "cpu/packed_attention_kernels.h"
#include "cpu/rotary_tables.h"
#include "cpu/rows.h"

namespace evakernels::cpu {
namespace {

// The sequences' heads, dealt out by the work that they are: sequences differ in length.
class Heads {
 public:
  explicit Heads(const AttentionShape& shape)
      : shape_(shape), firsts_(shape.batch + 1), work_(shape.batch + 1) {
    for (int64_t i = 0; i <= shape.batch; ++i) {
      const void* data = shape.offsets.data;
      firsts_[i] = shape.offsets.is_int64 ? static_cast<const int64_t*>(data)[i]
                                          : static_cast<const int32_t*>(data)[i];
      const bool fits = i == 0 ? firsts_[0] == 0 : firsts_[i] >= firsts_[i - 1];
      if (!fits) throw std::invalid_argument("cu_seqlens must rise from 0");
      if (i == 0) continue;
      longest_ = std::max(longest_, tokens(i - 1));
      work_[i] = work_[i - 1] + shape.heads * work_of_head(i - 1);
    }
    if (firsts_.back() != shape.offsets.tokens) {
      throw std::invalid_argument("cu_seqlens must end with the number of tokens");
    }
  }

  int64_t longest() const { return longest_; }

  // Calls visit(workspace, heads) for the heads of each sequence that are one thread's, with as many floats.
  template <class Visit>
  void share_out(ParallelFor parallel_for, int64_t floats, const Visit& visit) const {
    run_parallel(parallel_for, work_.back(), kElementsPerTask, [&](int64_t begin, int64_t end) {
      AlignedFloats workspace(floats);
      visit_work(begin, end, [&](const SequenceHeads& heads) { visit(workspace.data(), heads); });
    });
  }

 private:
  int64_t tokens(int64_t sequence) const { return firsts_[sequence + 1] - firsts_[sequence]; }
  int64_t work_of_head(int64_t sequence) const {
    return tokens(sequence) * (tokens(sequence) + shape_.head_dim);
  }

  // The heads whose work begins in [begin, end).
  template <class Visit>
  void visit_work(int64_t begin, int64_t end, const Visit& visit) const {
    const auto behind = std::upper_bound(work_.begin(), work_.end(), begin);
    for (int64_t i = behind - work_.begin() - 1; i < shape_.batch && work_[i] < end; ++i) {
      const int64_t work = work_of_head(i);
      if (work == 0) continue;
      const int64_t first = ceil_div(std::max<int64_t>(begin - work_[i], 0), work);
      const int64_t last = std::min(shape_.heads, ceil_div(end - work_[i], work));
      if (first < last) visit(SequenceHeads{firsts_[i], tokens(i), first, last});
    }
  }

  const AttentionShape& shape_;
  std::vector<int64_t> firsts_;  // tokens
  std::vector<int64_t> work_;    // of the sequences in front
  int64_t longest_ = 0;
};

// Heads that share keys, and rotated ones, go in float32: of a packed batch the products of bfloat16 know
// neither.
template <class Params>
bool is_bfloat16_product(const Params& params, Isa isa, const SequenceHeads& heads) {
  const AttentionShape& shape = params.shape;
  if (shape.kv_heads != shape.heads || params.tables.cos != nullptr) return false;
  return shape.dtype == DType::BFloat16 &&
         has_bfloat16_attention(isa, {heads.tokens, shape.heads, shape.head_dim});
}

AttentionOfHeads attention_of(const AttentionShape& shape, const SequenceHeads& heads) {
  const int64_t count = heads.end - heads.begin;
  return {
      .shape = {heads.tokens, count, shape.head_dim},
      .rotation = {},
      .count = count,
      .scale = shape.scale,
      .causal = shape.causal,
  };
}

// What a view of bfloat16 has of these heads.
HeadsView part_of(const HeadsView& view, const SequenceHeads& heads) {
  HeadsView part = view;
  part.data =
      static_cast<BFloat16*>(view.data) + heads.first * view.token_stride + heads.begin * view.head_stride;
  return part;
}

void forward_in_bfloat16(const RopeAttentionForward& params, const SequenceHeads& heads) {
  const AttentionShape& shape = params.shape;
  const BFloat16AttentionForward given = {
      .q = part_of(params.q, heads),
      .k = part_of(params.k, heads),
      .v = part_of(params.v, heads),
      .out = part_of(dense_heads(params.out, shape), heads),
      .lse = params.lse + heads.begin * shape.offsets.tokens + heads.first,
      .lse_stride = shape.offsets.tokens,
      .of = attention_of(shape, heads),
  };
  bfloat16_attention_forward(given, serial_for);
}

void backward_in_bfloat16(const RopeAttentionBackward& params, const SequenceHeads& heads) {
  const AttentionShape& shape = params.shape;
  const BFloat16AttentionBackward given = {
      .dout = part_of(params.dout, heads),
      .q = part_of(params.q, heads),
      .k = part_of(params.k, heads),
      .v = part_of(params.v, heads),
      .out = part_of(params.out, heads),
      .lse = params.lse + heads.begin * shape.offsets.tokens + heads.first,
      .lse_stride = shape.offsets.tokens,
      .dq = part_of(dense_heads(params.dq, shape), heads),
      .dk = part_of(dense_heads(params.dk, shape), heads),
      .dv = part_of(dense_heads(params.dv, shape), heads),
      .of = attention_of(shape, heads),
  };
  bfloat16_attention_backward(given, serial_for);
}

}  // namespace

void packed_attention_forward(const RopeAttentionForward& params, Isa isa, ParallelFor parallel_for) {
  const PackedAttentionKernels& kernels = EVAKERNELS_OF_ISA(isa, packed_attention);
  const Heads all(params.shape);
  const ElementTables tables(params.tables, params.shape);
  const Rotation rotation = tables.rotation(false);
  const int64_t floats = kernels.forward_workspace(all.longest(), params.shape.head_dim);
  all.share_out(parallel_for, floats, [&](float* workspace, const SequenceHeads& heads) {
    if (is_bfloat16_product(params, isa, heads)) return forward_in_bfloat16(params, heads);
    kernels.forward(params, rotation, workspace, heads);
  });
}

void packed_attention_backward(const RopeAttentionBackward& params, Isa isa, ParallelFor parallel_for) {
  const PackedAttentionKernels& kernels = EVAKERNELS_OF_ISA(isa, packed_attention);
  const Heads all(params.shape);
  const ElementTables tables(params.tables, params.shape);
  const Rotation rotation = tables.rotation(false);
  const int64_t floats = kernels.backward_workspace(all.longest(), params.shape.head_dim);
  all.share_out(parallel_for, floats, [&](float* workspace, const SequenceHeads& heads) {
    if (is_bfloat16_product(params, isa, heads)) return backward_in_bfloat16(params, heads);
    kernels.backward(params, rotation, workspace, heads);
  });
}

}  // namespace evakernels::cpu
