// Products of a few pixels with ARM's int8 dot products (see few.h).
#pragma once

#include "few_neon.h"

namespace mpqdm {
namespace {

// Several sums of a pixel, as an instruction that adds to one waits for the one before.
template <class Codes, int kPixels>
class DotProducts {
 public:
  DotProducts(const FewInputs& inputs, int pixel) {
    for (int p = 0; p < kPixels; ++p) {
      const int at = pixel + p < inputs.pixels ? pixel + p : 0;
      x_[p] = inputs.inputs + static_cast<size_t>(at) * inputs.pitch;
      for (int chain = 0; chain < kChains; ++chain) sums_[p][chain] = NeonBlock::numbers(0);
    }
    weights_ = NeonBlock::numbers(0);
  }

  template <int group>
  MPQDM_INLINE void add(const Bytes& codes, size_t input) {
    constexpr int kLane = group % kInputGroups;
    const int8x16_t low = vreinterpretq_s8_u8(codes.low), high = vreinterpretq_s8_u8(codes.high);
#pragma GCC unroll 8
    for (int p = 0; p < kPixels; ++p) {
      if constexpr (kLane == 0) {
        four_[p] = vreinterpretq_s8_u8(vld1q_u8(x_[p] + input + kGroupDepth * group));
      }
      Numbers& sum = sums_[p][group % kChains];
      sum.low = vdotq_laneq_s32(sum.low, low, four_[p], kLane);
      sum.high = vdotq_laneq_s32(sum.high, high, four_[p], kLane);
    }
    if constexpr (Codes::kSigned) {
      weights_.low = vdotq_s32(weights_.low, low, vdupq_n_s8(1));
      weights_.high = vdotq_s32(weights_.high, high, vdupq_n_s8(1));
    } else {
      add_weights<group>(codes);
    }
  }

  // Of inputs less zero points.
  Numbers sum(int p, int32_t zero_point) const {
    Numbers all = sums_[p][0];
    for (int chain = 1; chain < kChains; ++chain) all = NeonBlock::add(all, sums_[p][chain]);
    return NeonBlock::add(all, NeonBlock::times(weights_, NeonBlock::numbers(-zero_point)));
  }

 private:
  static constexpr int kChains = kPixels < 4 ? 4 / kPixels : 1;

  // Codes from 0 on are summed as bytes as long as they fit.
  template <int group>
  MPQDM_INLINE void add_weights(const Bytes& codes) {
    constexpr int kTogether = bytes_together(Codes::kGreatest);
    if constexpr (group % kTogether == 0) {
      together_ = codes;
    } else {
      together_.low = vaddq_u8(together_.low, codes.low);
      together_.high = vaddq_u8(together_.high, codes.high);
    }
    if constexpr (group % kTogether == kTogether - 1) {
      weights_.low = add_four(weights_.low, together_.low);
      weights_.high = add_four(weights_.high, together_.high);
    }
  }

  static MPQDM_INLINE int32x4_t add_four(int32x4_t sum, uint8x16_t bytes) {
    return vreinterpretq_s32_u32(vdotq_u32(vreinterpretq_u32_s32(sum), bytes, vdupq_n_u8(1)));
  }

  const uint8_t* x_[kPixels];
  int8x16_t four_[kPixels];
  Numbers sums_[kPixels][kChains], weights_;
  Bytes together_;
};

struct DotBlock : NeonBlock {
  template <class Codes>
  static constexpr int kMostPixels = 8;
  template <class Codes, int kPixels>
  using Products = DotProducts<Codes, kPixels>;
};

}  // namespace
}  // namespace mpqdm
