// The launchers of attention on arrays, of samples and of packed sequences.
#include <algorithm>
#include <array>

#include "bind/python_launch.h"
#include "cpu/rope_attention.h"
#include "cuda/rope_attention.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace evakernels {
namespace {

// Arguments that forward and backward have in common.
struct Options {
  py::object cos, sin, token_index, cu_seqlens;
  int64_t num_prefix, max_seqlen;
  bool causal, interleaved;
  double scale;
  IsaName isa;
};

bool is_packed(const Array& q) { return q.sizes.size() == 3; }

HeadsView view_of(const Array& heads) {
  const size_t axes = heads.sizes.size();
  require(axes == 3 || axes == 4, std::string(heads.name) + " must be [B, N, H, D] or [T, H, D]");
  require(heads.strides[axes - 1] == 1, std::string(heads.name) + " must have dense vectors");
  return {.data = heads.data,
          .batch_stride = axes == 4 ? heads.strides[0] : 0,
          .token_stride = heads.strides[axes - 3],
          .head_stride = heads.strides[axes - 2]};
}

HeadsView view_like(const Array& heads, const Array& q) {
  require_like(heads, q);
  return view_of(heads);
}

void require_keys(const Array& q, const Array& k, const Array& v) {
  require_like(v, k);
  require_dtype(k, q.dtype);
  const size_t axes = q.sizes.size();
  require(k.sizes.size() == axes && k.sizes[0] == q.sizes[0] && k.sizes.back() == q.sizes.back(),
          "k must have as many samples and channels as q");
  const int64_t heads = q.sizes[axes - 2], kv_heads = k.sizes[axes - 2];
  require(kv_heads > 0 ? heads % kv_heads == 0 : heads == 0, "q's heads must be a multiple of k's");
}

AttentionShape shape_of(Arrays& arrays, const Array& q, const Array& k, const Options& options) {
  const size_t axes = q.sizes.size();
  AttentionShape shape = {
      .batch = q.sizes[0],
      .tokens = q.sizes[axes - 3],
      .keys = k.sizes[axes - 3],
      .heads = q.sizes[axes - 2],
      .kv_heads = k.sizes[axes - 2],
      .head_dim = q.sizes[axes - 1],
      .num_prefix = options.num_prefix,
      .scale = static_cast<float>(options.scale),
      .causal = options.causal,
      .dtype = q.dtype,
      .offsets = {},
  };
  require(options.num_prefix >= 0 && options.num_prefix <= 16 && options.num_prefix <= shape.tokens,
          "num_prefix must be from 0 to 16, and no more than there are tokens");
  const Array offsets = arrays.read_index_if(options.cu_seqlens, "cu_seqlens");
  require(bool(offsets) == is_packed(q), "cu_seqlens are for q [T, H, D], and needed there");
  if (offsets) {
    require(offsets.sizes.size() == 1 && offsets.sizes[0] > 0, "cu_seqlens must be [B + 1]");
    require(options.num_prefix == 0,
            "packed sequences have no num_prefix; a token_index of -1 stands for it");
    require(options.max_seqlen > 0 || shape.tokens == 0, "max_seqlen must be positive");
    shape.offsets = {offsets.data, true, shape.tokens};
    shape.batch = offsets.sizes[0] - 1;
    shape.tokens = shape.keys = std::min(options.max_seqlen, shape.tokens);
  }
  const bool on_gpu = kCudaIsInterpreted || arrays.device().is_gpu();
  const cuda::Error reason = on_gpu ? cuda::unserved(shape) : nullptr;
  if (reason) require(false, reason);
  return shape;
}

RotaryTables tables_of(Arrays& arrays, const AttentionShape& shape, const Options& options) {
  const Array cos = arrays.read_if(options.cos, "cos"), sin = arrays.read_if(options.sin, "sin"),
              index = arrays.read_index_if(options.token_index, "token_index");
  require(bool(cos) == bool(sin), "cos and sin must be given both or neither");
  if (!cos) return {};
  require(shape.keys == shape.tokens, "keys are rotated only where there are as many as queries");
  require_dtype(cos, DType::Float32);
  require_like(sin, cos);
  const size_t axes = cos.sizes.size();
  const bool compact = axes == 3 && cos.sizes[2] == shape.head_dim / 4;
  require((axes == 2 && cos.sizes[1] == shape.head_dim / 2) ||
              (axes == 3 && cos.sizes[0] == (compact ? 2 : shape.heads) &&
               (compact || cos.sizes[2] == shape.head_dim / 2)),
          "cos must be [P, D/2], [H, P, D/2] or [2, G, D/4]");
  require(axes == 2 || compact || shape.kv_heads == shape.heads,
          "tables of each head need as many heads of keys");
  const int64_t lines = cos.sizes[axes - 2], rows = compact ? lines * lines : lines;
  const int64_t patches = shape.tokens - shape.num_prefix;
  const bool packed = shape.offsets.data != nullptr;
  if (index) {
    packed ? require_sizes(index, {shape.offsets.tokens}) : require_sizes(index, {shape.batch, patches});
  } else {
    require(packed ? rows >= patches : rows == patches,
            "without a token_index cos must have a row for each patch");
  }
  return {.cos = cos.floats(),
          .sin = sin.floats(),
          .token_index = static_cast<const int64_t*>(index.data),
          .rows = rows,
          .head_stride = axes == 3 && !compact ? lines * cos.sizes[2] : 0,
          .grid = compact ? lines : 0,
          .interleaved = options.interleaved};
}

float* lse_of(const Array& lse, const Array& q) {
  require_dtype(lse, DType::Float32);
  require(product(lse.sizes) * q.sizes.back() == product(q.sizes), "lse must have a number for each vector");
  return lse.floats();
}

void* output_of(const Array& output, const Array& q) {
  require_like(output, q);
  return output.data;
}

// Of k or v: that of each query head.
void* gradient_of(const Array& gradient, const Array& q, const Array& k) {
  std::vector<int64_t> sizes(k.sizes.begin(), k.sizes.end());
  sizes[sizes.size() - 2] = q.sizes[q.sizes.size() - 2];
  require_sizes(gradient, Sizes(sizes));
  require_dtype(gradient, q.dtype);
  return gradient.data;
}

void rope_attention_forward(const py::object& q_any, const py::object& k_any, const py::object& v_any,
                            const py::object& out, const py::object& lse, const Options& options,
                            uintptr_t stream) {
  Arrays arrays(stream);
  const Array q = arrays.read_strided(q_any, "q"), k = arrays.read_strided(k_any, "k"),
              v = arrays.read_strided(v_any, "v");
  const HeadsView q_view = view_of(q);
  require_keys(q, k, v);
  const AttentionShape shape = shape_of(arrays, q, k, options);
  const RopeAttentionForward params = {
      .q = q_view,
      .k = view_of(k),
      .v = view_of(v),
      .out = output_of(arrays.write(out, "out"), q),
      .lse = lse_of(arrays.write(lse, "lse"), q),
      .tables = tables_of(arrays, shape, options),
      .shape = shape,
  };
  launch<cpu::rope_attention_forward, cuda::rope_attention_forward>("rope_attention_forward", arrays,
                                                                    options.isa, params);
}

// The arrays of a backward pass: dout, q, k, v, out, lse and the gradients.
using Nine = std::array<py::object, 9>;

void rope_attention_backward(const Nine& given, const Options& options, uintptr_t stream) {
  const auto& [dout, q_any, k_any, v_any, out, lse, dq, dk, dv] = given;
  Arrays arrays(stream);
  const Array q = arrays.read_strided(q_any, "q"), k = arrays.read_strided(k_any, "k"),
              v = arrays.read_strided(v_any, "v");
  const HeadsView q_view = view_of(q);
  require_keys(q, k, v);
  const AttentionShape shape = shape_of(arrays, q, k, options);
  const RopeAttentionBackward params = {
      .dout = view_like(arrays.read_strided(dout, "dout"), q),
      .q = q_view,
      .k = view_of(k),
      .v = view_of(v),
      .out = view_like(arrays.read_strided(out, "out"), q),
      .lse = lse_of(arrays.read(lse, "lse"), q),
      .dq = output_of(arrays.write(dq, "dq"), q),
      .dk = gradient_of(arrays.write(dk, "dk"), q, k),
      .dv = gradient_of(arrays.write(dv, "dv"), q, k),
      .tables = tables_of(arrays, shape, options),
      .shape = shape,
  };
  launch<cpu::rope_attention_backward, cuda::rope_attention_backward>("rope_attention_backward", arrays,
                                                                      options.isa, params);
}

}  // namespace

void register_rope_attention(py::module_& m) {
  using Object = const py::object&;
  m.def(
      "rope_attention_forward",
      [](Object q, Object k, Object v, Object out, Object lse, Object cos, Object sin, Object token_index,
         Object cu_seqlens, int64_t num_prefix, int64_t max_seqlen, bool causal, bool interleaved,
         double scale, const IsaName& isa, uintptr_t stream) {
        const Options options = {cos,        sin,    token_index, cu_seqlens, num_prefix,
                                 max_seqlen, causal, interleaved, scale,      isa};
        rope_attention_forward(q, k, v, out, lse, options, stream);
      },
      "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a, py::kw_only(), "cos"_a = py::none(), "sin"_a = py::none(),
      "token_index"_a = py::none(), "cu_seqlens"_a = py::none(), "num_prefix"_a = 0, "max_seqlen"_a = 0,
      "causal"_a = false, "interleaved"_a = true, "scale"_a, "isa"_a = py::none(), "stream"_a = 0,
      R"(Writes out and the log-sum-exps lse.

q: [B, N, H, D], k and v: [B, M, Hkv, D], with dense vectors; out: like q, dense; lse: float32 [B, H, N]. cos, sin: float32, as
evakernels.rope_attention takes them, or None. With cu_seqlens, int64 [B + 1], the tensors are [T, H, D] and lse
[H, T], as evakernels.packed_attention has them.)");
  m.def(
      "rope_attention_backward",
      [](Object dout, Object q, Object k, Object v, Object out, Object lse, Object dq, Object dk, Object dv,
         Object cos, Object sin, Object token_index, Object cu_seqlens, int64_t num_prefix,
         int64_t max_seqlen, bool causal, bool interleaved, double scale, const IsaName& isa,
         uintptr_t stream) {
        const Options options = {cos,        sin,    token_index, cu_seqlens, num_prefix,
                                 max_seqlen, causal, interleaved, scale,      isa};
        rope_attention_backward({dout, q, k, v, out, lse, dq, dk, dv}, options, stream);
      },
      "dout"_a, "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a, "dq"_a, "dk"_a, "dv"_a, py::kw_only(),
      "cos"_a = py::none(), "sin"_a = py::none(), "token_index"_a = py::none(), "cu_seqlens"_a = py::none(),
      "num_prefix"_a = 0, "max_seqlen"_a = 0, "causal"_a = false, "interleaved"_a = true, "scale"_a,
      "isa"_a = py::none(), "stream"_a = 0,
      "Writes dq, dk and dv, dense; dk and dv [B, M, H, D], those of each query head. Arrays as for "
      "rope_attention_forward.");
}

}  // namespace evakernels
