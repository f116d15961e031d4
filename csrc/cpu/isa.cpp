#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>

#ifdef EVAKERNELS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace evakernels::cpu {
namespace {

constexpr const char* kOverride = "EVAKERNELS_ISA";

#ifdef EVAKERNELS_AMX
// AMX tiles with bfloat16 matmuls. On Linux a process must request permission for the tile state.
bool has_tiles() {
  constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24, kStates = 3u << 17;
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBFloat16) == 0 || (d & kTiles) == 0) return false;
  unsigned low, high;
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & kStates) == kStates && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#endif

bool machine_has(Isa isa) {
#ifdef EVAKERNELS_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::Avx2) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (isa == Isa::Avx512) return avx512;
  const bool avx512_bf16 =
      avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  if (isa == Isa::Avx512Bf16) return avx512_bf16;
#ifdef EVAKERNELS_AMX
  static const bool tiles = avx512_bf16 && has_tiles();
  if (isa == Isa::Amx) return tiles;
#endif
#endif
  return isa == Isa::Baseline;
}

std::string join(const std::vector<Isa>& isas) {
  std::string text;
  for (Isa isa : isas) text += (text.empty() ? "" : ", ") + std::string(name(isa));
  return text;
}

Isa best() {
  for (Isa isa : {Isa::Amx, Isa::Avx512Bf16, Isa::Avx512, Isa::Avx2}) {
    if (machine_has(isa)) return isa;
  }
  return Isa::Baseline;
}

Isa choose() {
  const char* wanted = std::getenv(kOverride);
  if (wanted == nullptr || *wanted == '\0') return best();
  try {
    return parse_isa(wanted);
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(std::string(kOverride) + ": " + error.what());
  }
}

}  // namespace

const char* name(Isa isa) {
  switch (isa) {
    case Isa::Amx:
      return "amx";
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
#if defined(EVAKERNELS_AMX)
  return {Isa::Baseline, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16, Isa::Amx};
#elif defined(EVAKERNELS_X86)
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
