// out = gelu(x + bias), and its backward in one pass over dout and x. Traffic: inputs and outputs once.
//
// A block loops over the rows of a strip of columns, with their bias and the sums of its gradient in
// registers. Without a bias a dense matrix is processed as rows of kDenseWidth.
#include <algorithm>
#include <numeric>

#include "cuda/activations.cuh"
#include "cuda/column_sums.cuh"
#include "cuda/norm_plan.h"
#include "include/gelu.h"

namespace evakernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBackwardBlocks = 3;  // minimum per SM
// Terms per float32 partial sum of the bias gradient, as rounding errors grow with the terms.
constexpr int64_t kRowsPerSum = 512;

struct Shape {
  int64_t size;  // elements of all rows; the last row may be shorter
  int64_t width;
};

template <class Params>
Shape shape_of(const Params& params) {
  return {params.rows * params.width, params.bias ? params.width : kDenseWidth};
}

// A block's columns: its part of each row.
template <int E>
class Strip {
 public:
  __device__ __forceinline__ explicit Strip(const Shape& shape) : shape_(shape) {
    const RowPartition part(shape.width / E);
    first_ = part.begin * E;
    vectors_ = part.vectors;
  }

  __device__ __forceinline__ int64_t rows() const { return ceil_div(shape_.size, shape_.width); }
  __device__ __forceinline__ int64_t first() const { return first_; }
  __device__ __forceinline__ int vectors() const { return vectors_; }

  // Vectors of a row, which may end within the strip or before it.
  __device__ __forceinline__ int vectors_of(int64_t row) const {
    const int64_t left = (shape_.size - row * shape_.width - first_) / E;
    return static_cast<int>(left < vectors_ ? left : vectors_);
  }

 private:
  Shape shape_;
  int64_t first_;
  int vectors_;
};

// A thread's part of the bias.
template <int E, int V>
class BiasPart {
 public:
  __device__ __forceinline__ BiasPart(const ParameterVector& bias, const Strip<E>& strip) {
#pragma unroll
    for (int slot = 0; slot < V; ++slot) {
#pragma unroll
      for (int i = 0; i < E; ++i) values_[slot][i] = 0.0f;
    }
    if (!bias.data) return;
    for_each_vector<V>(strip.vectors(), [&](int vector, int slot) {
      load_floats(bias.data, bias.dtype, strip.first() + int64_t{vector} * E, values_[slot]);
    });
  }

  __device__ __forceinline__ void add_to(float (&values)[E], int slot) const {
#pragma unroll
    for (int i = 0; i < E; ++i) values[i] += values_[slot][i];
  }

 private:
  float values_[V][E];
};

template <class T, int E, class Gelu>
__global__ void __launch_bounds__(kThreads)
    gelu_forward_kernel(const Shape shape, const void* x, const ParameterVector bias, void* out) {
  constexpr int V = kVectors<T, E>;
  const Strip<E> strip(shape);
  const BiasPart<E, V> bias_part(bias, strip);
  for (int64_t row = first_row(); row < strip.rows(); row += row_step()) {
    const int vectors = strip.vectors_of(row);
    RegisterRow<T, E, V> part;
    part.set_row(x, row, shape.width);
    for_each_vector<V>(vectors, [&](int vector, int slot) { part.fetch(vector, slot, strip.first()); });
    T* const target = static_cast<T*>(out) + row * shape.width + strip.first();
    for_each_vector<V>(vectors, [&](int vector, int slot) {
      float values[E];
      part.get(vector, slot, values);
      bias_part.add_to(values, slot);
#pragma unroll
      for (int i = 0; i < E; ++i) values[i] = Gelu::of(values[i]);
      Packed<T, E>::pack(values).store_vector(target + int64_t{vector} * E);
    });
  }
}

// partials: [gridDim.x, width], or null if the bias needs no gradient.
template <class T, int E, class Gelu>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks)
    gelu_backward_kernel(const Shape shape, const void* dout, const void* x, const ParameterVector bias,
                         void* dx, float* partials) {
  constexpr int V = kVectors<T, E>;
  const Strip<E> strip(shape);
  const BiasPart<E, V> bias_part(bias, strip);
  ColumnSums<1, E, V, true> sums(partials ? partials + strip.first() : nullptr, shape.width,  // #strip
                                 int64_t{strip.vectors()} * E);
  for (int64_t row = first_row(); row < strip.rows(); row += row_step()) {
    const int vectors = strip.vectors_of(row);
    RegisterRow<T, E, V> part, upstream;
    part.set_row(x, row, shape.width);
    upstream.set_row(dout, row, shape.width);
    for_each_vector<V>(vectors, [&](int vector, int slot) {
      part.fetch(vector, slot, strip.first());
      upstream.fetch(vector, slot, strip.first());
    });
    T* const target = static_cast<T*>(dx) + row * shape.width + strip.first();
    for_each_vector<V>(vectors, [&](int vector, int slot) {
      float values[E], gradient[E];
      part.get(vector, slot, values);
      upstream.get(vector, slot, gradient);
      bias_part.add_to(values, slot);
#pragma unroll
      for (int i = 0; i < E; ++i) gradient[i] *= Gelu::derivative(values[i]);
      Packed<T, E>::pack(gradient).store_vector(target + int64_t{vector} * E);
      sums.add(0, vector, slot, gradient);
    });
  }
  sums.write();
}

struct WriteGradient {
  ParameterGradient bias;

  __device__ void operator()(int64_t column, const float (&sums)[1]) const {
    write_gradient(bias, column, sums[0]);
  }
};

// Grid of a kernel with E elements per access: the resident blocks per strip, fewer if there are fewer rows,
// and more if a thread would add up more than kRowsPerSum rows.
template <class T, int E, class... Parameters>
LaunchPlan<Parameters...> plan_strips(void (*kernel)(Parameters...), const Shape& shape) {
  const RowParts strips = even_parts(shape.width / E, kVectors<T, E>, kThreads);
  const unsigned rows_per_block = strips.threads == kWarpSize ? kRowsPerBlock : 1;
  LaunchPlan<Parameters...> plan = {kernel, {1, strips.count, 1}, {strips.threads, rows_per_block, 1}, 0};
  const int64_t rows = ceil_div(ceil_div(shape.size, shape.width), rows_per_block);
  const int64_t resident = plan.resident_blocks() / strips.count;
  plan.grid.x =
      static_cast<unsigned>(std::min(rows, std::max({int64_t{1}, resident, ceil_div(rows, kRowsPerSum)})));
  return plan;
}

// kernel_of(T{}, Constant<E>{}, Gelu{}) returns the kernel.
template <class Params, class KernelOf>
auto plan_gelu(const Params& params, const std::vector<Buffer>& buffers, const KernelOf& kernel_of) {
  const Shape shape = shape_of(params);
  return with_element_type(params.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kWide = kWidestVector<T>;
    const auto kernel = [&](auto E) {
      switch (params.form) {
        case GeluForm::Tanh:
          return kernel_of(element, E, TanhGelu{});
        case GeluForm::Sigmoid:
          return kernel_of(element, E, SigmoidGelu{});
        default:
          return kernel_of(element, E, ExactGelu{});
      }
    };
    // No width in between: every model's hidden width is a multiple of 16 bytes.
    const int elements = aligned_elements(kWide, std::gcd(shape.width, shape.size), buffers);
    return elements == kWide ? plan_strips<T, kWide>(kernel(Constant<kWide>{}), shape)
                             : plan_strips<T, 1>(kernel(Constant<1>{}), shape);
  });
}

}  // namespace

Error gelu_forward(const GeluForward& params, Stream stream) {
  if (params.width == 0) return nullptr;
  const ParameterVector bias = {params.bias, params.bias_dtype};
  const auto plan = plan_gelu(params, {{params.x, params.dtype}, {params.out, params.dtype}, buffer_of(bias)},
                              [](auto element, auto E, auto gelu) {
                                return gelu_forward_kernel<decltype(element), E(), decltype(gelu)>;
                              });
  return plan.launch(stream, shape_of(params), params.x, bias, params.out);
}

Error gelu_backward(const GeluBackward& params, Scratch& scratch, Stream stream) {
  if (params.width == 0) return nullptr;
  const ParameterVector bias = {params.bias, params.bias_dtype};
  const auto plan = plan_gelu(
      params,
      {{params.dout, params.dtype}, {params.x, params.dtype}, {params.dx, params.dtype}, buffer_of(bias)},
      [](auto element, auto E, auto gelu) {
        return gelu_backward_kernel<decltype(element), E(), decltype(gelu)>;
      });
  std::optional<WriteGradient> finish;
  if (params.dbias) finish = {{params.dbias, params.bias_dtype}};
  return launch_with_column_sums<1>(plan, params.width, finish, scratch, stream, shape_of(params),
                                    params.dout, params.x, bias, params.dx);
}

}  // namespace evakernels::cuda
