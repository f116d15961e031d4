// evakernels._C: build information, and the operators of _ops.so on arrays that the caller allocated.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <iterator>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "cpu/isa.h"

namespace evakernels {
namespace {

namespace py = pybind11;
using namespace pybind11::literals;

std::vector<std::string> names(const std::vector<cpu::Isa>& isas) {
  std::vector<std::string> result;
  for (cpu::Isa isa : isas) result.emplace_back(cpu::name(isa));
  return result;
}

std::vector<std::string> words(const char* text) {
  std::istringstream stream(text);
  return {std::istream_iterator<std::string>(stream), {}};
}

py::dict build_info() {
  return py::dict("version"_a = EVAKERNELS_VERSION, "compiler"_a = EVAKERNELS_COMPILER,
                  "isas_built"_a = names(cpu::built_isas()),
                  "isas_available"_a = names(cpu::available_isas()),
                  "cuda_archs"_a = words(EVAKERNELS_CUDA_ARCHS));
}

py::object torch(const char* name) { return py::module_::import("torch").attr(name); }

py::object operators() { return torch("ops").attr("evakernels_native"); }

// Returns a tensor on the memory of an array, tensors for a list of arrays, and other values as they are.
// `written`: name of an argument that is written; null otherwise.
py::object as_tensor(const py::handle& value, const char* written = nullptr) {
  auto array = py::reinterpret_borrow<py::object>(value);
  if (py::isinstance<py::list>(value)) {
    py::list tensors;
    for (const py::handle element : value) tensors.append(as_tensor(element, written));
    return tensors;
  }
  if (py::isinstance<py::buffer>(value)) {
    const py::memoryview view(array);
    // Torch writes into read-only arrays, too.
    if (written && view.attr("readonly").cast<bool>()) {
      throw py::value_error(std::string(written) + " must be writable");
    }
    // py::array needs pthread_once of glibc 2.34.
    array = py::module_::import("numpy").attr("asarray")(view);
  } else if (!py::hasattr(value, "__dlpack__")) {
    return array;
  }
  return torch("from_dlpack")(array);  // NumPy's lacks bfloat16 and GPUs
}

// Replaces arrays among the arguments by tensors.
void convert_arguments(const py::object& schema, py::list& args, py::kwargs& options) {
  size_t position = 0;
  for (const py::handle argument : schema.attr("arguments")) {
    const auto name = argument.attr("name").cast<std::string>();
    const py::object alias = argument.attr("alias_info");
    const bool is_written = !alias.is_none() && alias.attr("is_write").cast<bool>();
    const char* const written = is_written ? name.c_str() : nullptr;
    if (position < args.size()) args[position] = as_tensor(args[position], written);
    if (options.contains(name)) options[name.c_str()] = as_tensor(options[name.c_str()], written);
    ++position;
  }
}

// Sets the options of the thread's operators, and takes them back when it dies.
class LaunchScope {
 public:
  LaunchScope(const py::list& out, const std::optional<std::string>& isa) {
    set_options_(as_tensor(out, "out"), isa);
  }
  LaunchScope(const LaunchScope&) = delete;
  LaunchScope& operator=(const LaunchScope&) = delete;
  ~LaunchScope() { set_options_(py::list(), py::none()); }

 private:
  py::object set_options_ = operators().attr("set_launch_options");
};

py::object launch(const py::object& op, py::list args, const py::list& out,
                  const std::optional<std::string>& isa, py::kwargs options) {
  const py::object schema = op.attr("_schema");
  const size_t results = py::len(schema.attr("returns"));
  if (!out.empty() && out.size() != results) {
    throw py::value_error("out must have " + std::to_string(results) + " elements, got " +
                          std::to_string(out.size()));
  }
  convert_arguments(schema, args, options);
  const LaunchScope scope(out, isa);
  return op(*args, **options);
}

py::object launcher(const std::string& name) {
  if (!py::hasattr(operators(), name.c_str()))
    throw py::attribute_error("_C has no attribute '" + name + "'");
  const py::object op = operators().attr(name.c_str()).attr("default");
  const auto function = [op](const py::args& args, const py::list& out, const std::optional<std::string>& isa,
                             const py::kwargs& options) {
    return launch(op, py::list(args), out, isa, options);
  };
  const std::string schema = py::str(op.attr("_schema"));
  return py::cpp_function(function, py::name(name.c_str()), "out"_a = py::list(), "isa"_a = py::none(),
                          py::doc(schema.c_str()));
}

constexpr const char* kDoc = R"(What was built, what this machine can run, and a launcher of each operator.

`_C.NAME(*arguments, out=[...], isa=None)` runs the operator with this name. Its docstring is the operator's schema.
An array is anything with DLPack or the buffer protocol. out: a contiguous array for each result, or None if the
result isn't computed. Returns the results as tensors on these arrays; without `out` torch allocates them.
isa: "baseline", "avx2", "avx512", "avx512_bf16", "amx", or None for the active one; CPU only.

Kernels run on torch's threads, on a GPU on torch's current stream. Wrong arrays raise a ValueError that names them.)";

}  // namespace
}  // namespace evakernels

PYBIND11_MODULE(_C, m) {
  using namespace evakernels;
  m.doc() = kDoc;
  m.def("build_info", &build_info,
        "Version, compiler, instruction sets built and available, GPUs built for.");
  m.def(
      "active_isa", [] { return std::string(cpu::name(cpu::active_isa())); },
      "The instruction set in use: $EVAKERNELS_ISA, else the best available one; ValueError "
      "if that one is unavailable.");
  m.def("__getattr__", &launcher);
}
