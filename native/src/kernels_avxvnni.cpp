// int8 dot products in 16 registers of 256 bits.
#include "code_slots.h"
#include "elementwise.h"
#include "few_vnni.h"
#include "store.h"
#include "unpack_avx2.h"

namespace mpqdm {
namespace {

constexpr int kPixels = 6;  // 6 x 2 sums, two weights, an input
static_assert(kPixels <= kMaxPixels);

#define MPQDM_UNROLL _Pragma("GCC unroll 8")

template <int kBlocks>
void multiply_blocks(const Inputs& inputs, const int8_t* const (&blocks)[kBlocks], int32_t* out) {
  __m256i sums[kPixels][kBlocks];
  MPQDM_UNROLL for (int p = 0; p < kPixels; ++p) {
    MPQDM_UNROLL for (int b = 0; b < kBlocks; ++b) sums[p][b] = _mm256_setzero_si256();
  }
  const auto depth = static_cast<size_t>(kGroupDepth * inputs.groups);
  size_t from = 0;
  for (int segment = 0; segment < inputs.segments; ++segment) {
    const uint8_t* x[kPixels];
    for (int p = 0; p < kPixels; ++p) {
      x[p] = inputs.pixels[p] + static_cast<size_t>(segment) * inputs.segment_stride;
    }
    for (size_t at = 0; at < depth; at += kGroupDepth, from += kGroupBytes) {
      __m256i weights[kBlocks];
      MPQDM_UNROLL for (int b = 0; b < kBlocks; ++b) {
        weights[b] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(blocks[b] + from));
      }
      MPQDM_UNROLL for (int p = 0; p < kPixels; ++p) {
        int32_t four;
        std::memcpy(&four, x[p] + at, sizeof four);
        const __m256i input = _mm256_set1_epi32(four);
        MPQDM_UNROLL for (int b = 0; b < kBlocks; ++b) {
          sums[p][b] = _mm256_dpbusd_avx_epi32(sums[p][b], input, weights[b]);
        }
      }
    }
  }
  MPQDM_UNROLL for (int p = 0; p < kPixels; ++p) {
    MPQDM_UNROLL for (int b = 0; b < kBlocks; ++b) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + kPairRows * p + kBlockRows * b),
                          sums[p][b]);
    }
  }
}

void multiply_avxvnni(const Inputs& inputs, const int8_t* first, const int8_t* second, int,
                      int32_t* sums) {
  if (second == nullptr) return multiply_blocks<1>(inputs, {first}, sums);
  multiply_blocks<2>(inputs, {first, second}, sums);
}

struct Dot256 {
  static MPQDM_INLINE __m256i add(__m256i sum, __m256i unsigned_bytes, __m256i signed_bytes) {
    return _mm256_dpbusd_avx_epi32(sum, unsigned_bytes, signed_bytes);
  }
  static MPQDM_INLINE __m256i add_bytes(__m256i x, __m256i y) { return _mm256_add_epi8(x, y); }
};

struct VnniBlock : OneBlock {
  static constexpr int kMostPixels = 8;
  static constexpr int kSums = 4;  // at least; more would leave no registers
  template <class Codes, int kCount>
  using Products = DotProducts<VnniBlock, Dot256, Codes, kCount>;
};

}  // namespace

const KernelSet kAvxVnniKernels = {
    "avxvnni", true, kPixels, unpack_avx2, sum_avx2, multiply_avxvnni, store_rows,
    extend_range, quantize_run, dequantize_run, add_moments, normalize, decode_run_avx2,
    {8, 1, copy_inputs, multiply_blocks_apart<VnniBlock>}};

}  // namespace mpqdm
