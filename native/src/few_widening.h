// Products of a few pixels on ARMv8.0, without int8 dot products (see few.h): products of int8 are
// summed in 16 bits as long as they fit, then widened.
#pragma once

#include "few_neon.h"

namespace mpqdm {
namespace {

template <class Isa, class Codes, int kPixels>
class WideningProducts {
 public:
  using Sums = typename Isa::Sums;
  static constexpr int kHalves = Isa::kHalves;

  WideningProducts(const FewInputs& inputs, int pixel) {
    for (int p = 0; p < kPixels; ++p) {
      x_[p] = inputs.of(pixel + p);
      MPQDM_HALVES(h) sums_[p][h][0] = sums_[p][h][1] = vdupq_n_s32(0);
    }
    weights_ = Isa::numbers(0);
  }

  template <int group>
  MPQDM_INLINE void add(const Bytes<kHalves>& codes, size_t input) {
    constexpr int kLane = group % kInputGroups;
#pragma GCC unroll 8
    for (int p = 0; p < kPixels; ++p) {
      if constexpr (kLane == 0) {
        four_[p] = vreinterpretq_s32_u8(vld1q_u8(x_[p] + input + kGroupDepth * group));
      }
      const int8x16_t x = vreinterpretq_s8_s32(vdupq_laneq_s32(four_[p], kLane));
      MPQDM_HALVES(h) {
        add_products<group>(vreinterpretq_s8_u8(codes.of[h]), x, narrow_[p][h], sums_[p][h]);
      }
    }
    add_weights<group>(codes);
  }

  // Of inputs less zero points.
  Sums sum(int p, int32_t zero_point) const {
    Sums all;
    MPQDM_HALVES(h) all.of[h] = vpaddq_s32(sums_[p][h][0], sums_[p][h][1]);
    return Isa::add(all, Isa::times(weights_, Isa::numbers(-zero_point)));
  }

 private:
  static constexpr int kFit = 32767 / (128 * Codes::kGreatest);
  static constexpr int kSteps = kFit >= 8 ? 8 : (kFit >= 4 ? 4 : (kFit >= 2 ? 2 : 1));
  static_assert(kFit >= 1);

  template <int group>
  static MPQDM_INLINE void add_products(int8x16_t weights, int8x16_t x, int16x8_t (&narrow)[2],
                                        int32x4_t (&sums)[2]) {
    if constexpr (group % kSteps == 0) {
      narrow[0] = vmull_s8(vget_low_s8(weights), vget_low_s8(x));
      narrow[1] = vmull_high_s8(weights, x);
    } else {
      narrow[0] = vmlal_s8(narrow[0], vget_low_s8(weights), vget_low_s8(x));
      narrow[1] = vmlal_high_s8(narrow[1], weights, x);
    }
    if constexpr (group % kSteps == kSteps - 1) {
      sums[0] = vpadalq_s16(sums[0], narrow[0]);
      sums[1] = vpadalq_s16(sums[1], narrow[1]);
    }
  }

  // Sums of a tile fit 16 bits.
  template <int group>
  MPQDM_INLINE void add_weights(const Bytes<kHalves>& codes) {
    MPQDM_HALVES(h) {
      const int8x16_t weights = vreinterpretq_s8_u8(codes.of[h]);
      tile_[h] = group == 0 ? vpaddlq_s8(weights) : vpadalq_s8(tile_[h], weights);
      if constexpr (group == kTileGroups - 1) {
        weights_.of[h] = vpadalq_s16(weights_.of[h], tile_[h]);
      }
    }
  }

  const uint8_t* x_[kPixels];
  int32x4_t four_[kPixels];
  int16x8_t narrow_[kPixels][kHalves][2];  // 2 rows x 4 inputs each
  int32x4_t sums_[kPixels][kHalves][2];
  int16x8_t tile_[kHalves];
  Sums weights_;
};

template <int kHalves>
struct WideningRows : NeonRows<kHalves> {
  static constexpr bool kGainsWithoutLeast = true;  // two products less than 2^14 fit 16 bits
  static constexpr int kMostPixels = 4 / kHalves;
  static constexpr int kLeastPixels = kHalves == 2 ? 1 : kMostPixels;
  template <class Codes, int kPixels>
  using Products = WideningProducts<WideningRows, Codes, kPixels>;
};

constexpr FewKernels kFewWidening = {8, 1, copy_inputs,
                                     multiply_few_neon<WideningRows<2>, WideningRows<1>>};

}  // namespace
}  // namespace mpqdm
