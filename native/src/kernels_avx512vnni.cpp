// int8 dot products in 32 registers of 512 bits: a pair of blocks, 16 rows, in each.
#include "code_slots.h"
#include "elementwise.h"
#include "store.h"
#include "unpack_avx2.h"

namespace mpqdm {
namespace {

constexpr int kPixels = 8;
static_assert(kPixels <= kMaxPixels);

#define MPQDM_UNROLL _Pragma("GCC unroll 16")

__m512i broadcast(const uint8_t* from) {
  int32_t four;
  std::memcpy(&four, from, sizeof four);
  return _mm512_set1_epi32(four);
}

void multiply_avx512(const Inputs& inputs, const int8_t* first, const int8_t* second, int,
                     int32_t* out) {
  // One block alone is multiplied twice: as many instructions, and its second result is not read.
  const int8_t* const other = second == nullptr ? first : second;
  __m512i sums[kPixels];
  MPQDM_UNROLL for (int p = 0; p < kPixels; ++p) sums[p] = _mm512_setzero_si512();
  const auto depth = static_cast<size_t>(kGroupDepth * inputs.groups);
  size_t from = 0;
  for (int segment = 0; segment < inputs.segments; ++segment) {
    const uint8_t* x[kPixels];
    for (int p = 0; p < kPixels; ++p) {
      x[p] = inputs.pixels[p] + static_cast<size_t>(segment) * inputs.segment_stride;
    }
    for (size_t at = 0; at < depth; at += kGroupDepth, from += kGroupBytes) {
      const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first + from));
      const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(other + from));
      const __m512i weights = _mm512_maskz_inserti64x4(0xff, _mm512_castsi256_si512(low), high, 1);
      MPQDM_UNROLL for (int p = 0; p < kPixels; ++p) {
        sums[p] = _mm512_dpbusd_epi32(sums[p], broadcast(x[p] + at), weights);
      }
    }
  }
  MPQDM_UNROLL for (int p = 0; p < kPixels; ++p) {
    _mm512_storeu_si512(out + kPairRows * p, sums[p]);
  }
}

}  // namespace

const KernelSet kAvx512VnniKernels = {
    "avx512vnni", true, kPixels, unpack_avx2, sum_avx2, multiply_avx512, store_rows,
    extend_range, quantize_run, dequantize_run, add_moments, normalize, decode_run_avx2};

}  // namespace mpqdm
