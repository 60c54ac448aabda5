// Products of a few pixels with VNNI's int8 dot products (see few.h).
#pragma once

#include "few_x86.h"

namespace mpqdm {
namespace {

int32_t copy_inputs(const uint8_t* inputs, size_t count, int32_t, uint8_t* prepared) {
  std::memcpy(prepared, inputs, count);
  return sum_bytes(inputs, count);
}

// `Dot` multiplies uint8 by int8, in vectors of `Isa`, and adds four of them to a
// sum. Several sums of a pixel, as an instruction that adds to one waits for the one before.
template <class Isa, class Dot, class Codes, int kPixels>
class DotProducts {
 public:
  using Vector = typename Isa::Vector;

  DotProducts(const FewInputs& inputs, int pixel) {
    for (int p = 0; p < kPixels; ++p) {
      x_[p] = inputs.of(pixel + p);
      for (int chain = 0; chain < kChains; ++chain) sums_[p][chain] = Isa::numbers(0);
    }
    for (int chain = 0; chain < kWeightChains; ++chain) weights_[chain] = Isa::numbers(0);
  }

  template <int group>
  MPQDM_INLINE void add(Vector codes, size_t input) {
#pragma GCC unroll 8
    for (int p = 0; p < kPixels; ++p) {
      const Vector x = Isa::repeat(x_[p] + input + kGroupDepth * group);
      Vector& sum = sums_[p][group % kChains];
      sum = Dot::add(sum, x, codes);
    }
    if constexpr (Codes::kSigned) {
      Vector& weights = weights_[group % kWeightChains];
      weights = Dot::add(weights, Isa::bytes(1), codes);
    } else {
      constexpr int kTogether = bytes_together(Codes::kGreatest);
      together_ = group % kTogether == 0 ? codes : Dot::add_bytes(together_, codes);
      if constexpr (group % kTogether == kTogether - 1) {
        Vector& weights = weights_[group / kTogether % kWeightChains];
        weights = Dot::add(weights, together_, Isa::bytes(1));
      }
    }
  }

  // Of inputs less zero points.
  Vector sum(int p, int32_t zero_point) const {
    Vector all = sums_[p][0];
    for (int chain = 1; chain < kChains; ++chain) all = Isa::add(all, sums_[p][chain]);
    Vector weights = weights_[0];
    for (int chain = 1; chain < kWeightChains; ++chain) weights = Isa::add(weights, weights_[chain]);
    return Isa::add(all, Isa::times(weights, Isa::numbers(-zero_point)));
  }

 private:
  static constexpr int kChains = kPixels < Isa::kSums ? Isa::kSums / kPixels : 1;
  static constexpr int kWeightChains = kPixels >= 4 || bytes_together(Codes::kGreatest) == 8 ? 1 : 4;

  const uint8_t* x_[kPixels];
  Vector sums_[kPixels][kChains], weights_[kWeightChains], together_;
};

}  // namespace
}  // namespace mpqdm
