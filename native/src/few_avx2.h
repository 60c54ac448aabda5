// Products of a few pixels with AVX2, without int8 dot products (see few.h). Inputs are prepared
// twice: as int8, by which vpmaddubsw multiplies codes from 0 on (so 127, the greatest of 7 bits, fits
// 16 bits with its pair); and less their zero points in 16 bits, those at even and at odd places apart,
// by which vpmaddwd multiplies any int8 weight.
#pragma once

#include "few_x86.h"

namespace mpqdm {
namespace {

constexpr int kOffset = 128;  // of inputs as they come, uint8

// `count` int8; behind them, for each 4 inputs, 2 int16 at even places and 2 at odd ones.
int32_t prepare_avx2(const uint8_t* inputs, size_t count, int32_t zero_point, uint8_t* prepared) {
  for (size_t i = 0; i < count; ++i) prepared[i] = inputs[i] ^ 0x80;
  uint8_t* wide = prepared + count;
  for (size_t i = 0; i < count; i += 4, wide += 8) {
    const int16_t four[4] = {static_cast<int16_t>(inputs[i] - zero_point),
                             static_cast<int16_t>(inputs[i + 2] - zero_point),
                             static_cast<int16_t>(inputs[i + 1] - zero_point),
                             static_cast<int16_t>(inputs[i + 3] - zero_point)};
    std::memcpy(wide, four, sizeof four);
  }
  return sum_bytes(inputs, count);
}

// Keeps compilers from adding products up in another order, for which they would need more registers
// than there are: they know that integer sums may be reordered, but not what that costs.
void keep_order(__m256i& sum) { asm("" : "+x"(sum)); }

template <class Codes, int kPixels, bool kSigned>
class Avx2Products;

// Codes from 0 on: products of pairs are summed in 16 bits as long as they fit.
template <class Codes, int kPixels>
class Avx2Products<Codes, kPixels, false> {
 public:
  Avx2Products(const FewInputs& inputs, int pixel) {
    for (int p = 0; p < kPixels; ++p) {
      x_[p] = inputs.of(pixel + p);
      sums_[p] = _mm256_setzero_si256();
    }
    weights_ = _mm256_setzero_si256();
  }

  template <int group>
  MPQDM_INLINE void add(__m256i codes, size_t input) {
    const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 8
    for (int p = 0; p < kPixels; ++p) {
      const __m256i x = broadcast_four(x_[p] + input + kGroupDepth * group);
      const __m256i pairs = _mm256_maddubs_epi16(codes, x);
      narrow_[p] = group % kSteps == 0 ? pairs : _mm256_add_epi16(narrow_[p], pairs);
      keep_order(narrow_[p]);
      if constexpr (group % kSteps == kSteps - 1) {
        sums_[p] = _mm256_add_epi32(sums_[p], _mm256_madd_epi16(narrow_[p], ones));
        keep_order(sums_[p]);
      }
    }
    constexpr int kTogether = bytes_together(Codes::kGreatest);
    together_ = group % kTogether == 0 ? codes : _mm256_add_epi8(together_, codes);
    if constexpr (group % kTogether == kTogether - 1) {
      const __m256i pairs = _mm256_maddubs_epi16(together_, _mm256_set1_epi8(1));
      weights_ = _mm256_add_epi32(weights_, _mm256_madd_epi16(pairs, ones));
    }
  }

  __m256i sum(int p, int32_t zero_point) const {
    const __m256i moved = _mm256_mullo_epi32(weights_, _mm256_set1_epi32(kOffset - zero_point));
    return _mm256_add_epi32(sums_[p], moved);
  }

 private:
  static constexpr int kFit = 32767 / (2 * 128 * Codes::kGreatest);
  static constexpr int kSteps = kFit >= 8 ? 8 : (kFit >= 4 ? 4 : (kFit >= 2 ? 2 : 1));
  static_assert(kFit >= 1);

  const uint8_t* x_[kPixels];
  __m256i sums_[kPixels], narrow_[kPixels], weights_, together_;
};

// Any int8 weight.
template <class Codes, int kPixels>
class Avx2Products<Codes, kPixels, true> {
 public:
  Avx2Products(const FewInputs& inputs, int pixel) {
    for (int p = 0; p < kPixels; ++p) {
      x_[p] = inputs.of(pixel + p) + inputs.pitch / 3;
      even_[p] = odd_[p] = _mm256_setzero_si256();
    }
  }

  template <int group>
  MPQDM_INLINE void add(__m256i weights, size_t input) {
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(weights, 8), 8);
    const __m256i odd = _mm256_srai_epi16(weights, 8);
#pragma GCC unroll 8
    for (int p = 0; p < kPixels; ++p) {
      const uint8_t* const x = x_[p] + 2 * (input + kGroupDepth * group);
      const __m256i evens = _mm256_madd_epi16(even, broadcast_four(x));
      const __m256i odds = _mm256_madd_epi16(odd, broadcast_four(x + 4));
      even_[p] = _mm256_add_epi32(even_[p], evens);
      keep_order(even_[p]);
      odd_[p] = _mm256_add_epi32(odd_[p], odds);
      keep_order(odd_[p]);
    }
  }

  __m256i sum(int p, int32_t) const { return _mm256_add_epi32(even_[p], odd_[p]); }

 private:
  const uint8_t* x_[kPixels];
  __m256i even_[kPixels], odd_[kPixels];
};

struct Avx2Block : OneBlock {
  template <class Codes, int kCount>
  using Products = Avx2Products<Codes, kCount, Codes::kSigned>;
};

}  // namespace
}  // namespace mpqdm
