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
#include <cstring>
#include <limits>

#include "bind/attention_arguments.h"
#include "bind/torch_products.h"
#include "cpu/bfloat16_attention.h"
#include "cpu/rope_attention.h"
#include "cpu/rotary_tables.h"

namespace evakernels {
namespace {

// The scores of a chunk: 4 MiB in float32.
constexpr int64_t kChunkElements = int64_t{1} << 20;

// Heads [first, first + count) of all samples, packed, in float32.
class Chunks {
 public:
  Chunks(const Tensor& q, const cpu::ElementTables& tables, const AttentionShape& shape)
      : tables_(tables),
        shape_(shape),
        queries_{shape.tokens, shape.heads, shape.head_dim},
        keys_{shape.keys, shape.heads, shape.head_dim},
        group_(shape.heads / shape.kv_heads),
        heads_(shape.batch * shape.heads) {
    const int64_t vectors = (shape.tokens + shape.keys) * shape.head_dim;  // more than scores of few queries
    const int64_t fitting = kChunkElements / std::max({int64_t{1}, shape.tokens * shape.keys, vectors});
    const int64_t threads = torch::stable::get_num_threads();
    // Which heads share a chunk doesn't touch the result: products of a stack are independent of each other.
    chunk_ = std::max<int64_t>(1, std::min(heads_, std::max(fitting / threads, int64_t{1}) * threads));
    like_ = q;
  }

  int64_t tokens() const { return shape_.tokens; }
  int64_t heads() const { return heads_; }
  int64_t chunk() const { return chunk_; }
  float scale() const { return shape_.scale; }

  Tensor new_queries() const { return new_float32(like_, {chunk_, shape_.tokens, shape_.head_dim}); }
  Tensor new_keys() const { return new_float32(like_, {chunk_, shape_.keys, shape_.head_dim}); }
  Tensor new_scores() const { return new_float32(like_, {chunk_, shape_.tokens, shape_.keys}); }

  // Of k and v: a head of theirs for each of the queries that use it.
  void pack_keys(const Tensor& source, const Tensor& packed, int64_t first, bool rotated) const {
    pack({view_of(source), floats(packed), keys_, group_, rotation(rotated, false), 1.0f, first,
          packed.size(0), shape_.dtype});
  }
  void pack_queries(const Tensor& source, const Tensor& packed, int64_t first, bool rotated,
                    float factor) const {
    pack({view_of(source), floats(packed), queries_, 1, rotation(rotated, false), factor, first,
          packed.size(0), shape_.dtype});
  }
  void unpack_keys(const Tensor& packed, const Tensor& target, int64_t first, bool rotated) const {
    unpack({view_of(target), floats(packed), keys_, 1, rotation(rotated, true), 1.0f, first, packed.size(0),
            shape_.dtype});
  }
  void unpack_queries(const Tensor& packed, const Tensor& target, int64_t first, bool rotated,
                      float factor) const {
    unpack({view_of(target), floats(packed), queries_, 1, rotation(rotated, true), factor, first,
            packed.size(0), shape_.dtype});
  }

  void weigh(const Tensor& scores, float* lse) const {
    const AttentionWeights params = {
        .scores = floats(scores),
        .lse = lse,
        .rows = scores.size(0) * shape_.tokens,
        .queries = shape_.tokens,
        .keys = shape_.keys,
        .causal = shape_.causal,
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
        .queries = shape_.tokens,
        .keys = shape_.keys,
        .causal = shape_.causal,
    };
    cpu::attention_gradients(params, cpu::active_isa(), torch_parallel);
  }

  void dots(const Tensor& a, const Tensor& b, float* products, int64_t first, int64_t count) const {
    const HeadDots params = {
        .a = view_of(a),
        .b = view_of(b),
        .products = products,
        .shape = queries_,
        .first = first,
        .count = count,
        .dtype = shape_.dtype,
    };
    cpu::head_dots(params, cpu::active_isa(), torch_parallel);
  }

 private:
  static float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }
  static void pack(const PackHeads& params) { cpu::pack_heads(params, cpu::active_isa(), torch_parallel); }
  static void unpack(const PackHeads& params) {
    cpu::unpack_heads(params, cpu::active_isa(), torch_parallel);
  }

  Rotation rotation(bool rotated, bool backwards) const {
    return rotated ? tables_.rotation(backwards) : Rotation{};
  }

  const cpu::ElementTables& tables_;
  AttentionShape shape_;
  HeadsShape queries_, keys_;
  int64_t group_;
  int64_t heads_;
  int64_t chunk_;
  Tensor like_;
};

// Heads of keys that several share, and another number of keys than of queries, go in float32.
bool serves_bfloat16(const AttentionShape& shape) {
  return shape.dtype == DType::BFloat16 && shape.keys == shape.tokens && shape.kv_heads == shape.heads &&
         cpu::has_bfloat16_attention(cpu::active_isa(), {shape.tokens, shape.heads, shape.head_dim});
}

AttentionOfHeads heads_of(const AttentionShape& shape, const cpu::ElementTables& tables) {
  return {
      .shape = {shape.tokens, shape.heads, shape.head_dim},
      .rotation = tables.rotation(false),
      .count = shape.batch * shape.heads,
      .scale = shape.scale,
      .causal = shape.causal,
  };
}

void clear(const Tensor& tensor) {
  std::memset(tensor.mutable_data_ptr(), 0, tensor.numel() * tensor.element_size());
}

std::tuple<Tensor, Tensor> rope_attention_forward(const Tensor& q_any, const Tensor& k_any,
                                                  const Tensor& v_any, std::optional<Tensor> cos,
                                                  std::optional<Tensor> sin,
                                                  std::optional<Tensor> token_index, int64_t num_prefix,
                                                  bool causal, bool interleaved, double scale) {
  require_heads(q_any, k_any, v_any);
  const Tensor q = with_dense_vectors(q_any), k = with_dense_vectors(k_any), v = with_dense_vectors(v_any);
  const AttentionShape shape = shape_of(q, k, num_prefix, causal, scale);
  const Tables given(cos, sin, token_index, q, k, interleaved);
  const Tensor out = new_tensor(q, q.sizes());
  const Tensor lse = new_float32(q, {q.size(0), q.size(2), q.size(1)});
  if (q.numel() == 0) return {out, lse};
  if (k.numel() == 0) {
    clear(out);
    std::fill_n(static_cast<float*>(lse.mutable_data_ptr()), lse.numel(),
                -std::numeric_limits<float>::infinity());
    return {out, lse};
  }
  const cpu::ElementTables tables(given.tables(), shape);
  if (serves_bfloat16(shape)) {
    const BFloat16AttentionForward params = {
        .q = view_of(q),
        .k = view_of(k),
        .v = view_of(v),
        .out = view_of(out),
        .lse = static_cast<float*>(lse.mutable_data_ptr()),
        .lse_stride = q.size(1),
        .of = heads_of(shape, tables),
    };
    cpu::bfloat16_attention_forward(params, torch_parallel);
    return {out, lse};
  }

  const Chunks chunks(q, tables, shape);
  Tensor all[] = {chunks.new_queries(), chunks.new_keys(), chunks.new_keys(), chunks.new_scores()};
  for (int64_t first = 0; first < chunks.heads(); first += chunks.chunk()) {
    const int64_t count = std::min(chunks.chunk(), chunks.heads() - first);
    const auto part = [&](Tensor& tensor) { return torch::stable::narrow(tensor, 0, 0, count); };
    Tensor q_packed = part(all[0]), k_packed = part(all[1]), v_packed = part(all[2]);
    const Tensor scores = part(all[3]);
    chunks.pack_queries(q, q_packed, first, true, chunks.scale());
    chunks.pack_keys(k, k_packed, first, true);
    chunks.pack_keys(v, v_packed, first, false);
    multiply_stacks_into(scores, q_packed, transposed(k_packed));
    chunks.weigh(scores, static_cast<float*>(lse.mutable_data_ptr()) + first * chunks.tokens());
    multiply_stacks_into(q_packed, scores, v_packed);
    chunks.unpack_queries(q_packed, out, first, false, 1.0f);
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
  const AttentionShape shape = shape_of(q, k, num_prefix, causal, scale);
  const Tables given(cos, sin, token_index, q, k, interleaved);
  const Tensor dq = new_tensor(q, q.sizes());
  const Tensor dk = new_tensor(q, sizes_of_gradients(q, k));
  const Tensor dv = new_tensor(q, sizes_of_gradients(q, k));
  if (q.numel() == 0 || k.numel() == 0) {
    for (const Tensor& gradient : {dq, dk, dv}) clear(gradient);
    return {dq, dk, dv};
  }
  const cpu::ElementTables tables(given.tables(), shape);
  if (serves_bfloat16(shape)) {
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
        .of = heads_of(shape, tables),
    };
    cpu::bfloat16_attention_backward(params, torch_parallel);
    return {dq, dk, dv};
  }

  const Chunks chunks(q, tables, shape);
  Tensor all[] = {chunks.new_queries(), chunks.new_keys(),   chunks.new_keys(),  chunks.new_queries(),
                  chunks.new_keys(),    chunks.new_scores(), chunks.new_scores()};
  std::vector<float> mean(chunks.chunk() * chunks.tokens());
  for (int64_t first = 0; first < chunks.heads(); first += chunks.chunk()) {
    const int64_t count = std::min(chunks.chunk(), chunks.heads() - first);
    const auto part = [&](Tensor& tensor) { return torch::stable::narrow(tensor, 0, 0, count); };
    Tensor q_packed = part(all[0]), k_packed = part(all[1]), v_packed = part(all[2]),
           dout_packed = part(all[3]);
    const Tensor result = part(all[4]), scores = part(all[5]), gradients = part(all[6]);
    chunks.pack_queries(q, q_packed, first, true, chunks.scale());
    chunks.pack_keys(k, k_packed, first, true);
    chunks.pack_keys(v, v_packed, first, false);
    chunks.pack_queries(dout, dout_packed, first, false, 1.0f);
    // The mean of the weights' gradients is that of dout * out over the channels (Dao et al. 2022).
    chunks.dots(dout, out, mean.data(), first, count);
    multiply_stacks_into(scores, q_packed, transposed(k_packed));
    multiply_stacks_into(gradients, dout_packed, transposed(v_packed));
    chunks.differentiate(scores, gradients,
                         static_cast<const float*>(lse.const_data_ptr()) + first * chunks.tokens(),
                         mean.data());
    multiply_stacks_into(result, transposed(scores), dout_packed);
    chunks.unpack_keys(result, dv, first, false);
    multiply_stacks_into(result, transposed(gradients), q_packed);  // q_packed has the scale
    chunks.unpack_keys(result, dk, first, true);
    multiply_stacks_into(dout_packed, gradients, k_packed);
    chunks.unpack_queries(dout_packed, dq, first, true, chunks.scale());
  }
  return {dq, dk, dv};
}

}  // namespace
}  // namespace evakernels

STABLE_TORCH_LIBRARY_IMPL(evakernels_native, CPU, m) {
  m.impl("rope_attention_forward", TORCH_BOX(&evakernels::rope_attention_forward));
  m.impl("rope_attention_backward", TORCH_BOX(&evakernels::rope_attention_backward));
}
