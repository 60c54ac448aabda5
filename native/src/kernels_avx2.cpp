// AVX2 without int8 dot products. vpmaddubsw multiplies uint8 inputs by int8 weights and adds pairs in
// 16 bits; the fewer bits the weights have, the more such sums fit before they are widened to 32.
#include "code_slots.h"
#include "elementwise.h"
#include "few_avx2.h"
#include "store.h"
#include "unpack_avx2.h"

namespace mpqdm {
namespace {

constexpr int kPixels = 3;  // 3 x 16 sums of 16 and of 32 bits, two weights, an input, ones: 16 registers
static_assert(kPixels <= kMaxPixels);
constexpr int kInputPair = 2 * 255;  // the largest that a pair of inputs multiplies a weight by

#define MPQDM_UNROLL _Pragma("GCC unroll 16")

__m256i broadcast(const uint8_t* from) {
  int32_t four;
  std::memcpy(&four, from, sizeof four);
  return _mm256_set1_epi32(four);
}

__m256i load_weights(const int8_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

template <int kBlocks>
struct Sums {
  __m256i of[kPixels][kBlocks];

  void clear() {
    MPQDM_UNROLL for (int p = 0; p < kPixels; ++p) {
      MPQDM_UNROLL for (int b = 0; b < kBlocks; ++b) of[p][b] = _mm256_setzero_si256();
    }
  }

  void write(int32_t* sums) const {
    for (int p = 0; p < kPixels; ++p) {
      for (int b = 0; b < kBlocks; ++b) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + kPairRows * p + kBlockRows * b),
                            of[p][b]);
      }
    }
  }
};

// `count` groups, their products summed in 16 bits, then added to `sums`.
template <int kBlocks, int kSteps>
inline __attribute__((always_inline)) void add_run(const uint8_t* const (&x)[kPixels], size_t at,
                                                   const int8_t* const (&w)[kBlocks], size_t from,
                                                   int count, Sums<kBlocks>& sums) {
  Sums<kBlocks> narrow;
  narrow.clear();
  const auto step = [&](int i) __attribute__((always_inline)) {
    const auto group = static_cast<size_t>(i);
    __m256i weights[kBlocks];
    MPQDM_UNROLL for (int b = 0; b < kBlocks; ++b) {
      weights[b] = load_weights(w[b] + from + kGroupBytes * group);
    }
    MPQDM_UNROLL for (int p = 0; p < kPixels; ++p) {
      const __m256i input = broadcast(x[p] + at + kGroupDepth * group);
      MPQDM_UNROLL for (int b = 0; b < kBlocks; ++b) {
        narrow.of[p][b] =
            _mm256_add_epi16(narrow.of[p][b], _mm256_maddubs_epi16(input, weights[b]));
        keep_order(narrow.of[p][b]);
      }
    }
  };
  if (count == kSteps) {
    MPQDM_UNROLL for (int i = 0; i < kSteps; ++i) step(i);
  } else {
    for (int i = 0; i < count; ++i) step(i);
  }
  const __m256i ones = _mm256_set1_epi16(1);
  MPQDM_UNROLL for (int p = 0; p < kPixels; ++p) {
    MPQDM_UNROLL for (int b = 0; b < kBlocks; ++b) {
      sums.of[p][b] = _mm256_add_epi32(sums.of[p][b], _mm256_madd_epi16(narrow.of[p][b], ones));
    }
  }
}

template <int kBlocks, int kSteps>
void multiply_narrow(const Inputs& inputs, const int8_t* const (&w)[kBlocks], int32_t* out) {
  Sums<kBlocks> sums;
  sums.clear();
  size_t from = 0;
  for (int segment = 0; segment < inputs.segments; ++segment) {
    const uint8_t* x[kPixels];
    for (int p = 0; p < kPixels; ++p) {
      x[p] = inputs.pixels[p] + static_cast<size_t>(segment) * inputs.segment_stride;
    }
    int group = 0;
    for (; group + kSteps <= inputs.groups; group += kSteps, from += kGroupBytes * kSteps) {
      add_run<kBlocks, kSteps>(x, static_cast<size_t>(kGroupDepth * group), w, from, kSteps, sums);
    }
    if (const int left = inputs.groups - group; left > 0) {
      add_run<kBlocks, kSteps>(x, static_cast<size_t>(kGroupDepth * group), w, from, left, sums);
      from += static_cast<size_t>(kGroupBytes * left);
    }
  }
  sums.write(out);
}

// Any int8 weight: pairs of such products do not fit 16 bits. The bytes at even and at odd places are
// widened to 16 bits apart, so that both kinds of products are summed in the 32 bits of their row.
template <int kBlocks>
void multiply_wide(const Inputs& inputs, const int8_t* const (&w)[kBlocks], int32_t* out) {
  const __m256i low_byte = _mm256_set1_epi16(0xff);
  Sums<kBlocks> sums;
  sums.clear();
  size_t from = 0;
  for (int segment = 0; segment < inputs.segments; ++segment) {
    const uint8_t* x[kPixels];
    for (int p = 0; p < kPixels; ++p) {
      x[p] = inputs.pixels[p] + static_cast<size_t>(segment) * inputs.segment_stride;
    }
    for (int group = 0; group < inputs.groups; ++group, from += kGroupBytes) {
      __m256i even[kBlocks], odd[kBlocks];
      MPQDM_UNROLL for (int b = 0; b < kBlocks; ++b) {
        const __m256i weights = load_weights(w[b] + from);
        even[b] = _mm256_srai_epi16(_mm256_slli_epi16(weights, 8), 8);
        odd[b] = _mm256_srai_epi16(weights, 8);
      }
      MPQDM_UNROLL for (int p = 0; p < kPixels; ++p) {
        const __m256i input = broadcast(x[p] + static_cast<size_t>(kGroupDepth * group));
        const __m256i evens = _mm256_and_si256(input, low_byte);
        const __m256i odds = _mm256_srli_epi16(input, 8);
        MPQDM_UNROLL for (int b = 0; b < kBlocks; ++b) {
          __m256i& sum = sums.of[p][b];
          sum = _mm256_add_epi32(sum, _mm256_madd_epi16(evens, even[b]));
          keep_order(sum);
          sum = _mm256_add_epi32(sum, _mm256_madd_epi16(odds, odd[b]));
          keep_order(sum);
        }
      }
    }
  }
  sums.write(out);
}

template <int kBlocks>
void multiply_blocks(const Inputs& inputs, const int8_t* const (&w)[kBlocks], int largest,
                     int32_t* sums) {
  const int steps = 32767 / (kInputPair * (largest > 0 ? largest : 1));
  if (steps >= 16) return multiply_narrow<kBlocks, 16>(inputs, w, sums);
  if (steps >= 8) return multiply_narrow<kBlocks, 8>(inputs, w, sums);
  if (steps >= 4) return multiply_narrow<kBlocks, 4>(inputs, w, sums);
  if (steps >= 2) return multiply_narrow<kBlocks, 2>(inputs, w, sums);
  if (steps == 1) return multiply_narrow<kBlocks, 1>(inputs, w, sums);
  multiply_wide<kBlocks>(inputs, w, sums);
}

void multiply_avx2(const Inputs& inputs, const int8_t* first, const int8_t* second, int largest,
                   int32_t* sums) {
  if (second == nullptr) return multiply_blocks<1>(inputs, {first}, largest, sums);
  multiply_blocks<2>(inputs, {first, second}, largest, sums);
}

}  // namespace

const KernelSet kAvx2Kernels = {
    "avx2", true, kPixels, unpack_avx2, sum_avx2, multiply_avx2, store_rows,
    extend_range, quantize_run, dequantize_run, add_moments, normalize, decode_run_avx2,
    {8, 3, prepare_avx2, multiply_blocks_apart<Avx2Block>}};

}  // namespace mpqdm
