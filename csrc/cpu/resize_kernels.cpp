// Compiled once for each instruction set.
//
// Pillow's resize: sums of levels times weights of 22 bits, along one axis, then the other, with levels of 8
// bits between. Comments call the first axis "across", the second "down". A vector holds four taps (bytes) of
// each of kLanes rows, or columns in the second pass. Weights are split into parts that the multiplications
// of bytes or 16 bits take, so that sums are exact.
#include "cpu/simd.h"
#include "include/resize.h"

#if defined(__AVX512BW__)
#define EVAKERNELS_MM(operation) _mm512_##operation
typedef __m512i Native;
#elif defined(__AVX2__)
#define EVAKERNELS_MM(operation) _mm256_##operation
typedef __m256i Native;
#elif defined(__SSE2__)
#include <emmintrin.h>
#define EVAKERNELS_MM(operation) _mm_##operation
typedef __m128i Native;
#endif

namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE {
namespace {

typedef uint8_t U8 __attribute__((vector_size(4 * kLanes)));
typedef uint16_t U16Pair __attribute__((vector_size(4 * kLanes)));
typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));

constexpr int kRowBlocks = kLanes / kResizeTaps;  // of the first pass's vectors
constexpr int kAtOnce = 4;                        // vectors whose levels are narrowed together

template <class Vector>
inline Vector load_bytes(const uint8_t* source) {
  Vector value;
  __builtin_memcpy(&value, source, sizeof value);
  return value;
}

#if !defined(__AVX512VNNI__)
// Sums of two products of 16 bits in each lane.
inline I32 multiply_pairs(U32 a, uint32_t b) {
#if defined(__SSE2__)
  const Native pairs = EVAKERNELS_MM(set1_epi32)(static_cast<int>(b));
  return __builtin_bit_cast(I32, EVAKERNELS_MM(madd_epi16)(__builtin_bit_cast(Native, a), pairs));
#else
  const I32 values = __builtin_bit_cast(I32, a);
  return (values & 0xFFFF) * static_cast<int16_t>(b) + (values >> 16) * (static_cast<int32_t>(b) >> 16);
#endif
}
#endif

// A sum of levels times weights; the sums of the parts may wrap, the whole doesn't.
struct Sum {
  // Not `= {}`, which GCC compiles to a call for the whole array.
  Sum() {
    for (I32& sum : sums) sum = I32{};
  }

#if defined(__AVX512VNNI__)
  // Weights are three signed bytes.
  static void split(const int32_t* weights, uint32_t* words) {
    for (int tap = 0; tap < kResizeTaps; ++tap) {
      const uint32_t bytes = (static_cast<uint32_t>(weights[tap]) + 0x808080) ^ 0x808080;
      for (int part = 0; part < 3; ++part) words[part] |= (bytes >> (8 * part) & 0xFF) << (8 * tap);
    }
  }

  void add(U32 levels, const uint32_t* words) {
    for (int part = 0; part < 3; ++part) {
      sums[part] = __builtin_bit_cast(
          I32, _mm512_dpbusd_epi32(__builtin_bit_cast(__m512i, sums[part]),
                                   __builtin_bit_cast(__m512i, levels), _mm512_set1_epi32(words[part])));
    }
  }

  I32 total() const { return sums[0] + (sums[1] << 8) + (sums[2] << 16); }

  I32 sums[3];
#else
  // Weights are two signed halves; even and odd taps make pairs.
  static void split(const int32_t* weights, uint32_t* words) {
    for (int tap = 0; tap < kResizeTaps; ++tap) {
      const uint32_t weight = static_cast<uint32_t>(weights[tap]);
      words[tap % 2] |= (weight & 0xFFFF) << (tap / 2 * 16);
      words[2 + tap % 2] |= (weight + 0x8000) >> 16 << (tap / 2 * 16);
    }
  }

  void add(U32 levels, const uint32_t* words) {
    const U32 even = levels & 0x00FF00FFu;
    const U32 odd = __builtin_bit_cast(U32, __builtin_bit_cast(U16Pair, levels) >> 8);
    sums[0] += multiply_pairs(even, words[0]) + multiply_pairs(odd, words[1]);
    sums[1] += multiply_pairs(even, words[2]) + multiply_pairs(odd, words[3]);
  }

  I32 total() const { return sums[0] + (sums[1] << 16); }

  I32 sums[2];
#endif
};

// Four levels, limited to a byte: each 128 bits hold four lanes of the first, then of the others.
inline U8 narrow(const I32* levels) {
#if defined(__SSE2__)
  const auto pack = [&](int i) {
    return EVAKERNELS_MM(packs_epi32)(__builtin_bit_cast(Native, levels[i]),
                                      __builtin_bit_cast(Native, levels[i + 1]));
  };
  return __builtin_bit_cast(U8, EVAKERNELS_MM(packus_epi16)(pack(0), pack(2)));
#else
  U8 bytes;
  for (int i = 0; i < 4 * kLanes; ++i) {
    const int32_t level = levels[i / 4 % 4][i / 16 * 4 + i % 4];
    bytes[i] = static_cast<uint8_t>(level < 0 ? 0 : level > 255 ? 255 : level);
  }
  return bytes;
#endif
}

// Sums of kAtOnce vectors i over blocks: the taps at base(block) + offsets[i] times the weights at words, and
// kWordStep for each i, as levels.
template <int kWordStep, class Base>
inline U8 weigh(int64_t blocks, const Base& base, const int64_t (&offsets)[kAtOnce], const uint32_t* words) {
  Sum sums[kAtOnce];
  for (int64_t block = 0; block < blocks; ++block, words += kAtOnce * kResizeWords) {
    const uint8_t* const taps = base(block);
    for (int i = 0; i < kAtOnce; ++i) sums[i].add(load_bytes<U32>(taps + offsets[i]), words + i * kWordStep);
  }
  I32 levels[kAtOnce];
  for (int i = 0; i < kAtOnce; ++i) levels[i] = (sums[i].total() + (1 << (kResizeBits - 1))) >> kResizeBits;
  return narrow(levels);
}

// Bytes i, i + stride, i + 2 stride and i + 3 stride in the order of i.
inline Bytes order_of(int64_t stride) {
  Bytes from;
  for (int i = 0; i < 16; ++i) from[i] = static_cast<uint8_t>(i % 4 * stride + i / 4) % 16;
  return from;
}

inline Words in_order(Bytes bytes, Bytes from) {
#if defined(__clang__)
  Bytes ordered;
  for (int i = 0; i < 16; ++i) ordered[i] = bytes[from[i]];
  return __builtin_bit_cast(Words, ordered);
#else
  return __builtin_bit_cast(Words, __builtin_shuffle(bytes, from));
#endif
}

// An image during its resize. Ring: blocks of rows of the first pass's results, each [channels, outputs,
// kResizeTaps].
class Resizer {
 public:
  Resizer(const Resize& p, const ResizeAxis& first, const ResizeAxis& second, const ResizeScratch& scratch)
      : p_(p),
        first_(first),
        second_(second),
        scratch_(scratch),
        end_(p.image + (p.sides[0] - 1) * p.strides[0] + (p.sides[1] - 1) * p.strides[1] + p.channels),
        has_alpha_(p.channels % 2 == 0 && !p.is_copy) {}

  template <class T>
  void run() {
    // Mirrored outputs have descending blocks.
    const int64_t outputs = p_.crop[p_.down_first ? 3 : 2];
    const bool is_reversed = p_.down_first && p_.is_mirrored;
    int64_t next = 0;
    for (int64_t i = 0; i < outputs; ++i) {
      const int64_t y = is_reversed ? outputs - 1 - i : i, block = second_.first[y];
      if (next < block) next = block / kRowBlocks * kRowBlocks;
      for (; next < block + second_.blocks; next += kRowBlocks) resize_across(next);
      resize_down(block,
                  second_.words + (y / kAtOnce * kAtOnce * second_.blocks + y % kAtOnce) * kResizeWords);
      if (has_alpha_) divide_by_alpha();
      write<T>(y);
    }
  }

 private:
  static constexpr int kVector = kResizeTaps * kLanes;

  uint8_t* ring(int64_t block) const {
    return scratch_.ring + block % (second_.blocks + ResizeScratch::kExtraBlocks) * scratch_.ring_stride;
  }

  // Blocks [begin, end) of rows [row, row + kLanes) as [blocks, channels, kLanes, kResizeTaps]. What lies
  // beyond the image has weights of 0.
  template <bool kDownFirst>
  void load_taps(int64_t row, int64_t begin, int64_t end) {
    const int64_t channels = p_.channels, pixel_stride = p_.strides[1];
    const Bytes order = order_of(pixel_stride), transposed = order_of(kResizeTaps);
    const uint8_t* const last = end_ - sizeof(Bytes);
    for (int part = 0; part < kRowBlocks; ++part, row += kResizeTaps) {
      const uint8_t *rows[kResizeTaps], *lines[kResizeTaps];
      for (int i = 0; i < kResizeTaps; ++i) rows[i] = line(row + i);
      uint8_t* target = taps_of(begin, 0) + part * sizeof(Words);
      for (int64_t x = begin * kResizeTaps; x < end * kResizeTaps; x += kResizeTaps) {
        for (int i = 0; i < kResizeTaps; ++i) {
          lines[i] = kDownFirst ? line(x + i) + row * pixel_stride : rows[i] + x * pixel_stride;
        }
        const bool is_inside = lines[kResizeTaps - 1] <= last;
        Words pixels[kResizeTaps];
        for (int i = 0; i < kResizeTaps; ++i) {
          pixels[i] = in_order(is_inside ? load_bytes<Bytes>(lines[i]) : load_before_end(lines[i]), order);
        }
        const Words low[] = {__builtin_shufflevector(pixels[0], pixels[1], 0, 4, 1, 5),
                             __builtin_shufflevector(pixels[2], pixels[3], 0, 4, 1, 5)};
        const Words high[] = {__builtin_shufflevector(pixels[0], pixels[1], 2, 6, 3, 7),
                              __builtin_shufflevector(pixels[2], pixels[3], 2, 6, 3, 7)};
        Words taps[] = {__builtin_shufflevector(low[0], low[1], 0, 1, 4, 5),
                        __builtin_shufflevector(low[0], low[1], 2, 3, 6, 7),
                        __builtin_shufflevector(high[0], high[1], 0, 1, 4, 5),
                        __builtin_shufflevector(high[0], high[1], 2, 3, 6, 7)};
        // The next block overwrites channels that the image doesn't have.
        for (int channel = 0; channel < 4; ++channel) {
          if (kDownFirst) taps[channel] = in_order(__builtin_bit_cast(Bytes, taps[channel]), transposed);
          __builtin_memcpy(target + channel * kVector, &taps[channel], sizeof(Words));
        }
        target += channels * kVector;
      }
    }
    if (!has_alpha_) return;
    for (int64_t block = begin; block < end; ++block) multiply_by_alpha(block);
  }

  Bytes load_before_end(const uint8_t* source) const {
    Bytes bytes{};
    const int64_t available = end_ - source;
    if (available > 0) __builtin_memcpy(&bytes, source, available < 16 ? available : 16);
    return bytes;
  }

  const uint8_t* line(int64_t number) const {
    return p_.image + (number < p_.sides[0] ? number : p_.sides[0] - 1) * p_.strides[0];
  }

  uint8_t* taps_of(int64_t block, int64_t channel) const {
    return scratch_.taps + (block * p_.channels + channel) * kVector;
  }

  void multiply_by_alpha(int64_t block) {
    const uint8_t* const alpha = taps_of(block, p_.channels - 1);
    for (uint8_t* taps = taps_of(block, 0); taps < alpha; taps += kVector) {
      for (int i = 0; i < kVector; ++i) {
        const unsigned product = taps[i] * alpha[i] + 128u;
        taps[i] = static_cast<uint8_t>(((product >> 8) + product) >> 8);
      }
    }
  }

  void divide_by_alpha() {
    const uint8_t* const alpha = scratch_.levels + (p_.channels - 1) * first_.outputs;
    for (uint8_t* levels = scratch_.levels; levels < alpha; levels += first_.outputs) {
      for (int64_t x = 0; x < first_.outputs; ++x) {
        if (alpha[x] == 0 || alpha[x] == 255) continue;
        const unsigned level = 255u * levels[x] / alpha[x];
        levels[x] = static_cast<uint8_t>(level < 255 ? level : 255);
      }
    }
  }

  // Blocks of rows [row_block, row_block + kRowBlocks) of the ring.
  void resize_across(int64_t row_block) {
    const int64_t ends[] = {first_.first[0], first_.first[first_.outputs - 1]};
    const bool is_reversed = ends[0] > ends[1];
    const int64_t begin = ends[is_reversed], end = ends[!is_reversed] + first_.blocks;
    p_.down_first ? load_taps<true>(row_block * kResizeTaps, begin, end)
                  : load_taps<false>(row_block * kResizeTaps, begin, end);
    const int64_t outputs = first_.outputs, blocks = first_.blocks, block_bytes = p_.channels * kVector;
    uint8_t* rows[kRowBlocks];
    for (int part = 0; part < kRowBlocks; ++part) rows[part] = ring(row_block + part);
    for (int64_t x = 0; x < outputs; x += kAtOnce) {
      int64_t offsets[kAtOnce];
      for (int i = 0; i < kAtOnce; ++i) offsets[i] = first_.first[x + i] * block_bytes;
      const uint32_t* const words = first_.words + x * blocks * kResizeWords;
      for (int64_t channel = 0; channel < p_.channels; ++channel) {
        const uint8_t* const taps = scratch_.taps + channel * kVector;
        const U8 levels = weigh<kResizeWords>(
            blocks, [&](int64_t block) { return taps + block * block_bytes; }, offsets, words);
        for (int part = 0; part < kRowBlocks; ++part) {
          __builtin_memcpy(rows[part] + (channel * outputs + x) * kResizeTaps,
                           reinterpret_cast<const uint8_t*>(&levels) + 16 * part, 16);
        }
      }
    }
  }

  // A row of the result in levels: [channels, outputs].
  void resize_down(int64_t first, const uint32_t* words) {
    U32 order;  // of the narrowed columns
    for (unsigned i = 0; i < kLanes; ++i) order[i] = i % kRowBlocks * 4 + i / kRowBlocks;
    const int64_t offsets[] = {0, kVector, 2 * kVector, 3 * kVector};
    uint8_t* const target = scratch_.levels;
    for (int64_t column = 0; column < p_.channels * first_.outputs; column += kVector) {
      const U8 levels = weigh<0>(
          second_.blocks, [&](int64_t block) { return ring(first + block) + column * kResizeTaps; }, offsets,
          words);
      const U32 columns = __builtin_bit_cast(U32, levels), ordered = shuffle(columns, columns, order);
      __builtin_memcpy(target + column, &ordered, sizeof ordered);
    }
  }

  // Row y of the second axis.
  template <class T>
  void write(int64_t y) {
    const int64_t rows = p_.crop[2], columns = p_.crop[3];
    const int64_t count = p_.down_first ? rows : columns, step = p_.down_first ? columns : 1;
    for (int64_t channel = 0; channel < p_.channels; ++channel) {
      const uint8_t* const levels = scratch_.levels + channel * first_.outputs;
      T* const row = static_cast<T*>(p_.out) + channel * rows * columns + y * (p_.down_first ? 1 : columns);
      if (p_.table == nullptr && step == 1) {
        __builtin_memcpy(row, levels, count);
      } else if (p_.table == nullptr) {
        for (int64_t x = 0; x < count; ++x) row[x * step] = static_cast<T>(levels[x]);
      } else {
        const T* const values = static_cast<const T*>(p_.table) + channel * 256;
        for (int64_t x = 0; x < count; ++x) row[x * step] = values[levels[x]];
      }
    }
  }

  const Resize& p_;
  const ResizeAxis &first_, &second_;
  const ResizeScratch& scratch_;
  const uint8_t* const end_;
  const bool has_alpha_;
};

void resize(const Resize& p, const ResizeAxis& first, const ResizeAxis& second,
            const ResizeScratch& scratch) {
  Resizer resizer(p, first, second, scratch);
  if (p.value_size == 1) {
    resizer.run<uint8_t>();
  } else if (p.value_size == 2) {
    resizer.run<uint16_t>();
  } else {
    resizer.run<float>();
  }
}

}  // namespace

const ResizeKernels resize_kernels = {Sum::split, resize};

}  // namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE
