// The contrastive losses as torch operators: torch's matmuls around one pass over each tile of logits.
//
// 16-bit features are widened: torch has no matmul of them with a float32 result on a CPU.
#include "include/contrastive.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <limits>
#include <numeric>

#include "bind/binding.h"

namespace evakernels {
namespace {

// Rows per tile: enough for matmuls at full rate. At most 2^26 logits (256 MiB) exist at a time.
constexpr int64_t kTileRows = 512;
constexpr int64_t kTileElements = int64_t{1} << 26;

// out = a @ b.
void multiply_into(const Tensor& out, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

// sum += a @ b.
void add_product(const Tensor& sum, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(sum.get(), sum.get(), a.get(), b.get(), 1.0, 1.0));
}

Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

Tensor rows_of(Tensor& matrix, int64_t start, int64_t count) {
  return torch::stable::narrow(matrix, 0, start, count);
}

Tensor new_like(const Tensor& like, const std::vector<int64_t>& sizes) {
  return new_tensor(TorchDevice(like), sizes, like.scalar_type());
}

float* floats_of(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

Tensor as_float32(const Tensor& tensor) {
  return as_contiguous(torch::stable::to(tensor, ScalarType::Float));
}

float scalar_of(const Tensor& tensor, const char* name) {
  require(tensor.numel() == 1, name, " must have one element");
  return *floats_of(as_float32(tensor));
}

Tensor scalar_of_dtype(double value, ScalarType dtype, const Tensor& like) {
  const Tensor result = new_tensor(TorchDevice(like), {}, ScalarType::Float);
  *floats_of(result) = static_cast<float>(value);
  return torch::stable::to(result, dtype);
}

// Computes logit_scale * image @ text^T tile by tile.
class Tiles {
 public:
  // `logits`: the matrix of all logits, which tiles are rows of; null if each tile overwrites the last.
  Tiles(const Tensor& image, const Tensor& text, const Tensor& logit_scale, int64_t offset,
        const Tensor* logits = nullptr)
      : dtype_(dtype_of(image, "image")), offset_(offset), keeps_(logits != nullptr) {
    require(image.dim() == 2 && text.dim() == 2 && image.size(1) == text.size(1),
            "image and text must be matrices of one width");
    require(dtype_of(text, "text") == dtype_, "text must be of image's dtype");
    require(offset >= 0 && image.size(0) > 0 && offset + image.size(0) <= text.size(0),
            "every image must have its text");
    image_ = as_contiguous(image);
    text_ = as_float32(text);
    scale_ = scalar_of(logit_scale, "logit_scale");
    height_ = std::min({rows(), kTileRows, std::max<int64_t>(1, kTileElements / columns())});
    scaled_ = new_like(text_, {height_, width()});
    logits_ = keeps_ ? *logits : new_like(text_, {height_, columns()});
  }

  int64_t rows() const { return image_.size(0); }
  int64_t columns() const { return text_.size(0); }
  int64_t width() const { return text_.size(1); }

  // Calls body(tile, its first row). `known`: all logits, if they needn't be computed.
  template <class Body>
  void for_each(const Body& body, const float* known = nullptr) {
    for (int64_t start = 0; start < rows(); start += height_) {
      const int64_t count = std::min(height_, rows() - start);
      cpu::scale_image(image_rows(start, count, nullptr, nullptr), cpu::active_isa(), torch_parallel);
      const Tensor logits = rows_of(logits_, keeps_ ? start : 0, count);
      if (known) {
        std::copy_n(known + start * columns(), count * columns(), floats_of(logits));
      } else {
        multiply_into(logits, rows_of(scaled_, 0, count), transposed(text_));
      }
      body(LogitTile{floats_of(logits), count, columns(), offset_ + start}, start);
    }
  }

 protected:
  ImageRows image_rows(int64_t start, int64_t count, const Tensor* dimage, float* dot_products) const {
    const int64_t bytes = start * width() * (dtype_ == DType::Float32 ? 4 : 2);
    return {
        .image = static_cast<const char*>(image_.const_data_ptr()) + bytes,
        .scaled = floats_of(scaled_),
        .dimage = dimage ? static_cast<char*>(dimage->mutable_data_ptr()) + bytes : nullptr,
        .dot_products = dot_products,
        .rows = count,
        .width = width(),
        .scale = scale_,
        .dtype = dtype_,
    };
  }

  DType dtype_;
  int64_t offset_;
  bool keeps_;
  Tensor image_, text_, scaled_, logits_;
  float scale_;
  int64_t height_;
};

class LogitGradients : public Tiles {
 public:
  // A gradient that isn't needed has no elements.
  LogitGradients(const Tensor& image, const Tensor& text, const Tensor& logit_scale, int64_t offset,
                 NeedsGrad needs_grad)
      : Tiles(image, text, logit_scale, offset),
        needs_dimage_(needs_grad.at(0)),
        needs_dtext_(needs_grad.at(1)),
        scale_dtype_(logit_scale.scalar_type()),
        text_dtype_(text.scalar_type()),
        // The scale's gradient needs the gradient of the images or of the texts.
        multiplies_text_(needs_dimage_ || !needs_dtext_ || scale_ == 0.0f),
        dimage_(multiplies_text_ ? new_like(image_, {rows(), width()}) : new_like(image_, {0})),
        dtext_(needs_dtext_ ? torch::stable::new_zeros(text_, text_.sizes()) : new_like(text_, {0})) {}

  // Adds the share of a tile that holds the gradient of its logits.
  void add(const LogitTile& tile, int64_t start) {
    const Tensor dlogits = rows_of(logits_, 0, tile.rows);
    const Tensor scaled = rows_of(scaled_, 0, tile.rows);
    if (needs_dtext_) add_product(dtext_, transposed(dlogits), scaled);
    if (!multiplies_text_) return;
    multiply_into(scaled, dlogits, text_);
    std::vector<float> dot_products(tile.rows);
    cpu::finish_image(image_rows(start, tile.rows, &dimage_, dot_products.data()), cpu::active_isa(),
                      torch_parallel);
    for (float product : dot_products) dscale_ += product;
  }

  // dimage, dtext and dscale.
  std::tuple<Tensor, Tensor, Tensor> results() const {
    const double total = multiplies_text_ ? dscale_ : dot_product(dtext_, text_) / scale_;
    return {needs_dimage_ ? dimage_ : new_like(image_, {0}), torch::stable::to(dtext_, text_dtype_),
            scalar_of_dtype(total, scale_dtype_, text_)};
  }

 private:
  // Summed in double over rows.
  static double dot_product(const Tensor& a, const Tensor& b) {
    const float *x = floats_of(a), *y = floats_of(b);
    const int64_t rows = a.size(0), width = a.size(1);
    double total = 0;
    for (int64_t row = 0; row < rows; ++row) {
      total += std::inner_product(x + row * width, x + (row + 1) * width, y + row * width, 0.0f);
    }
    return total;
  }

  bool needs_dimage_, needs_dtext_;
  ScalarType scale_dtype_, text_dtype_;
  bool multiplies_text_;
  Tensor dimage_, dtext_;
  double dscale_ = 0;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> write_statistics(Call& call, Tiles& tiles) {
  const int64_t rows = tiles.rows(), columns = tiles.columns();
  float* const row_lse = call.output_floats("row_lse", rows);
  float* const col_lse = call.output_floats("col_lse", columns);
  float* const positive = call.output_floats("positive", rows);
  float* const row_max = call.output_floats("row_max", rows);
  float* const col_max = call.output_floats("col_max", columns);
  std::vector<float> col_sum(columns);
  std::fill_n(col_max, columns, -std::numeric_limits<float>::infinity());
  tiles.for_each([&](const LogitTile& tile, int64_t start) {
    const ContrastiveForward params = {
        .tile = tile,
        .row_lse = row_lse + start,
        .row_max = row_max + start,
        .positive = positive + start,
        .col_max = col_max,
        .col_sum = col_sum.data(),
    };
    cpu::contrastive_forward(params, cpu::active_isa(), torch_parallel);
  });
  cpu::finish_columns(col_sum.data(), col_max, col_lse, columns);
  return call.results<5>();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> contrastive_forward(Input image, Input text,
                                                                       Input logit_scale, int64_t offset) {
  Call call;
  call.read(image, "image");
  Tiles tiles(image, text, logit_scale, offset);
  return write_statistics(call, tiles);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> contrastive_kept_forward(Input image, Input text,
                                                                                    Input logit_scale,
                                                                                    int64_t offset) {
  Call call;
  call.read(image, "image");
  const int64_t sizes[] = {image.size(0), text.size(0)};
  const Tensor logits = new_tensor(TorchDevice(image), sizes, ScalarType::Float);
  Tiles tiles(image, text, logit_scale, offset, &logits);
  return std::tuple_cat(write_statistics(call, tiles), std::make_tuple(logits));
}

// `logits`: null if they are recomputed.
void write_gradients(Call& call, LogitGradients& gradients, Input drow_lse_in, Input dcol_lse_in,
                     Input dpositive_in, Input row_lse_in, Input col_lse_in, const float* logits) {
  const int64_t rows = gradients.rows(), columns = gradients.columns();
  const float* const drow_lse = read_floats(call, drow_lse_in, "drow_lse", rows);
  const float* const dcol_lse = read_floats(call, dcol_lse_in, "dcol_lse", columns);
  const float* const dpositive = read_floats(call, dpositive_in, "dpositive", rows);
  const float* const row_lse = read_floats(call, row_lse_in, "row_lse", rows);
  const float* const col_lse = read_floats(call, col_lse_in, "col_lse", columns);
  const auto add = [&](const LogitTile& tile, int64_t start) {
    const ContrastiveBackward params = {
        .tile = tile,
        .drow_lse = drow_lse + start,
        .dcol_lse = dcol_lse,
        .dpositive = dpositive + start,
        .row_lse = row_lse + start,
        .col_lse = col_lse,
    };
    cpu::contrastive_backward(params, cpu::active_isa(), torch_parallel);
    gradients.add(tile, start);
  };
  gradients.for_each(add, logits);
}

std::tuple<Tensor, Tensor, Tensor> contrastive_backward(Input drow_lse, Input dcol_lse, Input dpositive,
                                                        Input image, Input text, Input logit_scale,
                                                        Input row_lse, Input col_lse, int64_t offset,
                                                        NeedsGrad needs_grad) {
  Call call;
  LogitGradients gradients(image, text, logit_scale, offset, needs_grad);
  write_gradients(call, gradients, drow_lse, dcol_lse, dpositive, row_lse, col_lse, nullptr);
  return gradients.results();
}

std::tuple<Tensor, Tensor, Tensor> contrastive_kept_backward(Input drow_lse, Input dcol_lse, Input dpositive,
                                                             Input image, Input text, Input logit_scale,
                                                             Input row_lse, Input col_lse, Input logits_in,
                                                             int64_t offset, NeedsGrad needs_grad) {
  Call call;
  LogitGradients gradients(image, text, logit_scale, offset, needs_grad);
  const Array logits = call.read(logits_in, "logits");
  require_dtype(logits, DType::Float32);
  require_sizes(logits, {gradients.rows(), gradients.columns()});
  write_gradients(call, gradients, drow_lse, dcol_lse, dpositive, row_lse, col_lse, logits.floats());
  return gradients.results();
}

Tensor siglip_value(Input image, Input text, Input logit_scale, Input logit_bias, int64_t offset) {
  Tiles tiles(image, text, logit_scale, offset);
  const float bias = scalar_of(logit_bias, "logit_bias");
  double total = 0;
  tiles.for_each([&](const LogitTile& tile, int64_t) {
    total += cpu::siglip_value({.tile = tile, .bias = bias}, cpu::active_isa(), torch_parallel).loss;
  });
  return scalar_of_dtype(total, ScalarType::Float, image);
}

// The gradients are float32: backward multiplies them by dloss and rounds once.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> siglip_forward(Input image, Input text, Input logit_scale,
                                                                  Input logit_bias, int64_t offset,
                                                                  NeedsGrad needs_grad) {
  require(dtype_of(image, "image") == dtype_of(text, "text"), "text must be of image's dtype");
  LogitGradients gradients(as_float32(image), as_float32(text), as_float32(logit_scale), offset, needs_grad);
  const float bias = scalar_of(logit_bias, "logit_bias");
  SiglipSums total;
  gradients.for_each([&](const LogitTile& tile, int64_t start) {
    const SiglipSums sums =
        cpu::siglip_forward({.tile = tile, .bias = bias}, cpu::active_isa(), torch_parallel);
    total.loss += sums.loss;
    total.dbias += sums.dbias;
    gradients.add(tile, start);
  });
  return std::tuple_cat(std::make_tuple(scalar_of_dtype(total.loss, ScalarType::Float, image)),
                        gradients.results(),
                        std::make_tuple(scalar_of_dtype(total.dbias, ScalarType::Float, image)));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> siglip_backward(Input dloss, Input image, Input text,
                                                           Input logit_scale, Input logit_bias, Input dimage,
                                                           Input dtext, Input dlogit_scale,
                                                           Input dlogit_bias) {
  const auto scale = [&](const Tensor& unscaled, const Tensor& input) {
    AtenTensorHandle scaled = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mul_Tensor(unscaled.get(), dloss.get(), &scaled));
    return torch::stable::to(Tensor(scaled), input.scalar_type());
  };
  return {scale(dimage, image), scale(dtext, text), scale(dlogit_scale, logit_scale),
          scale(dlogit_bias, logit_bias)};
}

}  // namespace

EVAKERNELS_CPU_OPS(contrastive, m) {
  EVAKERNELS_OP(m, contrastive_forward);
  EVAKERNELS_OP(m, contrastive_backward);
  EVAKERNELS_OP(m, contrastive_kept_forward);
  EVAKERNELS_OP(m, contrastive_kept_backward);
  EVAKERNELS_OP(m, siglip_value);
  EVAKERNELS_OP(m, siglip_forward);
  EVAKERNELS_OP(m, siglip_backward);
}

}  // namespace evakernels
