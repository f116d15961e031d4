// The namespaces of what is compiled once for each instruction set.
#pragma once

// A declaration in the namespace of each instruction set, and what that of `isa` has by this name; `isa`
// is an evakernels::cpu::Isa. Amx has Avx512Bf16's: only attention in bfloat16 is compiled for it.
#ifdef EVAKERNELS_X86
#define EVAKERNELS_FOR_EACH_ISA(declaration) \
  namespace baseline {                       \
  declaration                                \
  }                                          \
  namespace avx2 {                           \
  declaration                                \
  }                                          \
  namespace avx512 {                         \
  declaration                                \
  }                                          \
  namespace avx512_bf16 {                    \
  declaration                                \
  }
#define EVAKERNELS_OF_ISA(isa, name)            \
  ((isa) >= Isa::Avx512Bf16 ? avx512_bf16::name \
   : (isa) == Isa::Avx512   ? avx512::name      \
   : (isa) == Isa::Avx2     ? avx2::name        \
                            : baseline::name)
#else
#define EVAKERNELS_FOR_EACH_ISA(declaration) \
  namespace baseline {                       \
  declaration                                \
  }
#define EVAKERNELS_OF_ISA(isa, name) (static_cast<void>(isa), baseline::name)
#endif
