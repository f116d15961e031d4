#include "include/rope_attention.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "cpu/bfloat16_attention_kernels.h"
#include "cpu/isa.h"
#include "cpu/rows.h"

namespace evakernels::cpu {
namespace {

// cos and sin expanded to one entry per element, see Rotation.
class ElementTables {
 public:
  ElementTables(const RotaryTables& tables, const AttentionShape& shape)
      : token_index_(tables.token_index),
        num_prefix_(shape.num_prefix),
        interleaved_(tables.interleaved),
        half_(shape.head_dim / 2) {
    if (tables.cos == nullptr) return;
    const std::vector<int64_t> rows = rows_in_use(tables, shape);
    const int64_t heads = tables.head_stride != 0 ? shape.heads : 1;
    if (heads > 1) head_stride_ = static_cast<int64_t>(rows.size()) * shape.head_dim;
    cos_ = expanded(tables.cos, tables, rows, heads, 1.0f);
    sin_ = expanded(tables.sin, tables, rows, heads, -1.0f);
  }
  ElementTables(const ElementTables&) = delete;

  Rotation rotation(bool backwards) const {
    return {
        .cos = cos_.empty() ? nullptr : cos_.data(),
        .sin = sin_.empty() ? nullptr : sin_.data(),
        .token_index = token_index_,
        .head_stride = head_stride_,
        .num_prefix = num_prefix_,
        .interleaved = interleaved_,
        .backwards = backwards,
    };
  }

 private:
  // Only the rows in use: tables may be far longer than a packed batch.
  std::vector<int64_t> rows_in_use(const RotaryTables& tables, const AttentionShape& shape) {
    const int64_t patches = shape.tokens - shape.num_prefix;
    const int64_t indices = shape.offsets.data != nullptr ? shape.offsets.tokens : shape.batch * patches;
    std::vector<int64_t> rows;
    if (token_index_ == nullptr || indices >= tables.rows) {
      rows.resize(token_index_ == nullptr ? std::min(patches, tables.rows) : tables.rows);
      std::iota(rows.begin(), rows.end(), 0);
      return rows;
    }
    own_index_.resize(indices);
    for (int64_t i = 0; i < indices; ++i) {
      own_index_[i] = token_index_[i] < 0 ? -1 : static_cast<int64_t>(rows.size());
      if (token_index_[i] >= 0) rows.push_back(token_index_[i]);
    }
    token_index_ = own_index_.data();
    return rows;
  }

  // first_sign: sign of a pair's first element.
  std::vector<float> expanded(const float* table, const RotaryTables& tables,
                              const std::vector<int64_t>& rows, int64_t heads, float first_sign) const {
    std::vector<float> target(heads * rows.size() * half_ * 2);
    float* to = target.data();
    for (int64_t head = 0; head < heads; ++head) {
      for (const int64_t row : rows) {
        const float* values = table + (head * tables.rows + row) * half_;
        for (int64_t pair = 0; pair < half_; ++pair) {
          const float value = values[pair];
          to[interleaved_ ? 2 * pair : pair] = first_sign * value;
          to[interleaved_ ? 2 * pair + 1 : pair + half_] = value;
        }
        to += half_ * 2;
      }
    }
    return target;
  }

  std::vector<float> cos_, sin_;
  std::vector<int64_t> own_index_;
  const int64_t* token_index_;
  int64_t head_stride_ = 0;
  int64_t num_prefix_;
  bool interleaved_;
  int64_t half_;
};

// --- bfloat16 attention, on CPUs with dot products of bfloat16 pairs ---

#ifdef EVAKERNELS_X86

const BFloat16AttentionKernels& bfloat16_kernels([[maybe_unused]] Isa isa) {
#ifdef EVAKERNELS_AMX
  if (isa == Isa::Amx) return amx::bfloat16_attention;
#endif
  return avx512_bf16::bfloat16_attention;
}

// Small shapes use float32: rounding the weights gains little there.
bool has_bfloat16_attention(Isa isa, const HeadsShape& shape) {
  constexpr int64_t kMinTokens = 32, kMinHeadDim = 32;
  return isa >= Isa::Avx512Bf16 && shape.tokens >= kMinTokens && shape.head_dim >= kMinHeadDim &&
         shape.head_dim <= kMaxAttentionHeadDim;
}

void bfloat16_forward(const BFloat16Attention& params, Isa isa, ParallelFor parallel_for) {
  const BFloat16AttentionKernels& kernels = bfloat16_kernels(isa);
  const HeadsShape& shape = params.shape;
  const int64_t rows = std::min(shape.tokens, kAttentionBlockRows);
  const int64_t tasks = params.count * ceil_div(shape.tokens, kAttentionBlockRows);
  run_parallel(parallel_for, tasks, tasks_grain(rows * (shape.tokens + shape.head_dim)),
               [&](int64_t begin, int64_t end) {
                 AlignedFloats workspace(kernels.forward_workspace(shape.tokens, shape.head_dim), 0.0f);
                 kernels.forward(params, workspace.data(), begin, end);
               });
}

void bfloat16_backward(const BFloat16Attention& params, Isa isa, ParallelFor parallel_for) {
  const BFloat16AttentionKernels& kernels = bfloat16_kernels(isa);
  const HeadsShape& shape = params.shape;
  const int64_t grain = tasks_grain(shape.tokens * (shape.tokens + shape.head_dim));
  run_parallel(parallel_for, params.count, grain, [&](int64_t begin, int64_t end) {
    AlignedFloats workspace(kernels.backward_workspace(shape.tokens, shape.head_dim), 0.0f);
    kernels.backward(params, workspace.data(), begin, end);
  });
}

#else

bool has_bfloat16_attention(Isa, const HeadsShape&) { return false; }
void bfloat16_forward(const BFloat16Attention&, Isa, ParallelFor) {}
void bfloat16_backward(const BFloat16Attention&, Isa, ParallelFor) {}

#endif

// --- the op ---

// The heads of all samples or sequences, distributed over threads by their work, as sequences differ in
// length.
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

  // Calls visit(workspace, heads) for each thread's heads of a sample or sequence, with a workspace of
  // `floats`.
  template <class Visit>
  void distribute(ParallelFor parallel_for, int64_t floats, const Visit& visit) const {
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

  // Visits the heads with work that begins in [begin, end).
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
  std::vector<int64_t> firsts_;  // first tokens of packed sequences
  std::vector<int64_t> work_;    // of the preceding samples
  int64_t most_keys_ = 0;
};

// Grouped-query heads, other numbers of keys than queries, and rotated heads of packed batches use float32.
template <class Params>
bool is_bfloat16_product(const Params& params, Isa isa, const SequenceHeads& heads) {
  const AttentionShape& shape = params.shape;
  if (shape.kv_heads != shape.heads || heads.keys != heads.tokens) return false;
  if (shape.offsets.data != nullptr && params.tables.cos != nullptr) return false;
  return shape.dtype == DType::BFloat16 &&
         has_bfloat16_attention(isa, {heads.tokens, shape.heads, shape.head_dim});
}

// The bfloat16 call for `heads` of each of `samples`.
template <class Params>
BFloat16Attention bfloat16_params(const Params& params, const SequenceHeads& heads, int64_t samples,
                                  const Rotation& rotation) {
  const AttentionShape& shape = params.shape;
  const auto part_of = [&](HeadsView view) {
    view.data =
        static_cast<BFloat16*>(view.data) + heads.first * view.token_stride + heads.begin * view.head_stride;
    return view;
  };
  const auto dense = [&](void* data) { return part_of(dense_heads(data, shape, heads.tokens)); };
  BFloat16Attention part = {
      .q = part_of(params.q),
      .k = part_of(params.k),
      .v = part_of(params.v),
      .out = {},
      .lse = const_cast<float*>(lse_of_head(params.lse, shape, heads, heads.begin)),
      .lse_stride = lse_stride(shape),
      .dout = {},
      .dq = {},
      .dk = {},
      .dv = {},
      .shape = {heads.tokens, heads.end - heads.begin, shape.head_dim},
      .rotation = rotation,
      .count = samples * (heads.end - heads.begin),
      .scale = shape.scale,
      .causal = shape.causal,
  };
  if constexpr (std::is_same_v<Params, RopeAttentionForward>) {
    part.out = dense(params.out);
  } else {
    part.out = part_of(params.out);
    part.dout = part_of(params.dout);
    part.dq = dense(params.dq);
    part.dk = dense(params.dk);
    part.dv = dense(params.dv);
  }
  return part;
}

// Calls in_bfloat16(params, parallel_for) or in_float32(rotation, workspace, heads) for all heads. workspace:
// size of the float32 kernels' workspace for a number of keys.
template <class Params, class InBFloat16, class InFloat32>
void attend(const Params& params, Isa isa, ParallelFor parallel_for, int64_t (*workspace)(int64_t, int64_t),
            const InBFloat16& in_bfloat16, const InFloat32& in_float32) {
  const AttentionShape& shape = params.shape;
  const Heads all(shape);
  const ElementTables tables(params.tables, shape);
  const Rotation rotation = tables.rotation(false);
  // Samples have equal lengths, so that a head can be split over threads.
  const SequenceHeads sample = {0, 0, shape.tokens, shape.keys, 0, shape.heads};
  if (shape.offsets.data == nullptr && is_bfloat16_product(params, isa, sample)) {
    return in_bfloat16(bfloat16_params(params, sample, shape.batch, rotation), isa, parallel_for);
  }
  const int64_t floats = workspace(all.most_keys(), shape.head_dim);
  all.distribute(parallel_for, floats, [&](float* memory, const SequenceHeads& heads) {
    if (is_bfloat16_product(params, isa, heads)) {
      return in_bfloat16(bfloat16_params(params, heads, 1, {}), isa, serial_for);
    }
    in_float32(rotation, memory, heads);
  });
}

}  // namespace

void rope_attention_forward(const RopeAttentionForward& params, Isa isa, ParallelFor parallel_for) {
  const RopeAttentionKernels& kernels = EVAKERNELS_OF_ISA(isa, rope_attention);
  attend(params, isa, parallel_for, kernels.forward_workspace, bfloat16_forward,
         [&](const Rotation& rotation, float* workspace, const SequenceHeads& heads) {
           kernels.forward(params, rotation, workspace, heads);
         });
}

void rope_attention_backward(const RopeAttentionBackward& params, Isa isa, ParallelFor parallel_for) {
  // Without queries dk and dv are zero.
  const AttentionShape& shape = params.shape;
  if (shape.offsets.data == nullptr && shape.tokens == 0) {
    const int64_t elements = shape.batch * shape.keys * shape.heads * shape.head_dim;
    const int64_t bytes = elements * (shape.dtype == DType::Float32 ? 4 : 2);
    for (void* gradient : {params.dk, params.dv}) std::memset(gradient, 0, bytes);
    return;
  }
  const RopeAttentionKernels& kernels = EVAKERNELS_OF_ISA(isa, rope_attention);
  attend(params, isa, parallel_for, kernels.backward_workspace, bfloat16_backward,
         [&](const Rotation& rotation, float* workspace, const SequenceHeads& heads) {
           kernels.backward(params, rotation, workspace, heads);
         });
}

}  // namespace evakernels::cpu
