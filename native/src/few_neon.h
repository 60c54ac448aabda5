// What the sets of ARM have in common when they multiply a few pixels (see few.h): a group is two
// registers, of 4 rows each.
#pragma once

#include "few.h"
#include "unpack_neon.h"

namespace mpqdm {
namespace {

struct Bytes {
  uint8x16_t low, high;  // rows 0-3 and 4-7
};

struct Numbers {
  int32x4_t low, high;  // as above
};

// Codes from bit planes. A shift inserts a plane's bits above those that are there, and with them
// others, which the next plane or a mask at the end replaces.
template <int kBits>
struct InsertedPlanes {
  static constexpr int kFirst = (kBits & 4) != 0 ? 4 : ((kBits & 2) != 0 ? 2 : 1);
  static constexpr int kLast = kBits & -kBits;

  // A plane's bits of a group at the low end of each byte, and those of later groups above them.
  template <int width, int group>
  static MPQDM_INLINE Bytes plane(const uint8_t* at) {
    constexpr int kShift = width * (group / width);
    at += kVectorBytes * (group % width);
    const uint8x16_t low = vld1q_u8(at), high = vld1q_u8(at + kHalfBytes);
    if constexpr (kShift == 0) {
      return {low, high};
    } else {
      return {vshrq_n_u8(low, kShift), vshrq_n_u8(high, kShift)};
    }
  }

  template <int from>
  static MPQDM_INLINE Bytes insert(const Bytes& codes, const Bytes& bits) {
    return {vsliq_n_u8(codes.low, bits.low, from), vsliq_n_u8(codes.high, bits.high, from)};
  }

  template <int group>
  static MPQDM_INLINE Bytes read(const OnePlace& place) {
    Bytes codes = plane<kFirst, group>(place.at);
    if constexpr (kFirst == 4 && (kBits & 2) != 0) {
      codes = insert<4>(codes, plane<2, group>(place.at + 4 * kVectorBytes));
    }
    if constexpr (kFirst > 1 && (kBits & 1) != 0) {
      codes = insert<kBits & 6>(codes, plane<1, group>(place.at + (kBits & 6) * kVectorBytes));
    }
    // Of the group whose bits end a byte, the shift has left nothing above them.
    if constexpr (group / kLast == 8 / kLast - 1) {
      return codes;
    } else {
      const uint8x16_t mask = vdupq_n_u8((1 << kBits) - 1);
      return {vandq_u8(codes.low, mask), vandq_u8(codes.high, mask)};
    }
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
  __builtin_memcpy(bytes, tables, size_t{4} << kBits);
  return HalfTables<kBits>(bytes);
}

template <int kBits>
class NeonLookup {
 public:
  explicit NeonLookup(const Block* const (&blocks)[1])
      : low_(read_tables<kBits>(blocks[0]->tables)),
        high_(read_tables<kBits>(blocks[0]->tables + (4 << kBits))) {
    uint8_t starts[kHalfBytes];
    for (int lane = 0; lane < kHalfBytes; ++lane) {
      starts[lane] = static_cast<uint8_t>((lane / kGroupDepth) << kBits);
    }
    row_start_ = vld1q_u8(starts);
  }

  MPQDM_INLINE Bytes look_up(const Bytes& codes) const {
    return {low_.look_up(vorrq_u8(codes.low, row_start_)),
            high_.look_up(vorrq_u8(codes.high, row_start_))};
  }

 private:
  HalfTables<kBits> low_, high_;
  uint8x16_t row_start_;  // where a row's table begins
};

struct NeonBlock {
  static constexpr int kBlocks = 1;
  using Vector = Bytes;
  using Place = OnePlace;
  template <int kBits>
  using Planes = InsertedPlanes<kBits>;
  template <int kBits>
  using Lookup = NeonLookup<kBits>;

  static MPQDM_INLINE Bytes load(const OnePlace& place, size_t at) {
    return {vld1q_u8(place.at + at), vld1q_u8(place.at + at + kHalfBytes)};
  }
  static MPQDM_INLINE Bytes bytes(int value) {
    const uint8x16_t all = vdupq_n_u8(static_cast<uint8_t>(value));
    return {all, all};
  }
  static MPQDM_INLINE Bytes both(const Bytes& x, const Bytes& mask) {
    return {vandq_u8(x.low, mask.low), vandq_u8(x.high, mask.high)};
  }
  static MPQDM_INLINE Numbers numbers(int value) {
    return {vdupq_n_s32(value), vdupq_n_s32(value)};
  }
  static MPQDM_INLINE Numbers add(const Numbers& x, const Numbers& y) {
    return {vaddq_s32(x.low, y.low), vaddq_s32(x.high, y.high)};
  }
  static MPQDM_INLINE Numbers times(const Numbers& x, const Numbers& y) {
    return {vmulq_s32(x.low, y.low), vmulq_s32(x.high, y.high)};
  }
  static MPQDM_INLINE void store(int32_t* sums, const Numbers& x) {
    vst1q_s32(sums, x.low);
    vst1q_s32(sums + 4, x.high);
  }
};

// As `FewKernels::prepare`: inputs are int8 already.
int32_t copy_inputs(const uint8_t* inputs, size_t count, int32_t, uint8_t* prepared) {
  __builtin_memcpy(prepared, inputs, count);
  int32_t sum = 0;
  for (size_t i = 0; i < count; ++i) sum += static_cast<int8_t>(inputs[i]);
  return sum;
}

constexpr int kInputGroups = 4;  // whose inputs a register holds

}  // namespace
}  // namespace mpqdm
