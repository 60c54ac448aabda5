// ARMv8.2 int8 dot products: one instruction for 4 rows x 4 inputs of a pixel.
#include "code_slots.h"
#include "elementwise.h"
#include "few_dot.h"
#include "store.h"
#include "unpack_neon.h"

namespace mpqdm {
namespace {

constexpr int kPixels = 8;
static_assert(kPixels <= kMaxPixels);
constexpr int kDeep = 16;  // inputs of a pixel in a register: four groups

#define MPQDM_UNROLL _Pragma("GCC unroll 8")

struct Sums {
  int32x4_t low[kPixels], high[kPixels];  // rows 0-3 and 4-7
};

template <int kLane>
inline __attribute__((always_inline)) void add_group(const int8x16_t (&x)[kPixels], const int8_t* w,
                                                     Sums& sums) {
  const int8x16_t low = vld1q_s8(w), high = vld1q_s8(w + kHalfBytes);
  MPQDM_UNROLL for (int p = 0; p < kPixels; ++p) {
    sums.low[p] = vdotq_laneq_s32(sums.low[p], low, x[p], kLane);
    sums.high[p] = vdotq_laneq_s32(sums.high[p], high, x[p], kLane);
  }
}

void multiply_block(const Inputs& inputs, const int8_t* w, int32_t* out) {
  Sums sums;
  MPQDM_UNROLL for (int p = 0; p < kPixels; ++p) sums.low[p] = sums.high[p] = vdupq_n_s32(0);
  const int depth = kGroupDepth * inputs.groups;
  for (int segment = 0; segment < inputs.segments; ++segment) {
    const size_t start = static_cast<size_t>(segment) * inputs.segment_stride;
    const uint8_t* from[kPixels];
    for (int p = 0; p < kPixels; ++p) from[p] = inputs.pixels[p] + start;
    int8x16_t x[kPixels];
    int at = 0;
    for (; at + kDeep <= depth; at += kDeep, w += 4 * kGroupBytes) {
      MPQDM_UNROLL for (int p = 0; p < kPixels; ++p) {
        x[p] = vreinterpretq_s8_u8(vld1q_u8(from[p] + at));
      }
      add_group<0>(x, w, sums);
      add_group<1>(x, w + kGroupBytes, sums);
      add_group<2>(x, w + 2 * kGroupBytes, sums);
      add_group<3>(x, w + 3 * kGroupBytes, sums);
    }
    for (; at < depth; at += kGroupDepth, w += kGroupBytes) {
      MPQDM_UNROLL for (int p = 0; p < kPixels; ++p) {
        int32_t four;
        __builtin_memcpy(&four, from[p] + at, sizeof four);
        x[p] = vreinterpretq_s8_s32(vdupq_n_s32(four));
      }
      add_group<0>(x, w, sums);
    }
  }
  MPQDM_UNROLL for (int p = 0; p < kPixels; ++p) {
    vst1q_s32(out + kPairRows * p, sums.low[p]);
    vst1q_s32(out + kPairRows * p + 4, sums.high[p]);
  }
}

void multiply_dot(const Inputs& inputs, const int8_t* first, const int8_t* second, int,
                  int32_t* sums) {
  multiply_block(inputs, first, sums);
  if (second != nullptr) multiply_block(inputs, second, sums + kBlockRows);
}

}  // namespace

const KernelSet kDotKernels = {
    "dotprod", false, kPixels, unpack_neon<4>, sum_neon<4>, multiply_dot, store_rows,
    extend_range, quantize_run, dequantize_run, add_moments, normalize, decode_run_scalar,
    kFewDot};

}  // namespace mpqdm
