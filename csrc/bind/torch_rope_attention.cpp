// rope_attention as torch operators. In bfloat16, where the machine has products of it: the kernels of
// cpu/bfloat16_attention.h. Else: torch's matrix products on a few heads at a time, in float32, and one pass
// over their scores, which stay in the cache.
//
// No rotated q or k exists as a whole. Two threads of a Zen 5, November 2026, forward and backward in ms,
// medians. float32: torch's rotation and flash attention; the same through torch.compile; this. bfloat16:
// torch's; its products of bfloat16 with the scores computed twice, as their results are rounded; this.
//
//   B, N, H, D            float32               bfloat16
//   16, 197, 12, 64        87 /  73 /  68        64 /  25 / 12.9
//   16,  99, 12, 64                              30 / 8.8 /  3.7
//    8, 257, 16, 64        65 /  60 /  51        65 /  26 / 13.8
//    8, 577, 16, 64       340 / 288 / 255       294 / 122 /  62
//    8, 257, 16, 88                              84 /  36 / 19.8
//    8, 257, 16, 112      131 / 123 / 101       102 /  39 /  23
//    8, 257, 16, 128                            134 /  43 /  26
//   16,  77,  8, 64        8.4 / 8.6 / 7.5      11.6 / 3.3 /  1.2    (causal, not rotated)
#include <algorithm>

#include "bind/attention_arguments.h"
#include "bind/torch_products.h"
#include "cpu/bfloat16_attention.h"
#include "cpu/rope_attention.h"

namespace evakernels {
namespace {

// The scores of a chunk: 4 MiB in float32.
constexpr int64_t kChunkElements = int64_t{1} << 20;

HeadsShape shape_of(const Tensor& heads) { return {heads.size(1), heads.size(2), heads.size(3)}; }

// cos and sin with one entry for each element, see Rotation.
class Tables {
 public:
  Tables(const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
         const std::optional<Tensor>& token_index, int64_t head_dim, int64_t num_prefix, bool interleaved)
      : num_prefix_(num_prefix), interleaved_(interleaved) {
    require_tables(cos, sin);
    if (!cos) return;
    const bool compact = is_compact(*cos, head_dim);
    require(compact ? cos->size(0) == 2 : cos->size(-1) == head_dim / 2,
            "cos must have an entry for each pair");
    head_stride_ = cos->dim() == 3 && !compact ? cos->size(1) * head_dim : 0;
    cos_ = expanded(*cos, compact, 1.0f);
    sin_ = expanded(*sin, compact, -1.0f);
    if (token_index) token_index_ = as_contiguous(*token_index);
  }

  Rotation rotation(bool backwards) const {
    return {
        .cos = cos_.empty() ? nullptr : cos_.data(),
        .sin = sin_.empty() ? nullptr : sin_.data(),
        .token_index = token_index_ ? static_cast<const int64_t*>(token_index_->const_data_ptr()) : nullptr,
        .head_stride = head_stride_,
        .num_prefix = num_prefix_,
        .interleaved = interleaved_,
        .backwards = backwards,
    };
  }

 private:
  // first_sign: that of the first element of a pair.
  std::vector<float> expanded(const Tensor& table, bool compact, float first_sign) const {
    const Tensor dense = as_contiguous(torch::stable::to(table, ScalarType::Float));
    const auto* source = static_cast<const float*>(dense.const_data_ptr());
    const int64_t width = table.size(-1), grid = table.size(-2);
    const int64_t half = compact ? 2 * width : width;
    const int64_t entries = compact ? grid * grid : table.numel() / std::max<int64_t>(width, 1);
    std::vector<float> target(entries * half * 2);
    for (int64_t entry = 0; entry < entries; ++entry) {
      // A compact table has the pairs of a patch's row, then those of its column.
      const float* first = source + (compact ? entry / grid : entry) * width;
      const float* second = source + (grid + entry % grid) * width - width;
      float* row = target.data() + entry * half * 2;
      for (int64_t pair = 0; pair < half; ++pair) {
        const float value = pair < width ? first[pair] : second[pair];
        row[interleaved_ ? 2 * pair : pair] = first_sign * value;
        row[interleaved_ ? 2 * pair + 1 : pair + half] = value;
      }
    }
    return target;
  }

  std::vector<float> cos_, sin_;
  std::optional<Tensor> token_index_;
  int64_t head_stride_ = 0;
  int64_t num_prefix_;
  bool interleaved_;
};

// Heads [first, first + count) of all samples, packed, in float32.
class Chunks {
 public:
  Chunks(const Tensor& q, const Tables& tables, bool causal, double scale)
      : tables_(tables),
        causal_(causal),
        scale_(static_cast<float>(scale)),
        dtype_(dtype_of(q, "q")),
        shape_(shape_of(q)),
        heads_(q.size(0) * q.size(2)) {
    const int64_t fitting = kChunkElements / std::max<int64_t>(1, shape_.tokens * shape_.tokens);
    const int64_t threads = torch::stable::get_num_threads();
    // Which heads share a chunk doesn't touch the result: products of a stack are independent of each other.
    chunk_ = std::max<int64_t>(1, std::min(heads_, std::max(fitting / threads, int64_t{1}) * threads));
    like_ = q;
  }

  int64_t tokens() const { return shape_.tokens; }
  int64_t heads() const { return heads_; }
  int64_t chunk() const { return chunk_; }

  Tensor new_vectors() const { return new_float32(like_, {chunk_, shape_.tokens, shape_.head_dim}); }
  Tensor new_scores() const { return new_float32(like_, {chunk_, shape_.tokens, shape_.tokens}); }

  void pack(const Tensor& source, Tensor& packed, int64_t first, bool rotated, float factor) const {
    cpu::pack_heads(packing(source, packed, first, rotated, false, factor), cpu::active_isa(),
                    torch_parallel);
  }
  void unpack(const Tensor& packed, const Tensor& target, int64_t first, bool rotated, float factor) const {
    cpu::unpack_heads(packing(target, packed, first, rotated, true, factor), cpu::active_isa(),
                      torch_parallel);
  }

  void weigh(const Tensor& scores, float* lse) const {
    const AttentionWeights params = {
        .scores = floats(scores),
        .lse = lse,
        .rows = scores.size(0) * shape_.tokens,
        .tokens = shape_.tokens,
        .causal = causal_,
    };
    cpu::attention_weights(params, cpu::active_isa(), torch_parallel);
  }

  void differentiate(const Tensor& scores, const Tensor& gradients, const float* lse,
                     const float* mean) const {
    const AttentionGradients params = {
        .scores = floats(scores),
        .gradients = floats(gradients),
        .lse = lse,
        .mean = mean,
        .rows = scores.size(0) * shape_.tokens,
        .tokens = shape_.tokens,
        .causal = causal_,
    };
    cpu::attention_gradients(params, cpu::active_isa(), torch_parallel);
  }

  void dots(const Tensor& a, const Tensor& b, float* products, int64_t first, int64_t count) const {
    const HeadDots params = {
        .a = view_of(a),
        .b = view_of(b),
        .products = products,
        .shape = shape_,
        .first = first,
        .count = count,
        .dtype = dtype_,
    };
    cpu::head_dots(params, cpu::active_isa(), torch_parallel);
  }

  float scale() const { return scale_; }

 private:
  static float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

  PackHeads packing(const Tensor& heads, const Tensor& packed, int64_t first, bool rotated, bool backwards,
                    float factor) const {
    return {
        .heads = view_of(heads),
        .packed = floats(packed),
        .shape = shape_,
        .rotation = rotated ? tables_.rotation(backwards) : Rotation{},
        .factor = factor,
        .first = first,
        .count = packed.size(0),
        .dtype = dtype_,
    };
  }

  const Tables& tables_;
  bool causal_;
  float scale_;
  DType dtype_;
  HeadsShape shape_;
  int64_t heads_;
  int64_t chunk_;
  Tensor like_;
};

bool serves_bfloat16(const Tensor& q) {
  return q.scalar_type() == ScalarType::BFloat16 &&
         cpu::has_bfloat16_attention(cpu::active_isa(), shape_of(q));
}

AttentionOfHeads heads_of(const Tensor& q, const Tables& tables, bool causal, double scale) {
  return {
      .shape = shape_of(q),
      .rotation = tables.rotation(false),
      .count = q.size(0) * q.size(2),
      .scale = static_cast<float>(scale),
      .causal = causal,
  };
}

std::tuple<Tensor, Tensor> rope_attention_forward(const Tensor& q_any, const Tensor& k_any,
                                                  const Tensor& v_any, std::optional<Tensor> cos,
                                                  std::optional<Tensor> sin,
                                                  std::optional<Tensor> token_index, int64_t num_prefix,
                                                  bool causal, bool interleaved, double scale) {
  require_heads(q_any, k_any, v_any);
  const Tensor q = with_dense_vectors(q_any), k = with_dense_vectors(k_any), v = with_dense_vectors(v_any);
  const Tables tables(cos, sin, token_index, q.size(3), num_prefix, interleaved);
  const Chunks chunks(q, tables, causal, scale);
  const Tensor out = new_tensor(q, q.sizes());
  const Tensor lse = new_float32(q, {q.size(0), q.size(2), q.size(1)});
  if (q.numel() == 0) return {out, lse};
  if (serves_bfloat16(q)) {
    const BFloat16AttentionForward params = {
        .q = view_of(q),
        .k = view_of(k),
        .v = view_of(v),
        .out = view_of(out),
        .lse = static_cast<float*>(lse.mutable_data_ptr()),
        .lse_stride = q.size(1),
        .of = heads_of(q, tables, causal, scale),
    };
    cpu::bfloat16_attention_forward(params, torch_parallel);
    return {out, lse};
  }

  Tensor all[] = {chunks.new_vectors(), chunks.new_vectors(), chunks.new_vectors(), chunks.new_scores()};
  for (int64_t first = 0; first < chunks.heads(); first += chunks.chunk()) {
    const int64_t count = std::min(chunks.chunk(), chunks.heads() - first);
    const auto part = [&](Tensor& tensor) { return torch::stable::narrow(tensor, 0, 0, count); };
    Tensor q_packed = part(all[0]), k_packed = part(all[1]), v_packed = part(all[2]);
    const Tensor scores = part(all[3]);
    chunks.pack(q, q_packed, first, true, chunks.scale());
    chunks.pack(k, k_packed, first, true, 1.0f);
    chunks.pack(v, v_packed, first, false, 1.0f);
    multiply_stacks_into(scores, q_packed, transposed(k_packed));
    chunks.weigh(scores, static_cast<float*>(lse.mutable_data_ptr()) + first * chunks.tokens());
    multiply_stacks_into(q_packed, scores, v_packed);
    chunks.unpack(q_packed, out, first, false, 1.0f);
  }
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> rope_attention_backward(
    const Tensor& dout_any, const Tensor& q_any, const Tensor& k_any, const Tensor& v_any,
    const Tensor& out_any, const Tensor& lse_any, std::optional<Tensor> cos, std::optional<Tensor> sin,
    std::optional<Tensor> token_index, int64_t num_prefix, bool causal, bool interleaved, double scale) {
  require_heads(q_any, k_any, v_any);
  require_results(q_any, dout_any, out_any, lse_any);
  const Tensor q = with_dense_vectors(q_any), k = with_dense_vectors(k_any), v = with_dense_vectors(v_any);
  const Tensor dout = with_dense_vectors(dout_any), out = with_dense_vectors(out_any);
  const Tensor lse = as_contiguous(lse_any);
  const Tables tables(cos, sin, token_index, q.size(3), num_prefix, interleaved);
  const Chunks chunks(q, tables, causal, scale);
  const Tensor dq = new_tensor(q, q.sizes());
  const Tensor dk = new_tensor(q, q.sizes());
  const Tensor dv = new_tensor(q, q.sizes());
  if (q.numel() == 0) return {dq, dk, dv};
  if (serves_bfloat16(q)) {
    const BFloat16AttentionBackward params = {
        .dout = view_of(dout),
        .q = view_of(q),
        .k = view_of(k),
        .v = view_of(v),
        .out = view_of(out),
        .lse = static_cast<const float*>(lse.const_data_ptr()),
        .lse_stride = q.size(1),
        .dq = view_of(dq),
        .dk = view_of(dk),
        .dv = view_of(dv),
        .of = heads_of(q, tables, causal, scale),
    };
    cpu::bfloat16_attention_backward(params, torch_parallel);
    return {dq, dk, dv};
  }

  Tensor all[] = {chunks.new_vectors(), chunks.new_vectors(), chunks.new_vectors(), chunks.new_vectors(),
                  chunks.new_vectors(), chunks.new_scores(),  chunks.new_scores()};
  std::vector<float> mean(chunks.chunk() * chunks.tokens());
  for (int64_t first = 0; first < chunks.heads(); first += chunks.chunk()) {
    const int64_t count = std::min(chunks.chunk(), chunks.heads() - first);
    const auto part = [&](Tensor& tensor) { return torch::stable::narrow(tensor, 0, 0, count); };
    Tensor q_packed = part(all[0]), k_packed = part(all[1]), v_packed = part(all[2]),
           dout_packed = part(all[3]);
    const Tensor result = part(all[4]), scores = part(all[5]), gradients = part(all[6]);
    chunks.pack(q, q_packed, first, true, chunks.scale());
    chunks.pack(k, k_packed, first, true, 1.0f);
    chunks.pack(v, v_packed, first, false, 1.0f);
    chunks.pack(dout, dout_packed, first, false, 1.0f);
    // The mean of the weights' gradients is that of dout * out over the channels (Dao et al. 2022).
    chunks.dots(dout, out, mean.data(), first, count);
    multiply_stacks_into(scores, q_packed, transposed(k_packed));
    multiply_stacks_into(gradients, dout_packed, transposed(v_packed));
    chunks.differentiate(scores, gradients,
                         static_cast<const float*>(lse.const_data_ptr()) + first * chunks.tokens(),
                         mean.data());
    multiply_stacks_into(result, transposed(scores), dout_packed);
    chunks.unpack(result, dv, first, false, 1.0f);
    multiply_stacks_into(result, transposed(gradients), q_packed);  // q_packed has the scale
    chunks.unpack(result, dk, first, true, 1.0f);
    multiply_stacks_into(result, gradients, k_packed);
    chunks.unpack(result, dq, first, true, chunks.scale());
  }
  return {dq, dk, dv};
}

}  // namespace
}  // namespace evakernels

STABLE_TORCH_LIBRARY_IMPL(evakernels_native, CPU, m) {
  m.impl("rope_attention_forward", TORCH_BOX(&evakernels::rope_attention_forward));
  m.impl("rope_attention_backward", TORCH_BOX(&evakernels::rope_attention_backward));
}
