// What the sets of x86 have in common when they multiply a few pixels (see few.h).
#pragma once

#include "few.h"
#include "unpack_avx2.h"

namespace mpqdm {
namespace {

// Codes from bit planes: bits are shifted to their places and taken by masks.
template <class Isa, int kBits>
struct MaskedPlanes {
  using Vector = typename Isa::Vector;

  // The bits of a plane of `width` that belong to a group, at `from` of each byte.
  template <int width, int from, int group>
  static MPQDM_INLINE Vector piece(const typename Isa::Place& place, size_t at) {
    const Vector plane = Isa::load(place, at + kVectorBytes * (group % width));
    return Isa::template shifted<from - width * (group / width)>(plane);
  }

  template <int group>
  static MPQDM_INLINE Vector read(const typename Isa::Place& place) {
    if constexpr ((kBits & 4) != 0) {
      Vector codes = Isa::both(piece<4, 0, group>(place, 0), Isa::bytes(15));
      if constexpr ((kBits & 2) != 0) {
        const Vector two = piece<2, 4, group>(place, 4 * kVectorBytes);
        codes = Isa::add_bits(codes, two, Isa::bytes(0x30));
      }
      if constexpr ((kBits & 1) != 0) {
        const Vector one = piece<1, (kBits & 6), group>(place, size_t{kVectorBytes} * (kBits & 6));
        codes = Isa::add_bits(codes, one, Isa::bytes(1 << (kBits & 6)));
      }
      return codes;
    } else if constexpr ((kBits & 2) != 0) {
      Vector codes = Isa::both(piece<2, 0, group>(place, 0), Isa::bytes(3));
      if constexpr ((kBits & 1) != 0) {
        const Vector one = piece<1, 2, group>(place, 2 * kVectorBytes);
        codes = Isa::add_bits(codes, one, Isa::bytes(4));
      }
      return codes;
    } else {
      return Isa::both(piece<1, 0, group>(place, 0), Isa::bytes(1));
    }
  }
};

// Tables of one block.
template <int kBits>
struct OneLookup : Tables<kBits> {
  explicit OneLookup(const Block* const (&blocks)[1]) : Tables<kBits>(blocks[0]->tables) {}
};

// Four bytes, in all lanes. As a float, since for integers GCC takes a detour by way of a register.
// They lie at a multiple of 4.
MPQDM_INLINE __m128 load_four(const uint8_t* from) {
  return _mm_load_ss(reinterpret_cast<const float*>(from));
}

MPQDM_INLINE __m256i broadcast_four(const uint8_t* from) {
  return _mm256_castps_si256(_mm256_broadcastss_ps(load_four(from)));
}

// What sets with vectors of 256 bits have in common: one block in a vector.
struct OneBlock {
  static constexpr int kBlocks = 1;
  static constexpr bool kGainsWithoutLeast = false;
  static constexpr int kMostPixels = 4;  // that are multiplied together
  static constexpr int kLeastPixels = 1;
  using Vector = __m256i;
  using Place = OnePlace;
  template <int kBits>
  using Planes = MaskedPlanes<OneBlock, kBits>;
  template <int kBits>
  using Lookup = OneLookup<kBits>;

  static MPQDM_INLINE Vector load(const Place& place, size_t at) { return load_vector(place.at + at); }
  static MPQDM_INLINE Vector bytes(int value) { return _mm256_set1_epi8(static_cast<char>(value)); }
  static MPQDM_INLINE Vector numbers(int value) { return _mm256_set1_epi32(value); }
  template <int shift>
  static MPQDM_INLINE Vector shifted(Vector x) {
    return mpqdm::shifted<shift>(x);
  }
  static MPQDM_INLINE Vector repeat(const uint8_t* four) { return broadcast_four(four); }
  static MPQDM_INLINE Vector both(Vector x, Vector mask) { return _mm256_and_si256(x, mask); }
  static MPQDM_INLINE Vector add_bits(Vector x, Vector bits, Vector mask) {
    return _mm256_or_si256(x, _mm256_and_si256(bits, mask));
  }
  static MPQDM_INLINE Vector add(Vector x, Vector y) { return _mm256_add_epi32(x, y); }
  static MPQDM_INLINE Vector times(Vector x, Vector y) { return _mm256_mullo_epi32(x, y); }
  static MPQDM_INLINE void store(int32_t* sums, Vector x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums), x);
  }
};

int32_t sum_bytes(const uint8_t* inputs, size_t count) {
  int32_t sum = 0;
  for (size_t i = 0; i < count; ++i) sum += inputs[i];
  return sum;
}

}  // namespace
}  // namespace mpqdm
