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
  int64_t samples() const { return has_sequences() ? static_cast<int64_t>(offsets.size()) - 1 : shape.batch; }
  int64_t first_token(int64_t b) const { return has_sequences() ? offsets[b] : b * shape.tokens; }
  int64_t first_key(int64_t b) const { return has_sequences() ? offsets[b] : b * shape.keys; }
  int64_t tokens(int64_t b) const { return has_sequences() ? offsets[b + 1] - offsets[b] : shape.tokens; }
  int64_t keys(int64_t b) const { return has_sequences() ? tokens(b) : shape.keys; }
  int64_t first_row(int64_t b, int64_t h) const {
    return has_sequences() ? h * offsets.back() + offsets[b] : (b * shape.heads + h) * shape.tokens;
  }
  // As the launchers take it.
  AttentionShape whole_shape() const {
    AttentionShape whole = shape;
    if (!has_sequences()) return whole;
    whole.batch = samples();
    for (int64_t b = 0; b < samples(); ++b) whole.tokens = whole.keys = std::max(whole.tokens, tokens(b));
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
  int64_t first_index(int64_t b) const { return has_sequences() ? offsets[b] : b * patches(); }
  int64_t table_rows() const { return grid() > 0 ? grid() * grid() : patches() + (indexed ? 3 : 0); }
  std::string name(const char* what) const {
    return std::string(what) + " of " + std::to_string(whole_shape().tokens) + " tokens and " +
           std::to_string(whole_shape().keys) + " keys, head_dim " + std::to_string(shape.head_dim) +
           ", dtype " + std::to_string(static_cast<int>(shape.dtype));
  }
};

// A [B, N, H, D], by itself or as one of several that lie side by side.
struct Heads {
  Buffer* buffer;
  HeadsView view;

  Heads(const Rows& rows, Buffer& of, int number = 0, int count = 1) : buffer(&of) {
    const int64_t token = rows.heads * rows.head_dim * count;
    first_ = number * rows.heads * rows.head_dim;
    view = {static_cast<char*>(of.data()) + first_ * (of.dtype() == DType::Float32 ? 4 : 2),
            rows.of_sample * token, token, rows.head_dim};
  }

  double at(int64_t token, int64_t h, int64_t i) const {
    return buffer->at(first_ + token * view.token_stride + h * view.head_stride + i);
  }

 private:
  int64_t first_;
};

using Matrix = std::vector<double>;  // [N, D] or [N, N]

// Everything of one head, in double.
struct Expected {
  Matrix out, lse, dq, dk, dv;
};

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

  void rotate(double* vector, int64_t b, int64_t n, int64_t h, double sign) const {
    if (a_.tables == Tables::None || n < a_.shape.num_prefix) return;
    const int64_t half = a_.shape.head_dim / 2, patch = n - a_.shape.num_prefix;
    const int64_t row = a_.indexed ? index_[a_.first_index(b) + patch] : patch;
    if (row < 0) return;
    const int64_t first = ((a_.tables == Tables::OfHeads ? h * a_.table_rows() : 0) + row) * half;
    const auto angle = [&](int64_t i) {
      const int64_t quarter = half / 2, grid = a_.grid();
      if (grid == 0) return first + i;
      return i < quarter ? row / grid * quarter + i : (grid + row % grid) * quarter + i - quarter;
    };
    for (int64_t i = 0; i < half; ++i) {
      double& x = vector[a_.interleaved ? 2 * i : i];
      double& y = vector[a_.interleaved ? 2 * i + 1 : i + half];
      const double c = cos_.at(angle(i)), s = sign * sin_.at(angle(i)), before = x;
      x = x * c - y * s;
      y = before * s + y * c;
    }
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

// a (times b, if it is to be transposed): [N, M] of [N, K] and [M, K].
Matrix product(const Matrix& a, const Matrix& b, int64_t n, int64_t m, int64_t k) {
  Matrix result(n * m);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < m; ++j) {
      for (int64_t l = 0; l < k; ++l) result[i * m + j] += a[i * k + l] * b[j * k + l];
    }
  }
  return result;
}

Matrix transposed(const Matrix& a, int64_t rows, int64_t columns) {
  Matrix result(a.size());
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) result[j * rows + i] = a[i * columns + j];
  }
  return result;
}

Expected attend(const Attention& a, const Rotations& rotations, const Heads (&in)[4], int64_t b, int64_t h) {
  const int64_t N = a.tokens(b), M = a.keys(b), D = a.shape.head_dim;
  const int64_t key_head = h / (a.shape.heads / a.shape.kv_heads);
  const auto read = [&](const Heads& heads, int64_t first, int64_t count, int64_t head, bool turned) {
    Matrix rows(count * D);
    for (int64_t n = 0; n < count; ++n) {
      for (int64_t i = 0; i < D; ++i) rows[n * D + i] = heads.at(first + n, head, i);
      if (turned) rotations.rotate(&rows[n * D], b, n, h, 1.0);
    }
    return rows;
  };
  const Matrix q = read(in[0], a.first_token(b), N, h, true),
               k = read(in[1], a.first_key(b), M, key_head, true),
               v = read(in[2], a.first_key(b), M, key_head, false),
               dout = read(in[3], a.first_token(b), N, h, false);
  Matrix weights = product(q, k, N, M, D);
  Expected e;
  e.lse.resize(N);
  for (int64_t n = 0; n < N; ++n) {
    double total = 0.0;
    for (int64_t m = 0; m < M; ++m) {
      double& weight = weights[n * M + m];
      weight = a.shape.causal && m > n + M - N ? 0.0 : std::exp(a.shape.scale * weight);
      total += weight;
    }
    for (int64_t m = 0; m < M && total > 0.0; ++m) weights[n * M + m] /= total;
    e.lse[n] = std::log(total);
  }
  e.out = product(weights, transposed(v, M, D), N, D, M);
  e.dv = product(transposed(weights, N, M), transposed(dout, N, D), M, D, N);
  Matrix scores = product(dout, v, N, M, D);
  for (int64_t n = 0; n < N; ++n) {
    double mean = 0.0;
    for (int64_t i = 0; i < D; ++i) mean += dout[n * D + i] * e.out[n * D + i];
    for (int64_t m = 0; m < M; ++m) {
      double& score = scores[n * M + m];
      score = weights[n * M + m] * (score - mean) * a.shape.scale;
    }
  }
  e.dq = product(scores, transposed(k, M, D), N, D, M);
  e.dk = product(transposed(scores, N, M), transposed(q, N, D), M, D, N);
  for (int64_t n = 0; n < N; ++n) rotations.rotate(&e.dq[n * D], b, n, h, -1.0);
  for (int64_t m = 0; m < M; ++m) rotations.rotate(&e.dk[m * D], b, m, h, -1.0);
  return e;
}

// The rows of head h of a sample into those of all, from `first` on.
void place(const Rows& rows, const Matrix& head, Matrix& all, int64_t first, int64_t h) {
  const int64_t D = rows.head_dim;
  all.resize(rows.size());
  for (int64_t at = 0; at < static_cast<int64_t>(head.size()); ++at) {
    all[((first + at / D) * rows.heads + h) * D + at % D] = head[at];
  }
}

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
  const Heads in[4] = {Heads(rows, first, 0, count),
                       Heads(keys, a.packed ? first : k, a.packed ? 1 : 0, count),
                       Heads(keys, a.packed ? first : v, a.packed ? 2 : 0, count), Heads(rows, dout)};
  Rotations rotations(a);
  Matrix all_out, all_lse(rows.vectors()), all_dq, all_dk, all_dv;
  for (int64_t b = 0; b < a.samples(); ++b) {
    for (int64_t h = 0; h < a.shape.heads; ++h) {
      const Expected e = attend(a, rotations, in, b, h);
      place(rows, e.out, all_out, a.first_token(b), h);
      std::copy(e.lse.begin(), e.lse.end(), all_lse.begin() + a.first_row(b, h));
      place(rows, e.dq, all_dq, a.first_token(b), h);
      place(gradients, e.dk, all_dk, a.first_key(b), h);
      place(gradients, e.dv, all_dv, a.first_key(b), h);
    }
  }
  const AttentionShape shape = a.whole_shape();
  run(cuda::rope_attention_forward(
          {in[0].view, in[1].view, in[2].view, out.data(), lse.floats(), rotations.tables(), shape}, nullptr),
      a.name("rope_attention_forward"));
  compare(out, all_out, a.name("out"), dtype);
  compare(lse, all_lse, a.name("lse"), dtype);
  Buffer dq(dtype, rows.size()), dk(dtype, gradients.size()), dv(dtype, gradients.size());
  const RopeAttentionBackward backward = {
      in[3].view, in[0].view, in[1].view,         in[2].view, Heads(rows, out).view, lse.floats(), dq.data(),
      dk.data(),  dv.data(),  rotations.tables(), shape};
  Scratch scratch;
  run(cuda::rope_attention_backward(backward, scratch, nullptr), a.name("rope_attention_backward"));
  compare(dq, all_dq, a.name("dq"), dtype);
  compare(dk, all_dk, a.name("dk"), dtype);
  compare(dv, all_dv, a.name("dv"), dtype);
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
}

}  // namespace evakernels::drive
