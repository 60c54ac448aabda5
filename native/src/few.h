// Multiplication of a few pixels by packed blocks: each vector of weights is unpacked in registers,
// multiplied by all pixels, and dropped. `Isa` is what an instruction set does with vectors of
// `Isa::kBlocks` blocks, 32 bytes of each.
//
// Codes of the encodings without tables are multiplied as they are, from 0 on, and the result is
// moved at the end: with w = first + step c and x less its zero point z,
//   sum (x - z) w = first sum (x - z) + step (sum x c - z sum c).
#pragma once

#include <utility>

#include "kernel_sets.h"
#include "unpack.h"

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

  Moved moved;

  explicit PlaneCodes(const Block* const (&blocks)[Isa::kBlocks])
      : moved{ladder(blocks[0]->encoding, kBits).first, ladder(blocks[0]->encoding, kBits).step} {}

  template <int group>
  MPQDM_INLINE typename Isa::Vector read(const typename Isa::Place& place) const {
    return Isa::template Planes<kBits>::template read<group>(place);
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

// Entries of tables, whose absolute numbers are at most `kMost`.
template <class Isa, int kBits, int kMost>
struct TableCodes {
  static constexpr int kGreatest = kMost;
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
    const auto moved = Isa::numbers(codes.moved.first * inputs.input_sums[at]);
    const auto products_of = products.sum(p, inputs.zero_points[at]);
    Isa::store(sums + kPairRows * (pixel + p),
               Isa::add(moved, Isa::times(products_of, Isa::numbers(codes.moved.step))));
  }
}

// Pixels from `pixel` on, `kPixels` together; a rest that fewer take by fewer.
template <class Isa, class Codes, int kPixels>
void multiply_rest(const FewInputs& inputs, int pixel, const Block* const (&blocks)[Isa::kBlocks],
                   int32_t* sums) {
  constexpr int kFewer = kPixels > Isa::kLeastPixels ? kPixels / 2 : 0;
  for (; inputs.pixels - pixel > kFewer; pixel += kPixels) {
    multiply_pixels<Isa, Codes, kPixels>(inputs, pixel, blocks, sums);
  }
  if constexpr (kFewer > 0) multiply_rest<Isa, Codes, kFewer>(inputs, pixel, blocks, sums);
}

template <class Isa, class Codes>
void multiply_codes(const FewInputs& inputs, const Block* const (&blocks)[Isa::kBlocks],
                    int32_t* sums) {
  multiply_rest<Isa, Codes, Isa::kMostPixels>(inputs, 0, blocks, sums);
}

template <class Isa, int kBits>
void multiply_encoded(const FewInputs& inputs, const Block* const (&blocks)[Isa::kBlocks],
                      int32_t* sums) {
  if (blocks[0]->encoding != Encoding::table) {
    return multiply_codes<Isa, PlaneCodes<Isa, kBits>>(inputs, blocks, sums);
  }
  if constexpr (Isa::kGainsWithoutLeast) {  // by tables without -128
    if (blocks[0]->largest < 128) {
      return multiply_codes<Isa, TableCodes<Isa, kBits, 127>>(inputs, blocks, sums);
    }
  }
  multiply_codes<Isa, TableCodes<Isa, kBits, 128>>(inputs, blocks, sums);
}

template <class Isa>
void multiply_few(const FewInputs& inputs, const Block* const (&blocks)[Isa::kBlocks],
                  int32_t* sums) {
  switch (blocks[0]->bits) {
    case 1:
      return multiply_encoded<Isa, 1>(inputs, blocks, sums);
    case 2:
      return multiply_encoded<Isa, 2>(inputs, blocks, sums);
    case 3:
      return multiply_encoded<Isa, 3>(inputs, blocks, sums);
    case 4:
      return multiply_encoded<Isa, 4>(inputs, blocks, sums);
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
    __builtin_prefetch(reinterpret_cast<const void*>(first + at));
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

// As `FewKernels::multiply`, a block at a time.
template <class Isa>
void multiply_blocks_apart(const FewInputs& inputs, const Block& first, const Block* second,
                           int32_t* sums) {
  multiply_few<Isa>(inputs, {&first}, sums);
  if (second != nullptr) multiply_few<Isa>(inputs, {second}, sums + kBlockRows);
}

}  // namespace
}  // namespace mpqdm
