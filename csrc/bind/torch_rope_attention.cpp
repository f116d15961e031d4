// rope_attention as torch operators: torch's matrix products on a few heads at a time, and one pass over
// their scores.
//
// The scores of a chunk stay in the cache, and no rotated q or k exists as a whole. At these lengths that is
// faster than torch's flash attention. Two threads of a Zen 5, November 2026, forward and backward in ms
// (torch's rotation and flash attention; the same through torch.compile; this), medians of 10:
//
//   B, N, H, D            float32               bfloat16
//   16, 197, 12, 64        87 /  73 /  68        67 /  59 /  29
//    8, 257, 16, 64        65 /  60 /  51        69 /  62 /  33
//    8, 577, 16, 64       340 / 288 / 255       275 / 249 / 171
//    8, 257, 16, 112      131 / 123 / 101        99 /  93 /  44
//   16,  77,  8, 64        8.4 / 8.6 / 7.5      13.0 / 13.0 / 4.1    (causal, not rotated)
#include <algorithm>

#include "bind/attention_arguments.h"
#include "bind/torch_products.h"
#include "cpu/rope_attention.h"

namespace evakernels {
namespace {

// The scores of a chunk: 4 MiB in float32.
constexpr int64_t kChunkElements = int64_t{1} << 20;

// Smaller products than these gain nothing from being made of bfloat16.
constexpr int64_t kMinTokens = 32;
constexpr int64_t kMinHeadDim = 32;

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

// Heads [first, first + count) of all samples, packed, in the dtype of the products.
//
// Products of bfloat16 matrices are several times faster than those of float32 where the machine has them
// (Zen 5, one thread, 128 heads of 257 x 64: 1.4 ms against 10 ms). Their results are rounded to
// bfloat16, which the scores can't bear; so scores are computed twice, the second time less the rounded
// first, and the sum of both has 16 bits. The other products' results would be rounded anyway.
class Chunks {
 public:
  Chunks(const Tensor& q, const Tables& tables, bool causal, double scale)
      : tables_(tables),
        causal_(causal),
        scale_(static_cast<float>(scale)),
        dtype_(dtype_of(q, "q")),
        shape_{q.size(1), q.size(2), q.size(3)},
        heads_(q.size(0) * q.size(2)) {
    split_ = dtype_ == DType::BFloat16 && shape_.tokens >= kMinTokens && shape_.head_dim >= kMinHeadDim &&
             cpu::has_bfloat16_products(cpu::active_isa());
    const int64_t fitting = kChunkElements / std::max<int64_t>(1, shape_.tokens * shape_.tokens);
    const int64_t threads = torch::stable::get_num_threads();
    // Which heads share a chunk doesn't touch the result: products of a stack are independent of each other.
    chunk_ = std::max<int64_t>(1, std::min(heads_, std::max(fitting / threads, int64_t{1}) * threads));
    like_ = q;
  }

  int64_t tokens() const { return shape_.tokens; }
  int64_t heads() const { return heads_; }
  int64_t chunk() const { return chunk_; }
  bool is_split() const { return split_; }
  bool is_empty() const { return heads_ * shape_.tokens * shape_.head_dim == 0; }
  DType packed_dtype() const { return split_ ? DType::BFloat16 : DType::Float32; }

  Tensor new_vectors() const { return new_packed({chunk_, shape_.tokens, shape_.head_dim}); }
  Tensor new_scores() const { return new_packed({chunk_, shape_.tokens, shape_.tokens}); }
  // What rounding takes off scores; empty where they aren't rounded.
  Tensor new_rest() const { return new_packed({split_ ? chunk_ : 0, shape_.tokens, shape_.tokens}); }

  void pack(const Tensor& source, Tensor& packed, int64_t first, bool rotated, float factor) const {
    cpu::pack_heads(packing(source, packed, first, rotated, false, factor), cpu::active_isa(),
                    torch_parallel);
  }
  void unpack(const Tensor& packed, const Tensor& target, int64_t first, bool rotated, float factor) const {
    cpu::unpack_heads(packing(target, packed, first, rotated, true, factor), cpu::active_isa(),
                      torch_parallel);
  }

  // scores + rest = a @ b^T.
  void score(const Tensor& scores, const Tensor& rest, const Tensor& a, const Tensor& b) const {
    multiply_stacks_into(scores, a, transposed(b));
    if (split_) multiply_stacks_less(rest, a, transposed(b), scores);
  }

  void weigh(const Tensor& scores, const Tensor& rest, float* lse) const {
    const AttentionWeights params = {
        .scores = scores.mutable_data_ptr(),
        .scores_rest = split_ ? rest.const_data_ptr() : nullptr,
        .lse = lse,
        .rows = scores.size(0) * shape_.tokens,
        .tokens = shape_.tokens,
        .causal = causal_,
        .dtype = packed_dtype(),
    };
    cpu::attention_weights(params, cpu::active_isa(), torch_parallel);
  }

  void differentiate(const Tensor& scores, const Tensor& rest, const Tensor& gradients,
                     const Tensor& gradients_rest, const float* lse, const float* mean) const {
    const AttentionGradients params = {
        .scores = scores.mutable_data_ptr(),
        .scores_rest = split_ ? rest.const_data_ptr() : nullptr,
        .gradients = gradients.mutable_data_ptr(),
        .gradients_rest = split_ ? gradients_rest.const_data_ptr() : nullptr,
        .lse = lse,
        .mean = mean,
        .rows = scores.size(0) * shape_.tokens,
        .tokens = shape_.tokens,
        .causal = causal_,
        .dtype = packed_dtype(),
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
  Tensor new_packed(const std::vector<int64_t>& sizes) const {
    return new_tensor(like_, sizes, split_ ? ScalarType::BFloat16 : ScalarType::Float);
  }

  PackHeads packing(const Tensor& heads, const Tensor& packed, int64_t first, bool rotated, bool backwards,
                    float factor) const {
    return {
        .heads = view_of(heads),
        .packed = packed.mutable_data_ptr(),
        .shape = shape_,
        .rotation = rotated ? tables_.rotation(backwards) : Rotation{},
        .factor = factor,
        .first = first,
        .count = packed.size(0),
        .dtype = dtype_,
        .packed_dtype = packed_dtype(),
    };
  }

  const Tables& tables_;
  bool causal_;
  float scale_;
  DType dtype_;
  HeadsShape shape_;
  int64_t heads_;
  int64_t chunk_;
  bool split_;
  Tensor like_;
};

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
  if (chunks.is_empty()) return {out, lse};

  Tensor all[] = {chunks.new_vectors(), chunks.new_vectors(), chunks.new_vectors(), chunks.new_scores(),
                  chunks.new_rest()};
  for (int64_t first = 0; first < chunks.heads(); first += chunks.chunk()) {
    const int64_t count = std::min(chunks.chunk(), chunks.heads() - first);
    const auto part = [&](Tensor& tensor) { return torch::stable::narrow(tensor, 0, 0, count); };
    Tensor q_packed = part(all[0]), k_packed = part(all[1]), v_packed = part(all[2]);
    const Tensor scores = part(all[3]), rest = chunks.is_split() ? part(all[4]) : all[4];
    chunks.pack(q, q_packed, first, true, chunks.scale());
    chunks.pack(k, k_packed, first, true, 1.0f);
    chunks.pack(v, v_packed, first, false, 1.0f);
    chunks.score(scores, rest, q_packed, k_packed);
    chunks.weigh(scores, rest, static_cast<float*>(lse.mutable_data_ptr()) + first * chunks.tokens());
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
  if (chunks.is_empty()) return {dq, dk, dv};

  Tensor all[] = {chunks.new_vectors(), chunks.new_vectors(), chunks.new_vectors(),
                  chunks.new_vectors(), chunks.new_vectors(), chunks.new_scores(),
                  chunks.new_scores(),  chunks.new_rest(),    chunks.new_rest()};
  std::vector<float> mean(chunks.chunk() * chunks.tokens());
  for (int64_t first = 0; first < chunks.heads(); first += chunks.chunk()) {
    const int64_t count = std::min(chunks.chunk(), chunks.heads() - first);
    const auto part = [&](Tensor& tensor) { return torch::stable::narrow(tensor, 0, 0, count); };
    Tensor q_packed = part(all[0]), k_packed = part(all[1]), v_packed = part(all[2]),
           dout_packed = part(all[3]);
    const Tensor result = part(all[4]), scores = part(all[5]), gradients = part(all[6]);
    const Tensor rest = chunks.is_split() ? part(all[7]) : all[7];
    const Tensor gradients_rest = chunks.is_split() ? part(all[8]) : all[8];
    chunks.pack(q, q_packed, first, true, chunks.scale());
    chunks.pack(k, k_packed, first, true, 1.0f);
    chunks.pack(v, v_packed, first, false, 1.0f);
    chunks.pack(dout, dout_packed, first, false, 1.0f);
    // The mean of the weights' gradients is that of dout * out over the channels (Dao et al. 2022).
    chunks.dots(dout, out, mean.data(), first, count);
    chunks.score(scores, rest, q_packed, k_packed);
    chunks.score(gradients, gradients_rest, dout_packed, v_packed);
    chunks.differentiate(scores, rest, gradients, gradients_rest,
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
