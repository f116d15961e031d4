// The contrastive losses as torch operators: torch's matrix products around one pass over each tile of
// logits.
//
// 16-bit features are widened: torch has no product of them with a float32 result on a CPU. (MKL has one for
// bfloat16, but on a Zen 5 it was no faster than the float32 product.)
#include "include/contrastive.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <limits>
#include <numeric>

#include "bind/binding.h"

namespace evakernels {
namespace {

// Rows of a tile: enough for the products to run at full rate. At most 2^26 logits (256 MiB) exist at a time.
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

Tensor new_like(const Tensor& like, const std::vector<int64_t>& sizes) {
  return new_tensor(TorchDevice(like), sizes, like.scalar_type());
}

Tensor new_float32(const Tensor& like, const std::vector<int64_t>& sizes) {
  return new_tensor(TorchDevice(like), sizes, ScalarType::Float);
}

float* floats_of(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

Tensor as_float32(const Tensor& tensor) {
  return as_contiguous(torch::stable::to(tensor, ScalarType::Float));
}

float scalar_of(const Tensor& tensor, const char* name) {
  require(tensor.numel() == 1, std::string(name) + " must have one element");
  return *static_cast<const float*>(as_float32(tensor).const_data_ptr());
}

// `count` floats that the caller gave, dense.
Tensor float_vector(const Tensor& tensor, int64_t count, const char* name) {
  require(tensor.scalar_type() == ScalarType::Float && tensor.numel() == count,
          std::string(name) + " must be float32 with " + std::to_string(count) + " elements");
  return as_contiguous(tensor);
}

Tensor scalar_like(double value, const Tensor& like) {
  const Tensor result = new_float32(like, {});
  *floats_of(result) = static_cast<float>(value);
  return torch::stable::to(result, like.scalar_type());
}

Tensor rows_of(Tensor& matrix, int64_t start, int64_t count) {
  return torch::stable::narrow(matrix, 0, start, count);
}

// Computes logit_scale * image @ text^T tile by tile, and the gradients of the features from those of the
// logits.
class Tiles {
 public:
  // `keeps`: tiles lie one below the other in one matrix of logits, else each takes the place of the last.
  Tiles(const Tensor& image, const Tensor& text, const Tensor& logit_scale, int64_t offset,
        bool keeps = false)
      : dtype_(dtype_of(image, "image")), offset_(offset), keeps_(keeps) {
    require(image.dim() == 2 && text.dim() == 2 && image.size(1) == text.size(1),
            "image and text must be matrices of one width");
    require(dtype_of(text, "text") == dtype_, "text must be of image's dtype");
    require(offset >= 0 && image.size(0) > 0 && offset + image.size(0) <= text.size(0),
            "every image must have its text");
    image_ = as_contiguous(image);
    text_ = as_float32(text);
    scale_ = scalar_of(logit_scale, "logit_scale");
    height_ = std::min({rows(), kTileRows, std::max<int64_t>(1, kTileElements / columns())});
    scaled_ = new_float32(text_, {height_, width()});
    logits_ = new_float32(text_, {keeps_ ? rows() : height_, columns()});
  }

  int64_t rows() const { return image_.size(0); }
  int64_t columns() const { return text_.size(0); }
  int64_t width() const { return text_.size(1); }
  const Tensor& logits() const { return logits_; }
  Tensor vector(int64_t count) const { return new_float32(text_, {count}); }

  // Calls body(tile, its first row). The logits are computed, or copied if there are any already.
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
  // Of the gradients of both features one that isn't wanted has no elements.
  LogitGradients(const Tensor& image, const Tensor& text, const Tensor& logit_scale, int64_t offset,
                 NeedsGrad needs_grad)
      : Tiles(image, text, logit_scale, offset),
        needs_dimage_(needs_grad.at(0)),
        needs_dtext_(needs_grad.at(1)),
        like_scale_(logit_scale),
        text_dtype_(text.scalar_type()),
        // The gradient of the scale comes with that of the images, or from that of the texts.
        multiplies_text_(needs_dimage_ || !needs_dtext_ || scale_ == 0.0f),
        dimage_(multiplies_text_ ? new_like(image_, {rows(), width()}) : new_like(image_, {0})),
        dtext_(needs_dtext_ ? torch::stable::new_zeros(text_, text_.sizes()) : new_like(text_, {0})) {}

  // Takes in a tile that now holds the gradient of its logits.
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

  std::tuple<Tensor, Tensor, Tensor> result() const {
    const Tensor dimage = needs_dimage_ ? dimage_ : new_like(image_, {0});
    const double dscale = multiplies_text_ ? dscale_ : dot_product(dtext_, text_) / scale_;
    return {dimage, torch::stable::to(dtext_, text_dtype_), scalar_like(dscale, like_scale_)};
  }

 private:
  // Row by row, which keeps the digits.
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
  Tensor like_scale_;
  ScalarType text_dtype_;
  bool multiplies_text_;
  Tensor dimage_, dtext_;
  double dscale_ = 0;
};

using Statistics = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Statistics statistics(Tiles& tiles) {
  const Tensor row_lse = tiles.vector(tiles.rows());
  const Tensor positive = tiles.vector(tiles.rows());
  const Tensor row_max = tiles.vector(tiles.rows());
  const Tensor col_lse = tiles.vector(tiles.columns());
  const Tensor col_max = tiles.vector(tiles.columns());
  std::vector<float> col_sum(tiles.columns());
  std::fill_n(floats_of(col_max), tiles.columns(), -std::numeric_limits<float>::infinity());
  tiles.for_each([&](const LogitTile& tile, int64_t start) {
    const ContrastiveForward params = {
        .tile = tile,
        .row_lse = floats_of(row_lse) + start,
        .row_max = floats_of(row_max) + start,
        .positive = floats_of(positive) + start,
        .col_max = floats_of(col_max),
        .col_sum = col_sum.data(),
    };
    cpu::contrastive_forward(params, cpu::active_isa(), torch_parallel);
  });
  cpu::finish_columns(col_sum.data(), floats_of(col_max), floats_of(col_lse), tiles.columns());
  return {row_lse, col_lse, positive, row_max, col_max};
}

Statistics contrastive_forward(const Tensor& image, const Tensor& text, const Tensor& logit_scale,
                               int64_t offset) {
  Tiles tiles(image, text, logit_scale, offset);
  return statistics(tiles);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> contrastive_kept_forward(const Tensor& image,
                                                                                    const Tensor& text,
                                                                                    const Tensor& logit_scale,
                                                                                    int64_t offset) {
  Tiles tiles(image, text, logit_scale, offset, true);
  return std::tuple_cat(statistics(tiles), std::make_tuple(tiles.logits()));
}

// Without `logits` they are computed again.
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& drow_lse_any, const Tensor& dcol_lse_any,
                                            const Tensor& dpositive_any, const Tensor& image,
                                            const Tensor& text, const Tensor& logit_scale,
                                            const Tensor& row_lse_any, const Tensor& col_lse_any,
                                            const float* logits, int64_t offset, NeedsGrad needs_grad) {
  LogitGradients gradients(image, text, logit_scale, offset, needs_grad);
  const int64_t rows = gradients.rows(), columns = gradients.columns();
  const Tensor drow_lse = float_vector(drow_lse_any, rows, "drow_lse");
  const Tensor dcol_lse = float_vector(dcol_lse_any, columns, "dcol_lse");
  const Tensor dpositive = float_vector(dpositive_any, rows, "dpositive");
  const Tensor row_lse = float_vector(row_lse_any, rows, "row_lse");
  const Tensor col_lse = float_vector(col_lse_any, columns, "col_lse");
  const auto add = [&](const LogitTile& tile, int64_t start) {
    const ContrastiveBackward params = {
        .tile = tile,
        .drow_lse = floats_of(drow_lse) + start,
        .dcol_lse = floats_of(dcol_lse),
        .dpositive = floats_of(dpositive) + start,
        .row_lse = floats_of(row_lse) + start,
        .col_lse = floats_of(col_lse),
    };
    cpu::contrastive_backward(params, cpu::active_isa(), torch_parallel);
    gradients.add(tile, start);
  };
  gradients.for_each(add, logits);
  return gradients.result();
}

std::tuple<Tensor, Tensor, Tensor> contrastive_backward(const Tensor& drow_lse, const Tensor& dcol_lse,
                                                        const Tensor& dpositive, const Tensor& image,
                                                        const Tensor& text, const Tensor& logit_scale,
                                                        const Tensor& row_lse, const Tensor& col_lse,
                                                        int64_t offset, NeedsGrad needs_grad) {
  return backward(drow_lse, dcol_lse, dpositive, image, text, logit_scale, row_lse, col_lse, nullptr, offset,
                  needs_grad);
}

std::tuple<Tensor, Tensor, Tensor> contrastive_kept_backward(const Tensor& drow_lse, const Tensor& dcol_lse,
                                                             const Tensor& dpositive, const Tensor& image,
                                                             const Tensor& text, const Tensor& logit_scale,
                                                             const Tensor& row_lse, const Tensor& col_lse,
                                                             const Tensor& logits_any, int64_t offset,
                                                             NeedsGrad needs_grad) {
  const Tensor logits = float_vector(logits_any, image.size(0) * text.size(0), "logits");
  return backward(drow_lse, dcol_lse, dpositive, image, text, logit_scale, row_lse, col_lse,
                  floats_of(logits), offset, needs_grad);
}

Tensor siglip_value(const Tensor& image, const Tensor& text, const Tensor& logit_scale,
                    const Tensor& logit_bias, int64_t offset) {
  Tiles tiles(image, text, logit_scale, offset);
  const float bias = scalar_of(logit_bias, "logit_bias");
  double total = 0;
  tiles.for_each([&](const LogitTile& tile, int64_t) {
    total += cpu::siglip_value({.tile = tile, .bias = bias}, cpu::active_isa(), torch_parallel).loss;
  });
  return scalar_like(total, tiles.vector(0));
}

// The gradients are float32: backward multiplies them and rounds once.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> siglip_forward(const Tensor& image, const Tensor& text,
                                                                  const Tensor& logit_scale,
                                                                  const Tensor& logit_bias, int64_t offset,
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
  auto [dimage, dtext, dscale] = gradients.result();
  return {scalar_like(total.loss, dscale), dimage, dtext, dscale, scalar_like(total.dbias, dscale)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> siglip_backward(const Tensor& dloss, const Tensor& image,
                                                           const Tensor& text, const Tensor& logit_scale,
                                                           const Tensor& logit_bias, const Tensor& dimage,
                                                           const Tensor& dtext, const Tensor& dlogit_scale,
                                                           const Tensor& dlogit_bias) {
  const auto gradient = [&](const Tensor& unscaled, const Tensor& input) {
    AtenTensorHandle scaled = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mul_Tensor(unscaled.get(), dloss.get(), &scaled));
    return torch::stable::to(Tensor(scaled), input.scalar_type());
  };
  return {gradient(dimage, image), gradient(dtext, text), gradient(dlogit_scale, logit_scale),
          gradient(dlogit_bias, logit_bias)};
}

}  // namespace

EVAKERNELS_CPU_OPS(contrastive, m) {
  m.impl("contrastive_forward", TORCH_BOX(&contrastive_forward));
  m.impl("contrastive_backward", TORCH_BOX(&contrastive_backward));
  m.impl("contrastive_kept_forward", TORCH_BOX(&contrastive_kept_forward));
  m.impl("contrastive_kept_backward", TORCH_BOX(&contrastive_kept_backward));
  m.impl("siglip_value", TORCH_BOX(&siglip_value));
  m.impl("siglip_forward", TORCH_BOX(&siglip_forward));
  m.impl("siglip_backward", TORCH_BOX(&siglip_backward));
}

}  // namespace evakernels
