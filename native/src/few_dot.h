// Products of a few pixels with ARM's int8 dot products (see few.h).
#pragma once

#include "few_neon.h"

namespace mpqdm {
namespace {

// Several sums of a pixel, as an instruction that adds to one waits for the one before.
template <class Isa, class Codes, int kPixels>
class DotProducts {
 public:
  using Sums = typename Isa::Sums;
  static constexpr int kHalves = Isa::kHalves;

  DotProducts(const FewInputs& inputs, int pixel) {
    for (int p = 0; p < kPixels; ++p) {
      x_[p] = inputs.of(pixel + p);
      for (int chain = 0; chain < kChains; ++chain) sums_[p][chain] = Isa::numbers(0);
    }
    weights_ = Isa::numbers(0);
  }

  template <int group>
  MPQDM_INLINE void add(const Bytes<kHalves>& codes, size_t input) {
    constexpr int kLane = group % kInputGroups;
#pragma GCC unroll 8
    for (int p = 0; p < kPixels; ++p) {
      if constexpr (kLane == 0) {
        four_[p] = vreinterpretq_s8_u8(vld1q_u8(x_[p] + input + kGroupDepth * group));
      }
      Sums& sum = sums_[p][group % kChains];
      MPQDM_HALVES(h) {
        sum.of[h] = vdotq_laneq_s32(sum.of[h], vreinterpretq_s8_u8(codes.of[h]), four_[p], kLane);
      }
    }
    add_weights<group>(codes);
  }

  // Of inputs less zero points.
  Sums sum(int p, int32_t zero_point) const {
    Sums all = sums_[p][0];
    for (int chain = 1; chain < kChains; ++chain) all = Isa::add(all, sums_[p][chain]);
    return Isa::add(all, Isa::times(weights_, Isa::numbers(-zero_point)));
  }

 private:
  static constexpr int kChains = kPixels < 4 ? 4 / kPixels : 1;

  // Codes from 0 on are summed as bytes as long as they fit.
  template <int group>
  MPQDM_INLINE void add_weights(const Bytes<kHalves>& codes) {
    constexpr int kTogether = bytes_together(Codes::kGreatest);
    MPQDM_HALVES(h) {
      int32x4_t& sum = weights_.of[h];
      if constexpr (Codes::kSigned) {
        sum = vdotq_s32(sum, vreinterpretq_s8_u8(codes.of[h]), vdupq_n_s8(1));
      } else {
        uint8x16_t& together = together_.of[h];
        together = group % kTogether == 0 ? codes.of[h] : vaddq_u8(together, codes.of[h]);
        if constexpr (group % kTogether == kTogether - 1) {
          const uint32x4_t more = vdotq_u32(vreinterpretq_u32_s32(sum), together, vdupq_n_u8(1));
          sum = vreinterpretq_s32_u32(more);
        }
      }
    }
  }

  const uint8_t* x_[kPixels];
  int8x16_t four_[kPixels];
  Sums sums_[kPixels][kChains], weights_;
  Bytes<kHalves> together_;
};

template <int kHalves>
struct DotRows : NeonRows<kHalves> {
  static constexpr int kMostPixels = 8 / kHalves;
  static constexpr int kLeastPixels = kHalves == 2 ? 1 : kMostPixels;
  template <class Codes, int kPixels>
  using Products = DotProducts<DotRows, Codes, kPixels>;
};

constexpr FewKernels kFewDot = {8, 1, copy_inputs, multiply_few_neon<DotRows<2>, DotRows<1>>};

}  // namespace
}  // namespace mpqdm
