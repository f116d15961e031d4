// One function per op makes both the torch operator in _ops.so and the Python function in _C.
//
// A binding is `void op(Call& call, arguments...)`: it reads inputs and allocates outputs through the call,
// and launches the kernels. Its file is compiled for each library, where the argument types mean:
//
//   Input, OptionalInput, Inputs   a tensor, a tensor or None, a list of tensors
//   Output                         torch: a result, allocated by the call; Python: an array of the caller
//   Either<A, B>                   torch: A; Python: B
//   NeedsGrad                      torch: which gradients to compute; Python: Absent, as None leaves one out
//   Absent                         no argument in this library
//
// EVAKERNELS_OPS(family, m) { EVAKERNELS_OP(m, op, names, defaults, docstring); } registers them.
//
// EVAKERNELS_CUDA: the build includes the kernels of csrc/cuda. EVAKERNELS_INTERPRETED: a test build, in
// which an interpreter runs the PTX of these kernels on CPU tensors instead of the CPU kernels.
#pragma once

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>

#include "bind/array.h"
#include "include/launcher.h"

namespace evakernels {

#ifdef EVAKERNELS_CUDA
constexpr bool kCudaIsBuilt = true;
#else
constexpr bool kCudaIsBuilt = false;
#endif
#ifdef EVAKERNELS_INTERPRETED
constexpr bool kCudaIsInterpreted = true;
#else
constexpr bool kCudaIsInterpreted = false;
#endif

inline void raise_if_any(const char* op, cuda::Error error) {
  if (error) throw std::runtime_error(std::string(op) + ": CUDA error: " + error);
}

// Calls a GPU launcher, with or without scratch memory, and raises its error.
template <auto Cuda, class Params>
void call_launcher(const char* op, const Params& params, cuda::Scratch& scratch, cuda::Stream stream) {
  if constexpr (std::is_invocable_v<decltype(Cuda), const Params&, cuda::Stream>) {
    raise_if_any(op, Cuda(params, stream));
  } else {
    raise_if_any(op, Cuda(params, scratch, stream));
  }
}

struct Absent {};

enum class Source { Caller, Call, Nobody };

template <class Argument>
constexpr Source kSource = Source::Caller;
template <>
inline constexpr Source kSource<Absent> = Source::Nobody;

}  // namespace evakernels

#ifdef EVAKERNELS_PYTHON
#include "bind/python_call.h"
#else
#include "bind/torch_call.h"
#endif

namespace evakernels {

// Float32 vectors of `count` elements.
inline float* output_floats(Call& call, Output output, const char* name, int64_t count) {
  return call.output(output, name, {&count, 1}, DType::Float32).floats();
}
inline const float* read_floats(Call& call, Input input, const char* name, int64_t count) {
  const Array array = call.read(input, name);
  require_dtype(array, DType::Float32);
  require_sizes(array, {count});
  return array.floats();
}

// The public function of a binding.
template <auto kBinding>
struct Bound;

template <class... Args, void (*kBinding)(Call&, Args...)>
struct Bound<kBinding> {
  static constexpr std::array<Source, sizeof...(Args)> kSources = {kSource<Args>...};
  static constexpr size_t kOutputs = std::count(kSources.begin(), kSources.end(), Source::Call);

  // Number of arguments before `i` with the same source.
  static constexpr size_t rank(size_t i) {
    return std::count(kSources.begin(), kSources.begin() + i, kSources[i]);
  }

  template <class Argument>
  using IfPassed =
      std::conditional_t<kSource<Argument> == Source::Caller, std::tuple<Argument>, std::tuple<>>;
  using Passed = decltype(std::tuple_cat(std::declval<IfPassed<Args>>()...));

  template <size_t I, class Tuple, class Outputs>
  static decltype(auto) argument(Tuple& passed, Outputs& outputs) {
    if constexpr (kSources[I] == Source::Caller) {
      return std::get<rank(I)>(passed);
    } else if constexpr (kSources[I] == Source::Call) {
      return (outputs[rank(I)]);
    } else {
      return std::tuple_element_t<I, std::tuple<Args...>>{};
    }
  }

  template <class Tuple, class Outputs, size_t... I>
  static void run(Call& call, Tuple passed, Outputs& outputs, std::index_sequence<I...>) {
    kBinding(call, argument<I>(passed, outputs)...);
  }

  template <class = Passed>
  struct Function;

  template <class... P>
  struct Function<std::tuple<P...>> {
#ifdef EVAKERNELS_PYTHON
    static void call(P... passed, const IsaName& isa, uintptr_t stream) {
      Call call(isa, stream);
      run(call, std::forward_as_tuple(passed...), call, std::index_sequence_for<Args...>());
    }
#else
    static auto call(P... passed) {
      Call call;
      std::array<std::optional<Tensor>, kOutputs> outputs;
      run(call, std::forward_as_tuple(passed...), outputs, std::index_sequence_for<Args...>());
      if constexpr (kOutputs == 1) {
        return std::move(*outputs[0]);
      } else if constexpr (kOutputs > 1) {
        return std::apply([](auto&... output) { return std::make_tuple(std::move(*output)...); }, outputs);
      }
    }
#endif
  };
};

}  // namespace evakernels
