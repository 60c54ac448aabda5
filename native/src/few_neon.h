// What the sets of ARM have in common when they multiply a few pixels (see few.h): a group is two
// registers of 4 rows each, and a vector both of them, or one where there are more pixels.
#pragma once

#include "few.h"
#include "unpack_neon.h"

namespace mpqdm {
namespace {

#define MPQDM_HALVES(h) _Pragma("GCC unroll 2") for (int h = 0; h < kHalves; ++h)

template <int kHalves>
struct Bytes {
  uint8x16_t of[kHalves];
};

template <int kHalves>
struct Numbers {
  int32x4_t of[kHalves];  // of a row each
};

constexpr int kHalfRows = kBlockRows / 2;
constexpr int kInputGroups = 4;  // whose inputs a register holds

// Codes from bit planes. A shift inserts a plane's bits above those that are there, and with them
// others, which the next plane or a mask at the end replaces.
template <int kHalves, int kBits>
struct InsertedPlanes {
  using Vector = Bytes<kHalves>;
  static constexpr int kFirst = (kBits & 4) != 0 ? 4 : ((kBits & 2) != 0 ? 2 : 1);
  static constexpr int kLast = kBits & -kBits;

  // A plane's bits of a group at the low end of each byte, and those of later groups above them.
  template <int width, int group>
  static MPQDM_INLINE Vector plane(const uint8_t* at) {
    constexpr int kShift = width * (group / width);
    Vector bits;
    MPQDM_HALVES(h) {
      bits.of[h] = vld1q_u8(at + kVectorBytes * (group % width) + kHalfBytes * h);
      if constexpr (kShift > 0) bits.of[h] = vshrq_n_u8(bits.of[h], kShift);
    }
    return bits;
  }

  template <int from>
  static MPQDM_INLINE void insert(Vector& codes, const Vector& bits) {
    MPQDM_HALVES(h) codes.of[h] = vsliq_n_u8(codes.of[h], bits.of[h], from);
  }

  template <int group>
  static MPQDM_INLINE Vector read(const OnePlace& place) {
    Vector codes = plane<kFirst, group>(place.at);
    if constexpr (kFirst == 4 && (kBits & 2) != 0) {
      insert<4>(codes, plane<2, group>(place.at + 4 * kVectorBytes));
    }
    if constexpr (kFirst > 1 && (kBits & 1) != 0) {
      insert<kBits & 6>(codes, plane<1, group>(place.at + (kBits & 6) * kVectorBytes));
    }
    // Of the group whose bits end a byte, the shift has left nothing above them.
    if constexpr (group / kLast < 8 / kLast - 1) {
      MPQDM_HALVES(h) codes.of[h] = vandq_u8(codes.of[h], vdupq_n_u8((1 << kBits) - 1));
    }
    return codes;
  }
};

// Entries of the tables of 4 rows, 4 * 2^bits bytes: a lookup sees as many registers as they fill.
// Registers stand in the types that lookups take: others would be copied for each.
template <int kBits>
struct HalfTables {
  uint8x16_t registers;

  explicit HalfTables(const uint8_t* bytes) : registers(vld1q_u8(bytes)) {}
  MPQDM_INLINE uint8x16_t look_up(uint8x16_t index) const { return vqtbl1q_u8(registers, index); }
};

template <>
struct HalfTables<3> {
  uint8x16x2_t registers;

  explicit HalfTables(const uint8_t* bytes) : registers(vld1q_u8_x2(bytes)) {}
  MPQDM_INLINE uint8x16_t look_up(uint8x16_t index) const { return vqtbl2q_u8(registers, index); }
};

template <>
struct HalfTables<4> {
  uint8x16x4_t registers;

  explicit HalfTables(const uint8_t* bytes) : registers(vld1q_u8_x4(bytes)) {}
  MPQDM_INLINE uint8x16_t look_up(uint8x16_t index) const { return vqtbl4q_u8(registers, index); }
};

// Behind tables of fewer bytes than a register may be no more memory.
template <int kBits>
HalfTables<kBits> read_tables(const int8_t* tables) {
  uint8_t bytes[64] = {};
  __builtin_memcpy(bytes, tables, size_t{kHalfRows} << kBits);
  return HalfTables<kBits>(bytes);
}

template <int kHalves, int kBits>
class NeonLookup {
 public:
  explicit NeonLookup(const Block* const (&blocks)[1])
      : first_(read_tables<kBits>(blocks[0]->tables)),
        last_(read_tables<kBits>(blocks[0]->tables + ((kHalves - 1) * kHalfRows << kBits))) {
    uint8_t starts[kHalfBytes];
    for (int lane = 0; lane < kHalfBytes; ++lane) {
      starts[lane] = static_cast<uint8_t>((lane / kGroupDepth) << kBits);
    }
    row_start_ = vld1q_u8(starts);
  }

  MPQDM_INLINE Bytes<kHalves> look_up(Bytes<kHalves> codes) const {
    codes.of[0] = first_.look_up(vorrq_u8(codes.of[0], row_start_));
    if constexpr (kHalves == 2) codes.of[1] = last_.look_up(vorrq_u8(codes.of[1], row_start_));
    return codes;
  }

 private:
  HalfTables<kBits> first_, last_;
  uint8x16_t row_start_;  // where a row's table begins
};

template <int kCount>
struct NeonRows {
  static constexpr int kBlocks = 1;
  static constexpr int kHalves = kCount;
  static constexpr bool kGainsWithoutLeast = false;
  using Vector = Bytes<kHalves>;
  using Sums = Numbers<kHalves>;
  using Place = OnePlace;
  template <int kBits>
  using Planes = InsertedPlanes<kHalves, kBits>;
  template <int kBits>
  using Lookup = NeonLookup<kHalves, kBits>;

  static MPQDM_INLINE Vector load(const OnePlace& place, size_t at) {
    Vector x;
    MPQDM_HALVES(h) x.of[h] = vld1q_u8(place.at + at + kHalfBytes * h);
    return x;
  }
  static MPQDM_INLINE Vector bytes(int value) {
    Vector x;
    MPQDM_HALVES(h) x.of[h] = vdupq_n_u8(static_cast<uint8_t>(value));
    return x;
  }
  static MPQDM_INLINE Vector both(Vector x, const Vector& mask) {
    MPQDM_HALVES(h) x.of[h] = vandq_u8(x.of[h], mask.of[h]);
    return x;
  }
  static MPQDM_INLINE Sums numbers(int value) {
    Sums x;
    MPQDM_HALVES(h) x.of[h] = vdupq_n_s32(value);
    return x;
  }
  static MPQDM_INLINE Sums add(Sums x, const Sums& y) {
    MPQDM_HALVES(h) x.of[h] = vaddq_s32(x.of[h], y.of[h]);
    return x;
  }
  static MPQDM_INLINE Sums times(Sums x, const Sums& y) {
    MPQDM_HALVES(h) x.of[h] = vmulq_s32(x.of[h], y.of[h]);
    return x;
  }
  static MPQDM_INLINE void store(int32_t* sums, const Sums& x) {
    MPQDM_HALVES(h) vst1q_s32(sums + kHalfRows * h, x.of[h]);
  }
};

// As `FewKernels::multiply`. With more pixels than `Whole` multiplies together, `Half` takes 4 rows at
// a time, so that sums of twice as many pixels have registers, and none is unpacked twice.
template <class Whole, class Half>
void multiply_few_neon(const FewInputs& inputs, const Block& first, const Block* second,
                       int32_t* sums) {
  if (inputs.pixels <= Whole::kMostPixels) {
    return multiply_blocks_apart<Whole>(inputs, first, second, sums);
  }
  for (const Block* block : {&first, second}) {
    if (block == nullptr) break;
    Block rows = *block;
    for (int half = 0; half < 2; ++half, sums += kHalfRows) {
      multiply_few<Half>(inputs, {&rows}, sums);
      rows.codes += kHalfBytes;
      if (rows.encoding == Encoding::table) rows.tables += kHalfRows << rows.bits;
    }
  }
}

// As `FewKernels::prepare`: inputs are int8 already.
int32_t copy_inputs(const uint8_t* inputs, size_t count, int32_t, uint8_t* prepared) {
  __builtin_memcpy(prepared, inputs, count);
  int32_t sum = 0;
  for (size_t i = 0; i < count; ++i) sum += static_cast<int8_t>(inputs[i]);
  return sum;
}

}  // namespace
}  // namespace mpqdm
