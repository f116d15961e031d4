#include <stdlib.h>

#include <algorithm>

#include "drive.h"
#include "include/rope_attention.h"

namespace evakernels::drive {
namespace {

enum class Tables { None, Shared, OfHeads, Compact };

// [tokens, heads, head_dim], of which each sample has as many.
struct Rows {
  int64_t of_sample;
  int64_t tokens;
  int64_t heads;
  int64_t head_dim;

  int64_t vectors() const { return tokens * heads; }
  int64_t size() const { return vectors() * head_dim; }
};

struct Attention {
  AttentionShape shape;
  Tables tables;
  bool interleaved;
  bool indexed;
  bool packed;  // q, k and v in one [B, N, 3, H, D]
  // Of a packed batch, whose shape has batch and tokens of 0; empty for one whose samples are equally long.
  Vector<int64_t> offsets;

  bool has_sequences() const { return !offsets.empty(); }
  // As the launchers take it.
  AttentionShape whole_shape() const {
    AttentionShape whole = shape;
    if (!has_sequences()) return whole;
    whole.batch = static_cast<int64_t>(offsets.size()) - 1;
    for (int64_t b = 0; b < whole.batch; ++b) {
      whole.tokens = whole.keys = std::max(whole.tokens, offsets[b + 1] - offsets[b]);
    }
    whole.offsets = {offsets.data(), true, offsets.back()};
    return whole;
  }

  Rows rows(int64_t of_sample, int64_t heads) const {
    const int64_t all = has_sequences() ? offsets.back() : shape.batch * of_sample;
    return {of_sample, all, heads, shape.head_dim};
  }
  Rows queries() const { return rows(shape.tokens, shape.heads); }
  Rows keys() const { return rows(shape.keys, shape.kv_heads); }
  Rows key_gradients() const { return rows(shape.keys, shape.heads); }
  // Of the longest sample.
  int64_t patches() const { return whole_shape().tokens - shape.num_prefix; }
  // Compact: of a grid with two patches a side more than it must have.
  int64_t grid() const {
    return tables == Tables::Compact ? 2 + static_cast<int64_t>(std::sqrt(patches())) : 0;
  }
  int64_t indices() const { return has_sequences() ? offsets.back() : shape.batch * patches(); }
  int64_t table_rows() const { return grid() > 0 ? grid() * grid() : patches() + (indexed ? 3 : 0); }
  std::string name(const char* what) const {
    return std::string(what) + " of " + std::to_string(whole_shape().tokens) + " tokens and " +
           std::to_string(whole_shape().keys) + " keys, head_dim " + std::to_string(shape.head_dim) +
           ", dtype " + std::to_string(static_cast<int>(shape.dtype));
  }
};

// The view of a [B, N, H, D], by itself or as one of several that lie side by side.
HeadsView view_of(const Rows& rows, Buffer& buffer, int number = 0, int count = 1) {
  const int64_t token = rows.heads * rows.head_dim * count;
  const int64_t bytes = number * rows.heads * rows.head_dim * (buffer.dtype() == DType::Float32 ? 4 : 2);
  return {static_cast<char*>(buffer.data()) + bytes, rows.of_sample * token, token, rows.head_dim};
}

class Rotations {
 public:
  explicit Rotations(const Attention& a)
      : a_(a), cos_(DType::Float32, size(a)), sin_(DType::Float32, size(a)) {
    for (int64_t i = 0; i < size(a); ++i) {
      const double angle = 3 * next_number();
      cos_.floats()[i] = static_cast<float>(std::cos(angle));
      sin_.floats()[i] = static_cast<float>(std::sin(angle));
    }
    for (int64_t i = 0; i < a.indices(); ++i) index_.push_back(i % 7 == 6 ? -1 : i * 5 % a.table_rows());
    cos_.settle();
    sin_.settle();
    settle(index_);
  }

  RotaryTables tables() {
    if (a_.tables == Tables::None) return {};
    return {.cos = cos_.floats(),
            .sin = sin_.floats(),
            .token_index = a_.indexed ? index_.data() : nullptr,
            .rows = a_.table_rows(),
            .head_stride = a_.tables == Tables::OfHeads ? a_.table_rows() * a_.shape.head_dim / 2 : 0,
            .grid = a_.grid(),
            .interleaved = a_.interleaved};
  }

 private:
  static int64_t size(const Attention& a) {
    if (a.grid() > 0) return 2 * a.grid() * a.shape.head_dim / 4;
    return a.shape.heads * a.table_rows() * a.shape.head_dim / 2;
  }

  const Attention& a_;
  Buffer cos_, sin_;
  Vector<int64_t> index_;
};

void drive(Attention a) {
  settle(a.offsets);
  const DType dtype = a.shape.dtype;
  const Rows rows = a.queries(), keys = a.keys(), gradients = a.key_gradients();
  Buffer first = Buffer::random(dtype, rows.size() * (a.packed ? 3 : 1));
  Buffer k = Buffer::random(dtype, a.packed ? 0 : keys.size()),
         v = Buffer::random(dtype, a.packed ? 0 : keys.size());
  Buffer dout = Buffer::random(dtype, rows.size()), out(dtype, rows.size()),
         lse(DType::Float32, rows.vectors());
  const int count = a.packed ? 3 : 1;
  const HeadsView q_view = view_of(rows, first, 0, count), dout_view = view_of(rows, dout),
                  k_view = view_of(keys, a.packed ? first : k, a.packed ? 1 : 0, count),
                  v_view = view_of(keys, a.packed ? first : v, a.packed ? 2 : 0, count);
  Rotations rotations(a);
  const AttentionShape shape = a.whole_shape();
  run(cuda::rope_attention_forward(
          {q_view, k_view, v_view, out.data(), lse.floats(), rotations.tables(), shape}, nullptr),
      a.name("rope_attention_forward"));
  check_written(out, a.name("out"));
  check_written(lse, a.name("lse"));
  Buffer dq(dtype, rows.size()), dk(dtype, gradients.size()), dv(dtype, gradients.size());
  const RopeAttentionBackward backward = {dout_view,    q_view,    k_view,    v_view,    view_of(rows, out),
                                          lse.floats(), dq.data(), dk.data(), dv.data(), rotations.tables(),
                                          shape};
  Scratch scratch;
  run(cuda::rope_attention_backward(backward, scratch, nullptr), a.name("rope_attention_backward"));
  check_written(dq, a.name("dq"));
  check_written(dk, a.name("dk"));
  check_written(dv, a.name("dv"));
}

}  // namespace

void drive_rope_attention() {
  constexpr DType kBFloat16 = DType::BFloat16, kFloat16 = DType::Float16;
  // Prefix and patches that fill their tile; pairs half a vector apart; access by element; text; more tiles
  // than warps; stages; blocks whose warps take queries twice. Then a negative scale with all options, access
  // by element, and twice the tiles that a warp has at a time; compact tables; sequences, one of them empty.
  // Fewer keys than queries, of which some see none: tiles of them, in several rounds too, and all of them;
  // more keys, in stages and rounds; no queries; heads of keys for several of queries; rotated sequences.
  const Vector<int64_t> several = {0, 17, 17, 18, 60}, two = {0, 5, 30};
  const Attention cases[] = {
      {{2, 17, 17, 2, 2, 64, 1, 0.125f, false, kBFloat16}, Tables::Shared, true, true, true},
      {{2, 37, 37, 1, 1, 32, 5, 0.2f, true, kFloat16}, Tables::OfHeads, false, false, true},
      {{1, 20, 20, 3, 3, 18, 1, -0.2f, false, kBFloat16}, Tables::OfHeads, false, true, false},
      {{1, 33, 33, 1, 1, 112, 2, 0.1f, true, kBFloat16}, Tables::Shared, false, false, false},
      {{3, 97, 97, 1, 1, 16, 1, 0.3f, true, kBFloat16}, Tables::Shared, false, false, true},
      {{1, 145, 145, 1, 1, 128, 1, 0.1f, false, kFloat16}, Tables::Shared, true, false, true},
      {{3, 120, 120, 1, 1, 128, 1, 0.1f, false, kBFloat16}, Tables::Shared, false, true, true},
      {{1, 45, 45, 2, 2, 64, 1, -0.125f, false, kFloat16}, Tables::OfHeads, true, true, true},
      {{1, 30, 30, 1, 1, 18, 1, 0.2f, true, kFloat16}, Tables::Shared, false, false, true},
      {{1, 97, 97, 1, 1, 112, 0, 0.1f, true, kFloat16}, Tables::None, true, false, false},
      {{1, 113, 113, 1, 1, 8, 0, 0.3f, true, kBFloat16}, Tables::None, true, false, true},
      {{2, 26, 26, 1, 1, 64, 1, 0.125f, false, kBFloat16}, Tables::Compact, true, true, true},
      {{1, 26, 26, 1, 1, 24, 1, 0.2f, false, kFloat16}, Tables::Compact, false, false, true},
      {{0, 0, 0, 2, 2, 64, 0, 0.125f, true, kBFloat16}, Tables::None, true, false, true, several},
      {{0, 0, 0, 1, 1, 32, 0, 0.2f, false, kFloat16}, Tables::None, true, false, true, two},
      {{2, 50, 13, 4, 2, 64, 0, 0.125f, true, kBFloat16}, Tables::None, true, false, false},
      {{1, 70, 35, 1, 1, 112, 0, 0.1f, true, kFloat16}, Tables::None, true, false, false},
      {{1, 170, 150, 1, 1, 128, 0, 0.1f, true, kBFloat16}, Tables::None, true, false, false},
      {{1, 21, 0, 2, 1, 16, 0, 0.3f, false, kBFloat16}, Tables::None, true, false, false},
      {{1, 18, 170, 3, 1, 128, 0, 0.1f, true, kFloat16}, Tables::None, true, false, false},
      {{1, 3, 90, 1, 1, 18, 0, 0.2f, false, kBFloat16}, Tables::None, true, false, false},
      {{1, 0, 20, 1, 1, 32, 0, 0.2f, false, kFloat16}, Tables::None, true, false, false},
      {{2, 17, 17, 6, 2, 64, 1, 0.125f, false, kBFloat16}, Tables::Shared, true, true, false},
      {{0, 0, 0, 2, 2, 64, 0, 0.125f, true, kBFloat16}, Tables::Compact, true, true, true, several},
      {{0, 0, 0, 4, 2, 18, 0, 0.2f, false, kFloat16}, Tables::Shared, false, false, false, two},
  };
  for (const Attention& a : cases) drive(a);
  // Two blocks per head: a prefix, causal ones by element and in words, sequences, and fewer keys.
  setenv("EVAKERNELS_ATTENTION_PLAN", "1x2", 1);
  for (const int i : {3, 7, 9, 10, 13, 16, 19}) drive(cases[i]);
  unsetenv("EVAKERNELS_ATTENTION_PLAN");
}

}  // namespace evakernels::drive
