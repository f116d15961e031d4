// out = silu(gate) * up without a norm, elementwise, and its backward. Traffic: inputs and outputs once.
#include <limits>

#include "cuda/activations.cuh"
#include "cuda/norm_launch.h"
#include "cuda/norm_rows.cuh"
#include "include/swiglu.h"

namespace evakernels::cuda {
namespace {

constexpr int kThreads = 128;

// Matrices as the kernels process them: dense ones as rows of kDenseWidth, of which the last may be shorter.
struct Shape {
  int64_t size;  // elements of all rows
  int64_t width;
  SwigluRows gate;
  SwigluRows up;
};

template <class Params>
Shape shape_of(const Params& params) {
  Shape shape = {params.rows * params.width, params.width, params.gate, params.up};
  if (params.rows == 1 || (params.gate.stride == params.width && params.up.stride == params.width)) {
    shape.width = shape.gate.stride = shape.up.stride = kDenseWidth;
  }
  return shape;
}

// Calls body(row, first, vectors) for the block's parts of rows, `vectors` vectors from element `first` on.
// blockIdx.x counts rows and blockIdx.y the parts of one.
template <int E, class Body>
__device__ __forceinline__ void for_each_part(const Shape& shape, const Body& body) {
  const int64_t rows = ceil_div(shape.size, shape.width);
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const int64_t left = shape.size - row * shape.width;
    const RowPartition part((left < shape.width ? left : shape.width) / E);
    body(row, part.begin * E, part.vectors);
  }
}

template <class T, int E>
using Part = RegisterRow<T, E, kVectors<T, E>>;

template <class T, int E>
__global__ void __launch_bounds__(kThreads) swiglu_product_forward_kernel(const Shape shape, void* out) {
  for_each_part<E>(shape, [&](int64_t row, int64_t first, int vectors) {
    Part<T, E> gate, up;
    gate.set_row(shape.gate.data, row, shape.gate.stride);
    up.set_row(shape.up.data, row, shape.up.stride);
    for_each_vector<kVectors<T, E>>(vectors, [&](int vector, int slot) {
      gate.fetch(vector, slot, first);
      up.fetch(vector, slot, first);
    });
    T* const target = static_cast<T*>(out) + row * shape.width + first;
    for_each_vector<kVectors<T, E>>(vectors, [&](int vector, int slot) {
      float g[E], u[E];
      gate.get(vector, slot, g);
      up.get(vector, slot, u);
#pragma unroll
      for (int i = 0; i < E; ++i) u[i] = gated(g[i], sigmoid(g[i]), u[i]);
      store_floats(target + int64_t{vector} * E, u);
    });
  });
}

template <class T, int E>
__global__ void __launch_bounds__(kThreads)
    swiglu_product_backward_kernel(const Shape shape, const void* dout, void* dgate, void* dup) {
  for_each_part<E>(shape, [&](int64_t row, int64_t first, int vectors) {
    Part<T, E> gate, up, upstream;
    gate.set_row(shape.gate.data, row, shape.gate.stride);
    up.set_row(shape.up.data, row, shape.up.stride);
    upstream.set_row(dout, row, shape.width);
    for_each_vector<kVectors<T, E>>(vectors, [&](int vector, int slot) {
      gate.fetch(vector, slot, first);
      up.fetch(vector, slot, first);
      upstream.fetch(vector, slot, first);
    });
    const int64_t start = row * shape.width + first;
    for_each_vector<kVectors<T, E>>(vectors, [&](int vector, int slot) {
      float g[E], u[E], d[E];
      gate.get(vector, slot, g);
      up.get(vector, slot, u);
      upstream.get(vector, slot, d);
#pragma unroll
      for (int i = 0; i < E; ++i) {
        const GatedGradient gradient = gradient_of_gated(d[i], g[i], sigmoid(g[i]), u[i]);
        g[i] = gradient.gate;
        u[i] = gradient.up;
      }
      store_floats(static_cast<T*>(dgate) + start + int64_t{vector} * E, g);
      store_floats(static_cast<T*>(dup) + start + int64_t{vector} * E, u);
    });
  });
}

// Launches kernel_of(T{}, Constant<E>{}) on the parts of all rows.
template <class KernelOf, class... Pointers>
Error launch_product(const Shape& shape, DType dtype, Stream stream, const KernelOf& kernel_of,
                     Pointers... pointers) {
  if (shape.size == 0) return nullptr;
  // nvcc 12.4 captures no packs in the inner lambda.
  const auto launch_kernel = [&](auto kernel, dim3 grid, unsigned threads) {
    return launch(kernel, grid, {threads, 1, 1}, stream, shape, pointers...);
  };
  return with_element_type(dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kWide = kWidestVector<T>;
    const int64_t step = std::gcd(common_step(shape.width, shape.gate, shape.up), shape.size);
    const int elements = aligned_elements(
        kWide, step, {{shape.gate.data, dtype}, {shape.up.data, dtype}, Buffer{pointers, dtype}...});
    return with_elements<kWide>(elements, [&](auto E) {
      const RowParts parts = even_parts(shape.width / E(), kVectors<T, E()>, kThreads);
      const int64_t rows =
          std::min<int64_t>(ceil_div(shape.size, shape.width), std::numeric_limits<int>::max());
      return launch_kernel(kernel_of(element, E), {static_cast<unsigned>(rows), parts.count, 1},
                           parts.threads);
    });
  });
}

}  // namespace

Error swiglu_product_forward(const SwigluForward& params, Stream stream) {
  const auto kernel_of = [](auto element, auto E) {
    return swiglu_product_forward_kernel<decltype(element), E()>;
  };
  return launch_product(shape_of(params), params.dtype, stream, kernel_of, params.out);
}

Error swiglu_product_backward(const SwigluBackward& params, Stream stream) {
  const auto kernel_of = [](auto element, auto E) {
    return swiglu_product_backward_kernel<decltype(element), E()>;
  };
  return launch_product(shape_of(params), params.dtype, stream, kernel_of, params.dout, params.dgate,
                        params.dup);
}

Error swiglu_forward(const SwigluForward& params, Stream stream) {
  if (params.width == 0) return nullptr;
  return params.norm_weight ? swiglu_norm_forward(params, stream) : swiglu_product_forward(params, stream);
}

Error swiglu_backward(const SwigluBackward& params, Scratch& scratch, Stream stream) {
  if (params.width == 0) return nullptr;
  return params.norm_weight ? swiglu_norm_backward(params, scratch, stream)
                            : swiglu_product_backward(params, stream);
}

}  // namespace evakernels::cuda
