// Multiplication of a few pixels by packed blocks, for x86: each vector of weights is unpacked in a
// register, multiplied by all pixels, and dropped. `Isa` is what an instruction set does with vectors
// of `Isa::kBlocks` blocks, 32 bytes of each.
//
// Codes of the encodings without tables are multiplied as they are, from 0 on, and the result is
// moved at the end: with w = first + step c and x less its zero point z,
//   sum (x - z) w = first sum (x - z) + step (sum x c - z sum c).
#pragma once

#include <utility>

#include "kernel_sets.h"
#include "unpack_avx2.h"

namespace mpqdm {
namespace {

#define MPQDM_INLINE __attribute__((always_inline)) inline

// What `Codes::read` gives, and what becomes of the sums of its products.
struct Moved {
  int first, step;
};

// Codes 0 .. 2^bits - 1 from bit planes.
template <class Isa, int kBits>
struct PlaneCodes {
  static constexpr int kGreatest = (1 << kBits) - 1;
  static constexpr bool kSigned = false;
  static constexpr size_t kTile = size_t{kVectorBytes} * kBits;
  using Vector = typename Isa::Vector;

  Moved moved;

  explicit PlaneCodes(const Block* const (&blocks)[Isa::kBlocks])
      : moved{ladder(blocks[0]->encoding, kBits).first, ladder(blocks[0]->encoding, kBits).step} {}

  // The bits of a plane of `width` that belong to a group, at `from` of each byte.
  template <int width, int from, int group>
  static MPQDM_INLINE Vector piece(const typename Isa::Place& place, size_t at) {
    const Vector plane = Isa::load(place, at + kVectorBytes * (group % width));
    return Isa::template shifted<from - width * (group / width)>(plane);
  }

  template <int group>
  MPQDM_INLINE Vector read(const typename Isa::Place& place) const {
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

// Bytes as they are.
template <class Isa>
struct ByteCodes {
  static constexpr int kGreatest = 128;
  static constexpr bool kSigned = true;
  static constexpr size_t kTile = kTileBytes;
  static constexpr Moved moved{0, 1};

  explicit ByteCodes(const Block* const (&)[Isa::kBlocks]) {}

  template <int group>
  MPQDM_INLINE typename Isa::Vector read(const typename Isa::Place& place) const {
    return Isa::load(place, size_t{kVectorBytes} * group);
  }
};

// Entries of tables.
template <class Isa, int kBits>
struct TableCodes {
  static constexpr int kGreatest = 128;
  static constexpr bool kSigned = true;
  static constexpr size_t kTile = PlaneCodes<Isa, kBits>::kTile;
  static constexpr Moved moved{0, 1};

  PlaneCodes<Isa, kBits> codes;
  typename Isa::template Lookup<kBits> lookup;

  explicit TableCodes(const Block* const (&blocks)[Isa::kBlocks]) : codes(blocks), lookup(blocks) {}

  template <int group>
  MPQDM_INLINE typename Isa::Vector read(const typename Isa::Place& place) const {
    return lookup.look_up(codes.template read<group>(place));
  }
};

// Vectors of codes 0 .. `greatest` whose sum fits a byte.
constexpr int bytes_together(int greatest) {
  return greatest <= 31 ? 8 : (greatest <= 63 ? 4 : (greatest <= 127 ? 2 : 1));
}

template <class Codes, class Products, class Place>
MPQDM_INLINE void add_tile(const Codes& codes, const Place& place, size_t input, Products& products) {
  [&]<int... group>(std::integer_sequence<int, group...>) __attribute__((always_inline)) {
    (products.template add<group>(codes.template read<group>(place), input), ...);
  }(std::make_integer_sequence<int, kTileGroups>{});
}

// A last tile of fewer groups: the codes behind them count as 0.
template <class Isa, class Codes, class Products, class Place>
MPQDM_INLINE void add_part(const Codes& codes, const Place& place, size_t input, int groups,
                           Products& products) {
  [&]<int... group>(std::integer_sequence<int, group...>) __attribute__((always_inline)) {
    (products.template add<group>(
         Isa::both(codes.template read<group>(place), Isa::bytes(group < groups ? 0xff : 0)), input),
     ...);
  }(std::make_integer_sequence<int, kTileGroups>{});
}

template <class Isa, class Codes, int kPixels>
void multiply_pixels(const FewInputs& inputs, int pixel, const Block* const (&blocks)[Isa::kBlocks],
                     int32_t* sums) {
  const Codes codes(blocks);
  typename Isa::template Products<Codes, kPixels> products(inputs, pixel);
  typename Isa::Place place(blocks);
  const int tiles = inputs.groups / kTileGroups;
  size_t input = 0;
  for (int t = 0; t < tiles; ++t, input += kTileDepth, place.step(Codes::kTile)) {
    add_tile(codes, place, input, products);
  }
  if (const int left = inputs.groups % kTileGroups; left > 0) {
    add_part<Isa>(codes, place, input, left, products);
  }
  for (int p = 0; p < kPixels; ++p) {
    const int at = pixel + p < inputs.pixels ? pixel + p : 0;
    const typename Isa::Vector moved = Isa::numbers(codes.moved.first * inputs.input_sums[at]);
    const typename Isa::Vector products_of = products.sum(p, inputs.zero_points[at]);
    Isa::store(sums + kPairRows * (pixel + p),
               Isa::add(moved, Isa::times(products_of, Isa::numbers(codes.moved.step))));
  }
}

template <class Isa, class Codes>
void multiply_codes(const FewInputs& inputs, const Block* const (&blocks)[Isa::kBlocks],
                    int32_t* sums) {
  for (int pixel = 0; pixel < inputs.pixels;) {
    const int left = inputs.pixels - pixel;
    if constexpr (Isa::kMostPixels >= 8) {
      if (left > 4) {
        multiply_pixels<Isa, Codes, 8>(inputs, pixel, blocks, sums);
        pixel += 8;
        continue;
      }
    }
    if (left > 2) {
      multiply_pixels<Isa, Codes, 4>(inputs, pixel, blocks, sums);
      pixel += 4;
    } else if (left == 2) {
      multiply_pixels<Isa, Codes, 2>(inputs, pixel, blocks, sums);
      pixel += 2;
    } else {
      multiply_pixels<Isa, Codes, 1>(inputs, pixel, blocks, sums);
      pixel += 1;
    }
  }
}

template <class Isa>
void multiply_few(const FewInputs& inputs, const Block* const (&blocks)[Isa::kBlocks],
                  int32_t* sums) {
  const bool table = blocks[0]->encoding == Encoding::table;
  switch (blocks[0]->bits) {
    case 1:
      return table ? multiply_codes<Isa, TableCodes<Isa, 1>>(inputs, blocks, sums)
                   : multiply_codes<Isa, PlaneCodes<Isa, 1>>(inputs, blocks, sums);
    case 2:
      return table ? multiply_codes<Isa, TableCodes<Isa, 2>>(inputs, blocks, sums)
                   : multiply_codes<Isa, PlaneCodes<Isa, 2>>(inputs, blocks, sums);
    case 3:
      return table ? multiply_codes<Isa, TableCodes<Isa, 3>>(inputs, blocks, sums)
                   : multiply_codes<Isa, PlaneCodes<Isa, 3>>(inputs, blocks, sums);
    case 4:
      return table ? multiply_codes<Isa, TableCodes<Isa, 4>>(inputs, blocks, sums)
                   : multiply_codes<Isa, PlaneCodes<Isa, 4>>(inputs, blocks, sums);
    case 5:
      return multiply_codes<Isa, PlaneCodes<Isa, 5>>(inputs, blocks, sums);
    case 6:
      return multiply_codes<Isa, PlaneCodes<Isa, 6>>(inputs, blocks, sums);
    case 7:
      return multiply_codes<Isa, PlaneCodes<Isa, 7>>(inputs, blocks, sums);
    default:
      return multiply_codes<Isa, ByteCodes<Isa>>(inputs, blocks, sums);
  }
}

constexpr size_t kLine = 64;     // bytes of a cache line
constexpr size_t kAhead = 4096;  // bytes between what is read and what is fetched for later

// Fetches `bytes` into the cache that lie `ahead` of `from`: weights are read once, faster than
// CPUs by themselves find out that they go on in the next page or block. Fetching what is not
// there does nothing, but no pointer may go there.
MPQDM_INLINE void fetch_ahead(const uint8_t* from, size_t ahead, size_t bytes) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(from) + ahead;
#pragma GCC unroll 8
  for (size_t at = 0; at < bytes; at += kLine) {
    _mm_prefetch(reinterpret_cast<const char*>(first + at), _MM_HINT_T0);
  }
}

// Where the vectors of one block lie.
struct OnePlace {
  const uint8_t* at;
  explicit OnePlace(const Block* const (&blocks)[1]) : at(blocks[0]->codes) {}
  MPQDM_INLINE void step(size_t bytes) {
    fetch_ahead(at, kAhead, bytes);
    at += bytes;
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
  static constexpr int kMostPixels = 4;  // that are multiplied together
  using Vector = __m256i;
  using Place = OnePlace;
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

// As `FewKernels::multiply`, a block at a time.
template <class Isa>
void multiply_blocks_apart(const FewInputs& inputs, const Block& first, const Block* second,
                           int32_t* sums) {
  multiply_few<Isa>(inputs, {&first}, sums);
  if (second != nullptr) multiply_few<Isa>(inputs, {second}, sums + kBlockRows);
}

int32_t sum_bytes(const uint8_t* inputs, size_t count) {
  int32_t sum = 0;
  for (size_t i = 0; i < count; ++i) sum += inputs[i];
  return sum;
}

}  // namespace
}  // namespace mpqdm
