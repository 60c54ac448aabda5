// Unpacking with AVX2, and sums of what was unpacked, for the instruction sets that have it.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "unpack.h"

namespace mpqdm {
namespace {

// Shifts every 16-bit lane left by `shift`, right where it is negative; masks hide what crosses bytes.
template <int shift>
__m256i shifted(__m256i x) {
  if constexpr (shift >= 0) {
    return _mm256_slli_epi16(x, shift);
  } else {
    return _mm256_srli_epi16(x, -shift);
  }
}

__m256i load_vector(const uint8_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

// Adds a plane's bits to the codes of group `group`, and of those behind it in the same vector.
template <int width, int from, int group, int place>
void add_plane(__m256i plane, __m256i* codes) {
  if constexpr (place < 8 / width) {
    constexpr int kApart = width;  // of 8 groups, every `width`-th is in one vector
    const __m256i mask = _mm256_set1_epi8(static_cast<char>(((1 << width) - 1) << from));
    const __m256i bits = _mm256_and_si256(shifted<from - width * place>(plane), mask);
    __m256i& code = codes[group + kApart * place];
    code = from == 0 ? bits : _mm256_or_si256(code, bits);
    add_plane<width, from, group, place + 1>(plane, codes);
  }
}

template <int width, int from, int group = 0>
const uint8_t* add_planes(const uint8_t* tile, __m256i* codes) {
  if constexpr (group < width) {
    add_plane<width, from, group, 0>(load_vector(tile), codes);
    return add_planes<width, from, group + 1>(tile + kVectorBytes, codes);
  } else {
    return tile;
  }
}

// Codes of the 8 groups of a tile, one byte each; returns where the next tile begins.
template <int bits>
const uint8_t* read_codes(const uint8_t* tile, __m256i* codes) {
  if constexpr ((bits & 4) != 0) tile = add_planes<4, 0>(tile, codes);
  if constexpr ((bits & 2) != 0) tile = add_planes<2, (bits & 4)>(tile, codes);
  if constexpr ((bits & 1) != 0) tile = add_planes<1, (bits & 6)>(tile, codes);
  return tile;
}

template <int bits>
void unpack_ladder(const Block& block, int tiles, int8_t* weights) {
  const bool odd = block.encoding == Encoding::odd;
  const __m256i first = _mm256_set1_epi8(static_cast<char>(ladder(block.encoding, bits).first));
  const uint8_t* tile = block.codes;
  for (int t = 0; t < tiles; ++t) {
    __m256i codes[kTileGroups];
    tile = read_codes<bits>(tile, codes);
    for (int group = 0; group < kTileGroups; ++group, weights += kVectorBytes) {
      const __m256i steps = odd ? _mm256_add_epi8(codes[group], codes[group]) : codes[group];
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights), _mm256_add_epi8(steps, first));
    }
  }
}

// Tables of some of a block's rows, for byte shuffles: each half of a vector has 4 rows, and a shuffle
// sees 16 bytes of tables, those of `kRows` rows.
template <int bits>
struct Tables {
  static constexpr int kRows = bits <= 2 ? 4 : 16 >> bits;
  static constexpr int kVectors = 4 / kRows;
  __m256i vectors[kVectors];
  __m256i row_start;  // added to a code: where its row's table begins

  explicit Tables(const int8_t* tables) {
    constexpr size_t kBytes = static_cast<size_t>(kRows) << bits;
    for (int vector = 0; vector < kVectors; ++vector) {
      int8_t both[32] = {};
      std::memcpy(both, tables + ((vector * kRows) << bits), kBytes);
      std::memcpy(both + 16, tables + ((4 + vector * kRows) << bits), kBytes);
      vectors[vector] = load_vector(reinterpret_cast<const uint8_t*>(both));
    }
    int8_t starts[32];
    for (int lane = 0; lane < 32; ++lane) {
      starts[lane] = static_cast<int8_t>((lane / kGroupDepth % kRows) << bits);
    }
    row_start = load_vector(reinterpret_cast<const uint8_t*>(starts));
  }

  __m256i look_up(__m256i codes) const {
    const __m256i index = _mm256_add_epi8(codes, row_start);
    __m256i result = _mm256_shuffle_epi8(vectors[0], index);
    if constexpr (kVectors == 2) {
      return _mm256_blend_epi32(result, _mm256_shuffle_epi8(vectors[1], index), 0xcc);
    }
    if constexpr (kVectors == 4) {
      result = _mm256_blend_epi32(result, _mm256_shuffle_epi8(vectors[1], index), 0x22);
      result = _mm256_blend_epi32(result, _mm256_shuffle_epi8(vectors[2], index), 0x44);
      result = _mm256_blend_epi32(result, _mm256_shuffle_epi8(vectors[3], index), 0x88);
    }
    return result;
  }
};

template <int bits>
void unpack_table(const Block& block, int tiles, int8_t* weights) {
  const Tables<bits> tables(block.tables);
  const uint8_t* tile = block.codes;
  for (int t = 0; t < tiles; ++t) {
    __m256i codes[kTileGroups];
    tile = read_codes<bits>(tile, codes);
    for (int group = 0; group < kTileGroups; ++group, weights += kVectorBytes) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights), tables.look_up(codes[group]));
    }
  }
}

// As `KernelSet::sum_weights`. A sum of four in 16 bits is at most 512.
void sum_avx2(const int8_t* weights, int groups, int32_t* sums) {
  const __m256i ones = _mm256_set1_epi8(1), wide_ones = _mm256_set1_epi16(1);
  __m256i rows = _mm256_setzero_si256();
  for (int group = 0; group < groups; ++group, weights += kGroupBytes) {
    const __m256i levels = load_vector(reinterpret_cast<const uint8_t*>(weights));
    const __m256i pairs = _mm256_maddubs_epi16(ones, levels);
    rows = _mm256_add_epi32(rows, _mm256_madd_epi16(pairs, wide_ones));
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums), rows);
}

void unpack_avx2(const Block& block, int tiles, int8_t* weights) {
  if (block.encoding == Encoding::byte) return unpack_scalar(block, tiles, weights);
  const bool table = block.encoding == Encoding::table;
  switch (block.bits) {
    case 1:
      return table ? unpack_table<1>(block, tiles, weights) : unpack_ladder<1>(block, tiles, weights);
    case 2:
      return table ? unpack_table<2>(block, tiles, weights) : unpack_ladder<2>(block, tiles, weights);
    case 3:
      return table ? unpack_table<3>(block, tiles, weights) : unpack_ladder<3>(block, tiles, weights);
    case 4:
      return table ? unpack_table<4>(block, tiles, weights) : unpack_ladder<4>(block, tiles, weights);
    case 5:
      return unpack_ladder<5>(block, tiles, weights);
    case 6:
      return unpack_ladder<6>(block, tiles, weights);
    default:
      return unpack_ladder<7>(block, tiles, weights);
  }
}

}  // namespace
}  // namespace mpqdm
