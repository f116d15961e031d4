// Compiled once for each instruction set.
//
// Pillow's resize: sums of levels times weights of 22 bits, first across, then down, with levels of 8 bits
// between. A vector holds four taps (bytes) of each of kLanes rows, or columns in the second pass. Weights
// are split into parts that the multiplications of bytes or 16 bits take, so that sums are exact.
#include "cpu/simd.h"
#include "include/resize.h"

#if defined(__SSE2__) && !defined(__AVX2__)
#include <emmintrin.h>
#endif

namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE {
namespace {

typedef uint8_t U8 __attribute__((vector_size(4 * kLanes)));
typedef uint16_t U16Pair __attribute__((vector_size(4 * kLanes)));
typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));

constexpr int kRowBlocks = kLanes / kResizeTaps;  // of the first pass's vectors
constexpr int kBlockBytes = kResizeTaps * kLanes;
constexpr int kAtOnce = 4;  // vectors of the second pass, outputs of the first
constexpr int kWords = 4;   // of the parts of four weights

template <class Vector>
inline Vector load_bytes(const uint8_t* source) {
  Vector value;
  __builtin_memcpy(&value, source, sizeof value);
  return value;
}

#if !defined(__AVX512VNNI__)
// Sums of two products of 16 bits in each lane.
inline I32 multiply_pairs(U32 a, uint32_t b) {
#if defined(__AVX512BW__)
  return __builtin_bit_cast(I32, _mm512_madd_epi16(__builtin_bit_cast(__m512i, a), _mm512_set1_epi32(b)));
#elif defined(__AVX2__)
  return __builtin_bit_cast(I32, _mm256_madd_epi16(__builtin_bit_cast(__m256i, a), _mm256_set1_epi32(b)));
#elif defined(__SSE2__)
  return __builtin_bit_cast(I32, _mm_madd_epi16(__builtin_bit_cast(__m128i, a), _mm_set1_epi32(b)));
#else
  const I32 values = __builtin_bit_cast(I32, a);
  return (values & 0xFFFF) * static_cast<int16_t>(b) + (values >> 16) * (static_cast<int32_t>(b) >> 16);
#endif
}
#endif

// A sum of levels times weights; the sums of the parts may wrap, the whole doesn't.
struct Sum {
#if defined(__AVX512VNNI__)
  // Weights are three signed bytes.
  static void split(const int32_t* weights, uint32_t* words) {
    words[0] = words[1] = words[2] = words[3] = 0;
    for (int tap = 0; tap < kResizeTaps; ++tap) {
      int32_t rest = weights[tap];
      for (int part = 0; part < 3; ++part) {
        const int8_t byte = static_cast<int8_t>(rest);
        words[part] |= static_cast<uint32_t>(static_cast<uint8_t>(byte)) << (8 * tap);
        rest = (rest - byte) >> 8;
      }
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

  I32 sums[3] = {};
#else
  // Weights are two signed halves; even and odd taps make pairs.
  static void split(const int32_t* weights, uint32_t* words) {
    for (int odd = 0; odd < 2; ++odd) {
      words[odd] = words[2 + odd] = 0;
      for (int pair = 0; pair < 2; ++pair) {
        const int32_t weight = weights[2 * pair + odd], low = static_cast<int16_t>(weight);
        words[odd] |= static_cast<uint32_t>(low & 0xFFFF) << (16 * pair);
        words[2 + odd] |= static_cast<uint32_t>(((weight - low) >> 16) & 0xFFFF) << (16 * pair);
      }
    }
  }

  void add(U32 levels, const uint32_t* words) {
    const U32 even = levels & 0x00FF00FFu;
    const U32 odd = __builtin_bit_cast(U32, __builtin_bit_cast(U16Pair, levels) >> 8);
    sums[0] += multiply_pairs(even, words[0]) + multiply_pairs(odd, words[1]);
    sums[1] += multiply_pairs(even, words[2]) + multiply_pairs(odd, words[3]);
  }

  I32 total() const { return sums[0] + (sums[1] << 16); }

  I32 sums[2] = {};
#endif

  I32 level() const { return (total() + (1 << (kResizeBits - 1))) >> kResizeBits; }
};

// The levels, limited to a byte: each 128 bits hold four of a, then of b, c and d.
inline U8 narrow(I32 a, I32 b, I32 c, I32 d) {
#if defined(__AVX512BW__)
  const auto of = [](I32 value) { return __builtin_bit_cast(__m512i, value); };
  return __builtin_bit_cast(
      U8, _mm512_packus_epi16(_mm512_packs_epi32(of(a), of(b)), _mm512_packs_epi32(of(c), of(d))));
#elif defined(__AVX2__)
  const auto of = [](I32 value) { return __builtin_bit_cast(__m256i, value); };
  return __builtin_bit_cast(
      U8, _mm256_packus_epi16(_mm256_packs_epi32(of(a), of(b)), _mm256_packs_epi32(of(c), of(d))));
#elif defined(__SSE2__)
  const auto of = [](I32 value) { return __builtin_bit_cast(__m128i, value); };
  return __builtin_bit_cast(U8,
                            _mm_packus_epi16(_mm_packs_epi32(of(a), of(b)), _mm_packs_epi32(of(c), of(d))));
#else
  U8 bytes;
  const I32 levels[] = {a, b, c, d};
  for (int i = 0; i < 4 * kLanes; ++i) {
    const int32_t level = levels[i / 4 % 4][i / 16 * 4 + i % 4];
    bytes[i] = static_cast<uint8_t>(level < 0 ? 0 : level > 255 ? 255 : level);
  }
  return bytes;
#endif
}

// Vectors of narrowed columns in their order.
inline U8 in_order(U8 bytes) {
  U32 from;
  for (unsigned i = 0; i < kLanes; ++i) from[i] = i % kRowBlocks * 4 + i / kRowBlocks;
  const U32 words = __builtin_bit_cast(U32, bytes);
  return __builtin_bit_cast(U8, shuffle(words, words, from));
}

void split_weights(const ResizeAxis& axis, uint32_t* words) {
  for (int64_t i = 0; i < axis.outputs * axis.blocks; ++i) {
    Sum::split(axis.weights + i * kResizeTaps, words + i * kWords);
  }
}

// The channels of four pixels as rows of four bytes.
template <int kPixelStride>
inline Words by_channel(Bytes pixels) {
  Bytes from;
  for (int i = 0; i < 16; ++i) from[i] = static_cast<uint8_t>(i % 4 * kPixelStride + i / 4) % 16;
#if defined(__clang__)
  Bytes rows;
  for (int i = 0; i < 16; ++i) rows[i] = pixels[from[i]];
  return __builtin_bit_cast(Words, rows);
#else
  return __builtin_bit_cast(Words, __builtin_shuffle(pixels, from));
#endif
}

// `available`: bytes of the row from here.
template <int kPixelStride>
inline Words load_pixels(const uint8_t* source, int64_t available) {
  Bytes bytes{};
  if (available >= 16) {
    bytes = load_bytes<Bytes>(source);
  } else {
    __builtin_memcpy(&bytes, source, available);
  }
  return by_channel<kPixelStride>(bytes);
}

// Calls body<number>(), for 1 to 4.
template <class Body>
auto with_number(int64_t number, const Body& body) {
  switch (number) {
    case 1:
      return body.template operator()<1>();
    case 2:
      return body.template operator()<2>();
    case 3:
      return body.template operator()<3>();
    default:
      return body.template operator()<4>();
  }
}

// An image during its resize. Taps: [blocks, channels, kLanes rows, kResizeTaps]. Ring: blocks of rows of the
// first pass's results, each [channels, outputs, kResizeTaps].
template <int kChannels>
class Resizer {
 public:
  static int64_t scratch_size(const Resize& p, const ResizeAxis& across, const ResizeAxis& down) {
    return Resizer(p, across, down, nullptr).size_;
  }

  Resizer(const Resize& p, const ResizeAxis& across, const ResizeAxis& down, uint8_t* scratch)
      : p_(p), across_(across), down_(down), ring_blocks_(down.blocks + kRowBlocks - 1) {
    columns_ = kChannels * across.outputs;
    const int64_t padded = round_up(columns_, kAtOnce * kLanes);
    const auto take = [&](int64_t bytes) {
      uint8_t* const part = scratch + size_;
      size_ += round_up(bytes, 64);
      return part;
    };
    constexpr int64_t kWordBytes = kWords * sizeof(uint32_t);
    across_words_ = reinterpret_cast<uint32_t*>(take(across.outputs * across.blocks * kWordBytes));
    down_words_ = reinterpret_cast<uint32_t*>(take(down.outputs * down.blocks * kWordBytes));
    taps_ = take((p.width + kResizeTaps - 1) / kResizeTaps * kChannels * kBlockBytes);
    levels_ = take(padded);
    ring_stride_ = padded * kResizeTaps;
    ring_ = take(ring_blocks_ * ring_stride_);
  }

  template <class Write>
  void run(const Write& write) {
    split_weights(across_, across_words_);
    split_weights(down_, down_words_);
    int64_t next = 0;
    for (int64_t y = 0; y < p_.crop_height; ++y) {
      const int64_t first = down_.first[y];
      if (next < first) next = first / kRowBlocks * kRowBlocks;
      for (; next < first + down_.blocks; next += kRowBlocks) resize_across(next);
      resize_down(first, down_words_ + y * down_.blocks * kWords);
      if (p_.has_alpha) divide_by_alpha();
      for (int channel = 0; channel < kChannels; ++channel) {
        write(y, channel, levels_ + channel * across_.outputs);
      }
    }
  }

 private:
  static int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

  uint8_t* slot(int64_t block) const { return ring_ + block % ring_blocks_ * ring_stride_; }

  // Rows of the resize are columns in memory if it is transposed. What lies beyond the image has weights of
  // 0.
  template <int kPixelStride, bool kTransposed>
  void load_taps(int64_t row_block) {
    const int64_t begin = across_.first[0], end = across_.first[across_.outputs - 1] + across_.blocks;
    const int64_t line_bytes = ((kTransposed ? p_.height : p_.width) - 1) * kPixelStride + kChannels;
    for (int part = 0; part < kRowBlocks; ++part) {
      const int64_t row = (row_block + part) * kResizeTaps;
      const int64_t column_offset = row < p_.height ? row * kPixelStride : 0;
      const uint8_t* rows[kResizeTaps];
      for (int i = 0; i < kResizeTaps; ++i) {
        rows[i] = p_.image + (row + i < p_.height ? row + i : p_.height - 1) * p_.row_stride;
      }
      uint8_t* target = taps_ + begin * kChannels * kBlockBytes + part * sizeof(Words);
      for (int64_t x = begin * kResizeTaps; x < end * kResizeTaps; x += kResizeTaps) {
        Words pixels[kResizeTaps];
        for (int i = 0; i < kResizeTaps; ++i) {
          if constexpr (kTransposed) {
            const uint8_t* const line = p_.image + (x + i < p_.width ? x + i : p_.width - 1) * p_.row_stride;
            pixels[i] = load_pixels<kPixelStride>(line + column_offset, line_bytes - column_offset);
          } else {
            pixels[i] = load_pixels<kPixelStride>(rows[i] + x * kPixelStride, line_bytes - x * kPixelStride);
          }
        }
        for (int channel = 0; channel < kChannels; ++channel) {
          Words taps = {pixels[0][channel], pixels[1][channel], pixels[2][channel], pixels[3][channel]};
          if constexpr (kTransposed) taps = by_channel<4>(__builtin_bit_cast(Bytes, taps));
          __builtin_memcpy(target, &taps, sizeof taps);
          target += kBlockBytes;
        }
      }
    }
    if (!p_.has_alpha) return;
    for (int64_t block = begin; block < end; ++block) {
      multiply_by_alpha(taps_ + block * kChannels * kBlockBytes);
    }
  }

  static void multiply_by_alpha(uint8_t* taps) {
    const uint8_t* const alpha = taps + (kChannels - 1) * kBlockBytes;
    for (int channel = 0; channel < kChannels - 1; ++channel, taps += kBlockBytes) {
      for (int i = 0; i < kBlockBytes; ++i) {
        const unsigned product = taps[i] * alpha[i] + 128u;
        taps[i] = static_cast<uint8_t>(((product >> 8) + product) >> 8);
      }
    }
  }

  void divide_by_alpha() {
    const uint8_t* const alpha = levels_ + (kChannels - 1) * across_.outputs;
    for (int channel = 0; channel < kChannels - 1; ++channel) {
      uint8_t* const levels = levels_ + channel * across_.outputs;
      for (int64_t x = 0; x < across_.outputs; ++x) {
        if (alpha[x] == 0 || alpha[x] == 255) continue;
        const unsigned level = 255u * levels[x] / alpha[x];
        levels[x] = static_cast<uint8_t>(level < 255 ? level : 255);
      }
    }
  }

  // Blocks of rows [row_block, row_block + kRowBlocks) of the ring.
  void resize_across(int64_t row_block) {
    const auto load = [&]<int kPixelStride>() {
      constexpr int kStride = kPixelStride < kChannels ? kChannels : kPixelStride;
      p_.down_first ? load_taps<kStride, true>(row_block) : load_taps<kStride, false>(row_block);
    };
    with_number(p_.pixel_stride, load);
    uint8_t* slots[kRowBlocks];
    for (int part = 0; part < kRowBlocks; ++part) slots[part] = slot(row_block + part);
    const uint32_t* words = across_words_;
    for (int64_t x = 0; x < across_.outputs; x += kAtOnce) {
      I32 levels[kChannels][kAtOnce];
      for (int i = 0; i < kAtOnce; ++i) {
        Sum sums[kChannels];
        const uint8_t* taps = taps_ + across_.first[x + i] * kChannels * kBlockBytes;
        for (int64_t block = 0; block < across_.blocks; ++block, words += kWords) {
          for (int channel = 0; channel < kChannels; ++channel, taps += kBlockBytes) {
            sums[channel].add(load_bytes<U32>(taps), words);
          }
        }
        for (int channel = 0; channel < kChannels; ++channel) levels[channel][i] = sums[channel].level();
      }
      for (int channel = 0; channel < kChannels; ++channel) {
        const I32(&four)[kAtOnce] = levels[channel];
        const U8 bytes = narrow(four[0], four[1], four[2], four[3]);
        const int64_t place = (channel * across_.outputs + x) * kResizeTaps;
        for (int part = 0; part < kRowBlocks; ++part) {
          __builtin_memcpy(slots[part] + place, reinterpret_cast<const uint8_t*>(&bytes) + 16 * part, 16);
        }
      }
    }
  }

  // A row of the result in levels_: [channels, outputs].
  void resize_down(int64_t first, const uint32_t* words) {
    for (int64_t column = 0; column < columns_; column += kAtOnce * kLanes) {
      Sum sums[kAtOnce];
      for (int64_t block = 0; block < down_.blocks; ++block) {
        const uint8_t* const rows = slot(first + block) + column * kResizeTaps;
        for (int i = 0; i < kAtOnce; ++i) {
          sums[i].add(load_bytes<U32>(rows + i * kBlockBytes), words + block * kWords);
        }
      }
      const U8 bytes = in_order(narrow(sums[0].level(), sums[1].level(), sums[2].level(), sums[3].level()));
      __builtin_memcpy(levels_ + column, &bytes, sizeof bytes);
    }
  }

  const Resize& p_;
  const ResizeAxis &across_, &down_;
  int64_t ring_blocks_, ring_stride_, columns_, size_ = 0;
  uint32_t *across_words_, *down_words_;
  uint8_t *taps_, *levels_, *ring_;
};

int64_t scratch_size(const Resize& p, const ResizeAxis& across, const ResizeAxis& down) {
  return with_number(p.channels,
                     [&]<int kChannels>() { return Resizer<kChannels>::scratch_size(p, across, down); });
}

void resize(const Resize& p, const ResizeAxis& across, const ResizeAxis& down, uint8_t* scratch) {
  const auto write = [&]<class T>(T* target, int64_t stride, const auto& value) {
    if (stride == 1) {
      for (int64_t x = 0; x < p.crop_width; ++x) target[x] = value(x);
    } else {
      for (int64_t x = 0; x < p.crop_width; ++x) target[x * stride] = value(x);
    }
  };
  const auto write_row = [&]<class T>(const T* table, int64_t y, int64_t channel, const uint8_t* levels) {
    T* const row = static_cast<T*>(p.out) + y * p.out_row_stride + channel * p.out_channel_stride;
    if constexpr (sizeof(T) == 1) {
      write(row, p.out_pixel_stride, [&](int64_t x) { return levels[x]; });
    } else {
      write(row, p.out_pixel_stride, [&](int64_t x) { return table[channel * 256 + levels[x]]; });
    }
  };
  with_number(p.channels, [&]<int kChannels>() {
    Resizer<kChannels>(p, across, down, scratch).run([&](int64_t y, int64_t channel, const uint8_t* levels) {
      if (p.table == nullptr) {
        write_row(static_cast<const uint8_t*>(nullptr), y, channel, levels);
      } else if (p.dtype == DType::Float32) {
        write_row(static_cast<const float*>(p.table), y, channel, levels);
      } else {
        write_row(static_cast<const uint16_t*>(p.table), y, channel, levels);
      }
    });
  });
}

}  // namespace

const ResizeKernels resize_kernels = {scratch_size, resize};

}  // namespace evakernels::cpu::EVAKERNELS_ISA_NAMESPACE
