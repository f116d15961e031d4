// Array views of inputs and outputs, and the checks that bindings share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "include/launcher.h"

namespace evakernels {

// Formats the message only on failure: a call has dozens of checks.
template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) throw std::invalid_argument((std::string() + ... + parts));
}

using Sizes = std::span<const int64_t>;

struct Array {
  const char* name = "";
  void* data = nullptr;
  DType dtype = DType::Float32;  // no meaning for an index
  Sizes sizes;
  Sizes strides;  // in elements
  bool exists = false;
  bool is_int32 = false;  // index dtype; otherwise int64

  explicit operator bool() const { return exists; }
  float* floats() const { return static_cast<float*>(data); }
};

inline Array no_array(const char* name) {
  Array array;
  array.name = name;
  return array;
}

inline const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::BFloat16:
      return "bfloat16";
    case DType::Float16:
      return "float16";
    default:
      return "float32";
  }
}

inline std::string text_of(Sizes sizes) {
  std::string text;
  for (int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

inline int64_t product(Sizes sizes) {
  int64_t total = 1;
  for (int64_t size : sizes) total *= size;
  return total;
}

inline bool same(Sizes a, Sizes b) { return std::equal(a.begin(), a.end(), b.begin(), b.end()); }

inline void require_dtype(const Array& array, DType dtype) {
  require(array.dtype == dtype, array.name, " is ", name_of(array.dtype), ", but must be ", name_of(dtype));
}

inline void require_sizes(const Array& array, Sizes sizes) {
  if (same(array.sizes, sizes)) return;
  require(false, array.name, " has shape ", text_of(array.sizes), ", but must have ", text_of(sizes));
}

inline void require_sizes(const Array& array, std::initializer_list<int64_t> sizes) {
  require_sizes(array, Sizes(sizes.begin(), sizes.size()));
}

inline void require_like(const Array& array, const Array& other) {
  require_sizes(array, other.sizes);
  require_dtype(array, other.dtype);
}

// An array as rows of its last dimension.
struct RowSizes {
  int64_t rows;
  int64_t width;

  explicit RowSizes(const Array& x)
      : rows((require(!x.sizes.empty(), x.name, " must have at least one dimension"),
              product(x.sizes.first(x.sizes.size() - 1)))),
        width(x.sizes.back()) {}
};

// Checks parameters of a norm or their gradients: [width], all of one dtype, which is x's, y's or float32.
// Returns it.
inline DType parameter_dtype(const Array& x, std::initializer_list<const Array*> parameters,
                             const Array* y = nullptr) {
  const Array* first = nullptr;
  const DType other = y ? y->dtype : x.dtype;
  for (const Array* parameter : parameters) {
    if (!*parameter) continue;
    const char* const name = parameter->name;
    require(parameter->sizes.size() == 1 && parameter->sizes[0] == x.sizes.back(), name,
            " must have one element for each of the ", std::to_string(x.sizes.back()), " columns");
    require(parameter->dtype == x.dtype || parameter->dtype == other || parameter->dtype == DType::Float32,
            name, " must be float32 or of ", x.name, "'s dtype", other == x.dtype ? "" : " or ",
            other == x.dtype ? "" : y->name, other == x.dtype ? "" : "'s");
    require(!first || parameter->dtype == first->dtype, name, " must be of ", first ? first->name : "",
            "'s dtype");
    if (!first) first = parameter;
  }
  return first ? first->dtype : x.dtype;
}

// Checks the mean and reciprocal standard deviation of each row, of any shape.
inline void require_statistics(const Array& mean, const Array& rstd, int64_t rows, bool has_mean = true) {
  require(!has_mean || mean, "mean is needed unless rms=True");
  for (const Array* array : {&mean, &rstd}) {
    if (!*array) continue;
    require_dtype(*array, DType::Float32);
    require(product(array->sizes) == rows, "mean and rstd must have one element for each of the ",
            std::to_string(rows), " rows");
  }
}

}  // namespace evakernels
