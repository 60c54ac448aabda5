// Unpacking with NEON. `kRun` is the order within 8 inputs that the kernel wants: 4, the plain order
// [group][row][4]; or 8, two groups woven into [row][8], as the matrix instructions read them.
#pragma once

#include <arm_neon.h>

#include "unpack.h"

namespace mpqdm {
namespace {

constexpr int kHalfBytes = kGroupBytes / 2;  // a register holds 4 rows of a group

inline uint8x16_t shifted(uint8x16_t x, int shift) {
  return vshlq_u8(x, vdupq_n_s8(static_cast<int8_t>(shift)));
}

// Codes of one half (4 rows) of the 8 groups of a tile.
template <int bits>
void read_codes(const uint8_t* tile, uint8x16_t* codes) {
  for (int group = 0; group < kTileGroups; ++group) codes[group] = vdupq_n_u8(0);
  int from = 0;
  const auto add = [&](int width) __attribute__((always_inline)) {
    const uint8x16_t mask = vdupq_n_u8(static_cast<uint8_t>(((1 << width) - 1) << from));
    for (int vector = 0; vector < width; ++vector, tile += kVectorBytes) {
      const uint8x16_t plane = vld1q_u8(tile);
      for (int place = 0; place < 8 / width; ++place) {
        uint8x16_t& code = codes[vector + width * place];
        code = vorrq_u8(code, vandq_u8(shifted(plane, from - width * place), mask));
      }
    }
    from += width;
  };
  if constexpr ((bits & 4) != 0) add(4);
  if constexpr ((bits & 2) != 0) add(2);
  if constexpr ((bits & 1) != 0) add(1);
}

// Writes the 8 groups of half a tile.
template <int kRun>
void write_half(const int8x16_t* groups, int half, int8_t* weights) {
  if constexpr (kRun == 4) {
    for (int group = 0; group < kTileGroups; ++group) {
      vst1q_s8(weights + kGroupBytes * group + kHalfBytes * half, groups[group]);
    }
  } else {
    for (int group = 0; group < kTileGroups; group += 2) {
      const int32x4_t first = vreinterpretq_s32_s8(groups[group]);
      const int32x4_t second = vreinterpretq_s32_s8(groups[group + 1]);
      int8_t* to = weights + kGroupBytes * group + kGroupBytes * half;
      vst1q_s8(to, vreinterpretq_s8_s32(vzip1q_s32(first, second)));
      vst1q_s8(to + kHalfBytes, vreinterpretq_s8_s32(vzip2q_s32(first, second)));
    }
  }
}

template <int bits, int kRun>
void unpack_ladder(const Block& block, int tiles, int8_t* weights) {
  const bool odd = block.encoding == Encoding::odd;
  const int8x16_t first = vdupq_n_s8(static_cast<int8_t>(ladder(block.encoding, bits).first));
  const uint8_t* tile = block.codes;
  for (int t = 0; t < tiles; ++t, tile += bits * kVectorBytes, weights += kTileBytes) {
    for (int half = 0; half < 2; ++half) {
      uint8x16_t codes[kTileGroups];
      read_codes<bits>(tile + kHalfBytes * half, codes);
      int8x16_t levels[kTileGroups];
      for (int group = 0; group < kTileGroups; ++group) {
        const int8x16_t code = vreinterpretq_s8_u8(codes[group]);
        levels[group] = vaddq_s8(odd ? vaddq_s8(code, code) : code, first);
      }
      write_half<kRun>(levels, half, weights);
    }
  }
}

// A table lookup sees 64 bytes: all 4 rows of a half, up to 16 entries each.
template <int bits, int kRun>
void unpack_table(const Block& block, int tiles, int8_t* weights) {
  int8x16x4_t tables[2];
  uint8_t starts[kHalfBytes];
  for (int lane = 0; lane < kHalfBytes; ++lane) {
    starts[lane] = static_cast<uint8_t>((lane / kGroupDepth) << bits);
  }
  for (int half = 0; half < 2; ++half) {
    int8_t bytes[64] = {};
    __builtin_memcpy(bytes, block.tables + ((4 * half) << bits), size_t{4} << bits);
    for (int part = 0; part < 4; ++part) tables[half].val[part] = vld1q_s8(bytes + 16 * part);
  }
  const uint8x16_t row_start = vld1q_u8(starts);
  const uint8_t* tile = block.codes;
  for (int t = 0; t < tiles; ++t, tile += bits * kVectorBytes, weights += kTileBytes) {
    for (int half = 0; half < 2; ++half) {
      uint8x16_t codes[kTileGroups];
      read_codes<bits>(tile + kHalfBytes * half, codes);
      int8x16_t levels[kTileGroups];
      for (int group = 0; group < kTileGroups; ++group) {
        levels[group] = vqtbl4q_s8(tables[half], vaddq_u8(codes[group], row_start));
      }
      write_half<kRun>(levels, half, weights);
    }
  }
}

template <int kRun>
void unpack_bytes(const Block& block, int tiles, int8_t* weights) {
  const auto* bytes = reinterpret_cast<const int8_t*>(block.codes);
  for (int t = 0; t < tiles; ++t, bytes += kTileBytes, weights += kTileBytes) {
    for (int half = 0; half < 2; ++half) {
      int8x16_t levels[kTileGroups];
      for (int group = 0; group < kTileGroups; ++group) {
        levels[group] = vld1q_s8(bytes + kGroupBytes * group + kHalfBytes * half);
      }
      write_half<kRun>(levels, half, weights);
    }
  }
}

// As `KernelSet::sum_weights`, of what `unpack_neon` wrote.
template <int kRun>
void sum_neon(const int8_t* weights, int groups, int32_t* sums) {
  constexpr int kRegisters = kRun / 2;  // of the inputs that stand together
  constexpr int kFit = 64;              // sums of so many pairs fit 16 bits
  const int runs = groups * kGroupDepth / kRun;
  int32x4_t rows[kRegisters] = {};
  for (int run = 0; run < runs;) {
    const int end = run + kFit < runs ? run + kFit : runs;
    int16x8_t pairs[kRegisters] = {};
    for (; run < end; ++run) {
      for (int i = 0; i < kRegisters; ++i, weights += kHalfBytes) {
        pairs[i] = vpadalq_s8(pairs[i], vld1q_s8(weights));
      }
    }
    for (int i = 0; i < kRegisters; ++i) rows[i] = vpadalq_s16(rows[i], pairs[i]);
  }
  if constexpr (kRun == 4) {
    vst1q_s32(sums, rows[0]);
    vst1q_s32(sums + 4, rows[1]);
  } else {
    if (groups % 2 != 0) {  // half a run
      const int8x16_t mask = vreinterpretq_s8_u64(vdupq_n_u64(0xffffffff));
      for (int i = 0; i < kRegisters; ++i) {
        const int8x16_t half = vandq_s8(vld1q_s8(weights + kHalfBytes * i), mask);
        rows[i] = vpadalq_s16(rows[i], vpaddlq_s8(half));
      }
    }
    vst1q_s32(sums, vpaddq_s32(rows[0], rows[1]));
    vst1q_s32(sums + 4, vpaddq_s32(rows[2], rows[3]));
  }
}

template <int kRun>
void unpack_neon(const Block& block, int tiles, int8_t* weights) {
  if (block.encoding == Encoding::byte) return unpack_bytes<kRun>(block, tiles, weights);
  const bool table = block.encoding == Encoding::table;
  switch (block.bits) {
    case 1:
      return table ? unpack_table<1, kRun>(block, tiles, weights)
                   : unpack_ladder<1, kRun>(block, tiles, weights);
    case 2:
      return table ? unpack_table<2, kRun>(block, tiles, weights)
                   : unpack_ladder<2, kRun>(block, tiles, weights);
    case 3:
      return table ? unpack_table<3, kRun>(block, tiles, weights)
                   : unpack_ladder<3, kRun>(block, tiles, weights);
    case 4:
      return table ? unpack_table<4, kRun>(block, tiles, weights)
                   : unpack_ladder<4, kRun>(block, tiles, weights);
    case 5:
      return unpack_ladder<5, kRun>(block, tiles, weights);
    case 6:
      return unpack_ladder<6, kRun>(block, tiles, weights);
    default:
      return unpack_ladder<7, kRun>(block, tiles, weights);
  }
}

}  // namespace
}  // namespace mpqdm
