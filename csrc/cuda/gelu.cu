// out = gelu(x + bias), and in one pass over dout and x the gradients of both: backward computes the sum
// again. Each byte is read once and each byte of out and dx written once.
//
// A block has a strip of columns and goes down the rows, with the bias of its columns in registers, and the
// sums for their gradient. Without a bias there are no columns: what is dense is taken as rows of
// kDenseWidth.
#include <numeric>

#include "cuda/activations.cuh"
#include "cuda/column_sums.cuh"
#include "cuda/dispatch.h"
#include "cuda/gelu.h"
#include "cuda/norm_parameters.cuh"

namespace evakernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBackwardBlocks = 3;  // of a multiprocessor, at least
constexpr int64_t kDenseWidth = 4096;

// Of a thread, of one row of one matrix: 32 bytes.
template <class T, int E>
constexpr int kVectors = smaller(8, 32 / (E * int{sizeof(T)}));

struct Shape {
  int64_t size;  // of all rows together; the last one may be shorter
  int64_t width;
};

template <class Params>
Shape shape_of(const Params& params) {
  return {params.rows * params.width, params.bias ? params.width : kDenseWidth};
}

// The columns of a block: the even part of a row that blockIdx.y tells.
template <int E>
class Strip {
 public:
  __device__ __forceinline__ explicit Strip(const Shape& shape) : shape_(shape) {
    const int64_t vectors = shape.width / E;
    const int64_t part = (vectors + gridDim.y - 1) / gridDim.y;
    const int64_t left = vectors - blockIdx.y * part;
    first_ = blockIdx.y * part * E;
    vectors_ = static_cast<int>(left < part ? left : part);
  }

  __device__ __forceinline__ int64_t rows() const { return (shape_.size + shape_.width - 1) / shape_.width; }
  __device__ __forceinline__ int64_t first() const { return first_; }
  __device__ __forceinline__ int vectors() const { return vectors_; }

  // Of a row, which may end within the strip or in front of it.
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
    RowPart<T, E, V> part;
    part.point_to(x, row, shape.width);
    for_each_vector<V>(vectors, [&](int vector, int slot) { part.fetch(vector, slot, strip.first()); });
    T* const target = static_cast<T*>(out) + row * shape.width + strip.first();
    for_each_vector<V>(vectors, [&](int vector, int slot) {
      float values[E];
      part.get(vector, slot, values);
      bias_part.add_to(values, slot);
#pragma unroll
      for (int i = 0; i < E; ++i) values[i] = Gelu::of(values[i]);
      Packed<T, E>::pack(values).store_whole(target + int64_t{vector} * E);
    });
  }
}

// partials is [gridDim.x, width], or null: no gradient of the bias is wanted.
template <class T, int E, class Gelu>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks)
    gelu_backward_kernel(const Shape shape, const void* dout, const void* x, const ParameterVector bias,
                         void* dx, float* partials) {
  constexpr int V = kVectors<T, E>;
  const Strip<E> strip(shape);
  const BiasPart<E, V> bias_part(bias, strip);
  ColumnSums<1, E, V, true> sums(partials ? partials + strip.first() : nullptr, shape.width,
                                 int64_t{strip.vectors()} * E);
  for (int64_t row = first_row(); row < strip.rows(); row += row_step()) {
    const int vectors = strip.vectors_of(row);
    RowPart<T, E, V> part, upstream;
    part.point_to(x, row, shape.width);
    upstream.point_to(dout, row, shape.width);
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
      Packed<T, E>::pack(gradient).store_whole(target + int64_t{vector} * E);
      sums.add(0, vector, slot, gradient);
    });
  }
  sums.write();
}

// Calls body(kernel, grid, block), where kernel_of(T{}, Constant<E>{}, Gelu{}) names the kernel. There are as
// many blocks as run at the same time, or fewer if the rows are few.
template <class Params, class KernelOf, class Body>
Error with_kernel(const Params& params, const std::vector<const void*>& matrices, const KernelOf& kernel_of,
                  const Body& body) {
  const Shape shape = shape_of(params);
  return with_element_type(params.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kWide = kWidestAccess / int{sizeof(T)};
    std::vector<Buffer> buffers = {{params.bias, params.bias_dtype}};
    for (const void* matrix : matrices) buffers.push_back({matrix, params.dtype});
    const auto with_vectors = [&](auto E) {
      constexpr int V = kVectors<T, E()>;
      const int64_t vectors = shape.width / E();
      const int64_t strips = ceil_div(vectors, V * kThreads);
      const int64_t warps = ceil_div(ceil_div(ceil_div(vectors, strips), V), kWarpSize);
      const dim3 block = {static_cast<unsigned>(warps * kWarpSize), warps == 1 ? kRowsPerBlock : 1u, 1};
      const auto launch_it = [&](auto gelu) {
        const auto kernel = kernel_of(element, E, gelu);
        const int64_t resident = resident_blocks(kernel, static_cast<int>(block.x * block.y));
        const int64_t rows = ceil_div(ceil_div(shape.size, shape.width), block.y);
        const int64_t groups = std::min(rows, std::max<int64_t>(1, resident / strips));
        return body(kernel, dim3{static_cast<unsigned>(groups), static_cast<unsigned>(strips), 1}, block);
      };
      return params.tanh ? launch_it(TanhGelu{}) : launch_it(ExactGelu{});
    };
    // Nothing in between: every model's hidden width is a multiple of 16 bytes.
    const int elements = aligned_elements(kWide, std::gcd(shape.width, shape.size), buffers);
    return elements == kWide ? with_vectors(Constant<kWide>{}) : with_vectors(Constant<1>{});
  });
}

template <class Body>
Error with_backward(const GeluBackward& params, const Body& body) {
  const auto kernel_of = [](auto element, auto E, auto gelu) {
    return gelu_backward_kernel<decltype(element), E(), decltype(gelu)>;
  };
  return with_kernel(params, {params.dout, params.x, params.dx}, kernel_of, body);
}

struct WriteGradient {
  ParameterGradient bias;

  __device__ void operator()(int64_t column, const float (&sums)[1]) const {
    write_gradient(bias, column, sums[0]);
  }
};

}  // namespace

Error gelu_forward(const GeluForward& params, Stream stream) {
  if (params.rows == 0 || params.width == 0) return nullptr;
  const auto kernel_of = [](auto element, auto E, auto gelu) {
    return gelu_forward_kernel<decltype(element), E(), decltype(gelu)>;
  };
  return with_kernel(params, {params.x, params.out}, kernel_of, [&](auto kernel, dim3 grid, dim3 block) {
    const ParameterVector bias = {params.bias, params.bias_dtype};
    return launch(kernel, grid, block, stream, shape_of(params), params.x, bias, params.out);
  });
}

int64_t gelu_backward_workspace(const GeluBackward& params) {
  int64_t size = 0;
  if (!params.dbias || params.width == 0) return size;
  with_backward(params, [&](auto, dim3 grid, dim3) -> Error {
    size = grid.x * params.width;
    return nullptr;
  });
  return size;
}

Error gelu_backward(const GeluBackward& params, float* workspace, Stream stream) {
  if (params.width == 0) return nullptr;
  return with_backward(params, [&](auto kernel, dim3 grid, dim3 block) -> Error {
    if (grid.x > 0) {
      const ParameterVector bias = {params.bias, params.bias_dtype};
      const Error error = launch(kernel, grid, block, stream, shape_of(params), params.dout, params.x, bias,
                                 params.dx, params.dbias ? workspace : nullptr);
      if (error) return error;
    }
    if (!params.dbias) return nullptr;
    const WriteGradient finish = {{params.dbias, params.bias_dtype}};
    return launch_column_totals<1>(workspace, grid.x, params.width, finish, stream);
  });
}

}  // namespace evakernels::cuda
