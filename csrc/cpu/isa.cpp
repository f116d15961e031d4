#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>

namespace evakernels::cpu {
namespace {

constexpr const char* kOverride = "EVAKERNELS_ISA";

bool machine_has(Isa isa) {
#ifdef EVAKERNELS_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::Avx2) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (isa == Isa::Avx512) return avx512;
  if (isa == Isa::Avx512Bf16) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return isa == Isa::Baseline;
}

std::string join(const std::vector<Isa>& isas) {
  std::string text;
  for (Isa isa : isas) text += (text.empty() ? "" : ", ") + std::string(name(isa));
  return text;
}

Isa choose() {
  const char* wanted = std::getenv(kOverride);
  if (wanted == nullptr || *wanted == '\0') return available_isas().back();
  try {
    return parse_isa(wanted);
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(std::string(kOverride) + ": " + error.what());
  }
}

}  // namespace

const char* name(Isa isa) {
  switch (isa) {
    case Isa::Avx512Bf16:
      return "avx512_bf16";
    case Isa::Avx512:
      return "avx512";
    case Isa::Avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

std::vector<Isa> built_isas() {
#ifdef EVAKERNELS_X86
  return {Isa::Baseline, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16};
#else
  return {Isa::Baseline};
#endif
}

std::vector<Isa> available_isas() {
  std::vector<Isa> isas;
  for (Isa isa : built_isas()) {
    if (machine_has(isa)) isas.push_back(isa);
  }
  return isas;
}

Isa parse_isa(std::string_view text) {
  for (Isa isa : built_isas()) {
    if (text != name(isa)) continue;
    if (machine_has(isa)) return isa;
    throw std::invalid_argument("this machine lacks the instruction set '" + std::string(text) +
                                "'; available: " + join(available_isas()));
  }
  throw std::invalid_argument("unknown instruction set '" + std::string(text) +
                              "'; available: " + join(available_isas()));
}

Isa active_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace evakernels::cpu
