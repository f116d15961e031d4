// AMX for a process whose machine has AVX-512 alone: loaded in front of it (LD_PRELOAD), this carries out the
// tile instructions that the machine refuses, as Intel's manual defines them, and ends the process where
// hardware would raise an exception. The kernels' own machine code runs, under the instruction set that is
// chosen below.
#include <immintrin.h>
#include <signal.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cpu/isa.h"

// In place of the library's own: it lets itself be overruled, as all that is exported.
evakernels::cpu::Isa evakernels::cpu::active_isa() { return Isa::Amx; }

extern "C" {
std::atomic<uint64_t> emulated_products, emulated_loads, emulated_stores, emulated_configurations;
}

namespace {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

struct Configuration {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Configuration) == 64);

// Beyond its rows and their bytes a tile is zero.
struct Tiles {
  Configuration shapes;
  alignas(64) uint8_t data[kTiles][kRows][kRowBytes];
};
thread_local Tiles tiles;

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "AMX emulator: %s\n", what);
  std::_Exit(99);
}

// --- what the instructions do ------------------------------------------------------------------------------

void release() { std::memset(&tiles, 0, sizeof tiles); }

void configure(const uint8_t* memory) {
  Configuration shapes;
  std::memcpy(&shapes, memory, sizeof shapes);
  release();
  if (shapes.palette == 0) return;
  require(shapes.palette == 1 && shapes.start_row == 0, "palette or first row");
  for (uint8_t byte : shapes.reserved) require(byte == 0, "reserved bytes of a configuration");
  for (int i = 0; i < 16; ++i) {
    const int rows = shapes.rows[i], bytes = shapes.row_bytes[i];
    require(
        i < kTiles ? rows <= kRows && bytes <= kRowBytes && (rows == 0) == (bytes == 0) : rows + bytes == 0,
        "shape of a tile");
  }
  tiles.shapes = shapes;
}

int rows_of(int tile) {
  require(tiles.shapes.palette == 1, "no configuration");
  require(tile < kTiles && tiles.shapes.rows[tile] > 0, "a tile without a shape");
  return tiles.shapes.rows[tile];
}

int bytes_of(int tile) { return rows_of(tile) > 0 ? tiles.shapes.row_bytes[tile] : 0; }

void zero(int tile) {
  rows_of(tile);
  std::memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
}

void load(int tile, const uint8_t* memory, int64_t stride) {
  zero(tile);
  for (int i = 0; i < rows_of(tile); ++i)
    std::memcpy(tiles.data[tile][i], memory + i * stride, bytes_of(tile));
}

void store(int tile, uint8_t* memory, int64_t stride) {
  for (int i = 0; i < rows_of(tile); ++i)
    std::memcpy(memory + i * stride, tiles.data[tile][i], bytes_of(tile));
}

// c += a b. The first elements of the pairs have sums of their own, as have the second; these are added up,
// then to c. Subnormal numbers are zero, which is the caller's to set up.
__attribute__((noinline)) void multiply(int c, int a, int b) {
  require(c != a && c != b && a != b, "operands of a product aren't distinct");
  require(rows_of(c) == rows_of(a) && bytes_of(c) == bytes_of(b) && bytes_of(a) == 4 * rows_of(b) &&
              bytes_of(c) % 4 == 0,
          "shapes of a product");
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  for (int m = 0; m < rows_of(c); ++m) {
    __m512 first = _mm512_setzero_ps(), second = _mm512_setzero_ps();
    for (int k = 0; k < rows_of(b); ++k) {
      uint32_t pair;
      std::memcpy(&pair, tiles.data[a][m] + 4 * k, sizeof pair);
      const __m512i left = _mm512_set1_epi32(static_cast<int>(pair)),
                    right = _mm512_load_si512(tiles.data[b][k]);
      first = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(left, 16)),
                              _mm512_castsi512_ps(_mm512_slli_epi32(right, 16)), first);
      second = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(left, upper)),
                               _mm512_castsi512_ps(_mm512_and_si512(right, upper)), second);
    }
    void* row = tiles.data[c][m];
    _mm512_store_ps(row, _mm512_add_ps(_mm512_load_ps(row), _mm512_add_ps(first, second)));
  }
}

// --- what they are -----------------------------------------------------------------------------------------

constexpr int kRegisters[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                              REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

// A VEX-encoded instruction of map 0F38 without W and L, and its operands.
struct Instruction {
  int opcode, prefix;  // 0: none, 1: 66, 2: F3, 3: F2
  int mod, reg, rm, vvvv;
  bool has_sib = false;
  int64_t address = 0, stride = 0;  // of memory; the stride is the scaled index
  const uint8_t* end = nullptr;

  // Whether that is what lies at `code`.
  bool read(const uint8_t* code, const greg_t* registers) {
    if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || (code[2] & 0x84) != 0) return false;
    const bool r = !(code[1] & 0x80), x = !(code[1] & 0x40), b = !(code[1] & 0x20);
    vvvv = ~code[2] >> 3 & 15;
    prefix = code[2] & 3;
    opcode = code[3];
    mod = code[4] >> 6;
    reg = (code[4] >> 3 & 7) + 8 * r;
    rm = code[4] & 7;
    end = code + 5;
    if (mod == 3) {
      rm += 8 * b;
      return true;
    }
    int base = rm;
    has_sib = rm == 4;
    if (has_sib) {
      const int sib = *end++, index = (sib >> 3 & 7) + 8 * x;
      base = sib & 7;
      if (index != 4) stride = registers[kRegisters[index]] << (sib >> 6);
    }
    const bool no_base = mod == 0 && base == 5;
    if (!no_base) address = registers[kRegisters[base + 8 * b]];
    if (mod == 1) {
      address += static_cast<int8_t>(*end++);
    } else if (mod == 2 || no_base) {
      int32_t displacement;
      std::memcpy(&displacement, end, sizeof displacement);
      end += sizeof displacement;
      address += displacement;
    }
    if (no_base && !has_sib) address += reinterpret_cast<int64_t>(end);  // relative to what follows
    return true;
  }

  // Whether it was one of AMX's.
  bool run() const {
    uint8_t* memory = reinterpret_cast<uint8_t*>(address);
    if (opcode != 0x5c && vvvv != 0) return false;
    if (opcode == 0x49 && prefix == 0 && mod != 3 && reg == 0) {
      ++emulated_configurations;
      configure(memory + stride);
    } else if (opcode == 0x49 && prefix == 0 && mod == 3 && reg == 0 && rm == 0) {
      release();
    } else if (opcode == 0x49 && prefix == 3 && mod == 3 && rm == 0) {
      zero(reg);
    } else if (opcode == 0x4b && (prefix == 3 || prefix == 1) && has_sib) {
      ++emulated_loads;
      load(reg, memory, stride);
    } else if (opcode == 0x4b && prefix == 2 && has_sib) {
      ++emulated_stores;
      store(reg, memory, stride);
    } else if (opcode == 0x5c && prefix == 2 && mod == 3) {
      ++emulated_products;
      multiply(reg, rm, vvvv);
    } else {
      return false;
    }
    return true;
  }
};

void on_refused(int, siginfo_t*, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  _mm_setcsr(_mm_getcsr() | _MM_FLUSH_ZERO_ON | 0x40);  // until the handler returns
  Instruction instruction;
  const auto* code = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
  if (instruction.read(code, registers) && instruction.run()) {
    registers[REG_RIP] = reinterpret_cast<greg_t>(instruction.end);
  } else {
    signal(SIGILL, SIG_DFL);  // the machine refuses it again
  }
}

__attribute__((constructor)) void install() {
  struct sigaction action = {};
  action.sa_sigaction = on_refused;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, nullptr);
}

}  // namespace
