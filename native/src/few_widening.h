// Products of a few pixels on ARMv8.0, without int8 dot products (see few.h): products of int8 are
// summed in 16 bits as long as they fit, then widened.
#pragma once

#include "few_neon.h"

namespace mpqdm {
namespace {

template <class Codes, int kPixels>
class WideningProducts {
 public:
  WideningProducts(const FewInputs& inputs, int pixel) {
    for (int p = 0; p < kPixels; ++p) {
      const int at = pixel + p < inputs.pixels ? pixel + p : 0;
      x_[p] = inputs.inputs + static_cast<size_t>(at) * inputs.pitch;
      for (int32x4_t& sum : sums_[p]) sum = vdupq_n_s32(0);
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
        four_[p] = vreinterpretq_s32_u8(vld1q_u8(x_[p] + input + kGroupDepth * group));
      }
      const int8x16_t x = vreinterpretq_s8_s32(vdupq_laneq_s32(four_[p], kLane));
      int16x8_t(&narrow)[4] = narrow_[p];
      if constexpr (group % kSteps == 0) {
        narrow[0] = vmull_s8(vget_low_s8(low), vget_low_s8(x));
        narrow[1] = vmull_high_s8(low, x);
        narrow[2] = vmull_s8(vget_low_s8(high), vget_low_s8(x));
        narrow[3] = vmull_high_s8(high, x);
      } else {
        narrow[0] = vmlal_s8(narrow[0], vget_low_s8(low), vget_low_s8(x));
        narrow[1] = vmlal_high_s8(narrow[1], low, x);
        narrow[2] = vmlal_s8(narrow[2], vget_low_s8(high), vget_low_s8(x));
        narrow[3] = vmlal_high_s8(narrow[3], high, x);
      }
      if constexpr (group % kSteps == kSteps - 1) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sums_[p][i] = vpadalq_s16(sums_[p][i], narrow[i]);
      }
    }
    add_weights<group>(low, high);
  }

  // Of inputs less zero points.
  Numbers sum(int p, int32_t zero_point) const {
    const Numbers all = {vpaddq_s32(sums_[p][0], sums_[p][1]), vpaddq_s32(sums_[p][2], sums_[p][3])};
    return NeonBlock::add(all, NeonBlock::times(weights_, NeonBlock::numbers(-zero_point)));
  }

 private:
  static constexpr int kFit = 32767 / (128 * Codes::kGreatest);
  static constexpr int kSteps = kFit >= 8 ? 8 : (kFit >= 4 ? 4 : (kFit >= 2 ? 2 : 1));
  static_assert(kFit >= 1);

  // Sums of a tile fit 16 bits.
  template <int group>
  MPQDM_INLINE void add_weights(int8x16_t low, int8x16_t high) {
    if constexpr (group == 0) {
      low_ = vpaddlq_s8(low);
      high_ = vpaddlq_s8(high);
    } else {
      low_ = vpadalq_s8(low_, low);
      high_ = vpadalq_s8(high_, high);
    }
    if constexpr (group == kTileGroups - 1) {
      weights_.low = vpadalq_s16(weights_.low, low_);
      weights_.high = vpadalq_s16(weights_.high, high_);
    }
  }

  const uint8_t* x_[kPixels];
  int32x4_t four_[kPixels];
  int16x8_t narrow_[kPixels][4];  // 2 rows x 4 inputs each
  int32x4_t sums_[kPixels][4];
  int16x8_t low_, high_;
  Numbers weights_;
};

struct WideningBlock : NeonBlock {
  template <class Codes>
  static constexpr int kMostPixels = 2;
  template <class Codes, int kPixels>
  using Products = WideningProducts<Codes, kPixels>;
};

}  // namespace
}  // namespace mpqdm
