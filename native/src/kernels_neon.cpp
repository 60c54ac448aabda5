// ARMv8.0 without int8 dot products: products of int8 summed in 16 bits as long as the widths allow,
// then widened.
#include "code_slots.h"
#include "elementwise.h"
#include "few_widening.h"
#include "store.h"
#include "unpack_neon.h"

namespace mpqdm {
namespace {

constexpr int kPixels = 4;
static_assert(kPixels <= kMaxPixels);
constexpr int kInput = 128;  // the largest absolute input

#define MPQDM_UNROLL _Pragma("GCC unroll 8")

// Sums of two pixels and one block. A group's 8 rows are 4 registers of 2 rows x 4 inputs, so a 16-bit
// lane holds one input's product of one row: `steps` groups fit it.
void multiply_two(const Inputs& inputs, int pixel, const int8_t* w, int steps, int32_t* out) {
  int32x4_t sums[2][4];
  MPQDM_UNROLL for (int p = 0; p < 2; ++p) {
    MPQDM_UNROLL for (int i = 0; i < 4; ++i) sums[p][i] = vdupq_n_s32(0);
  }
  for (int segment = 0; segment < inputs.segments; ++segment) {
    const size_t start = static_cast<size_t>(segment) * inputs.segment_stride;
    const uint8_t* x[2] = {inputs.pixels[pixel] + start, inputs.pixels[pixel + 1] + start};
    for (int group = 0; group < inputs.groups;) {
      const int end = group + steps < inputs.groups ? group + steps : inputs.groups;
      int16x8_t narrow[2][4];
      MPQDM_UNROLL for (int p = 0; p < 2; ++p) {
        MPQDM_UNROLL for (int i = 0; i < 4; ++i) narrow[p][i] = vdupq_n_s16(0);
      }
      for (; group < end; ++group, w += kGroupBytes) {
        int8x8_t weights[4];
        MPQDM_UNROLL for (int i = 0; i < 4; ++i) weights[i] = vld1_s8(w + 8 * i);
        MPQDM_UNROLL for (int p = 0; p < 2; ++p) {
          int32_t four;
          __builtin_memcpy(&four, x[p] + kGroupDepth * group, sizeof four);
          const int8x8_t input = vreinterpret_s8_s32(vdup_n_s32(four));
          MPQDM_UNROLL for (int i = 0; i < 4; ++i) {
            narrow[p][i] = vmlal_s8(narrow[p][i], weights[i], input);
          }
        }
      }
      MPQDM_UNROLL for (int p = 0; p < 2; ++p) {
        MPQDM_UNROLL for (int i = 0; i < 4; ++i) sums[p][i] = vpadalq_s16(sums[p][i], narrow[p][i]);
      }
    }
  }
  MPQDM_UNROLL for (int p = 0; p < 2; ++p) {
    vst1q_s32(out + kPairRows * p, vpaddq_s32(sums[p][0], sums[p][1]));
    vst1q_s32(out + kPairRows * p + 4, vpaddq_s32(sums[p][2], sums[p][3]));
  }
}

void multiply_neon(const Inputs& inputs, const int8_t* first, const int8_t* second, int largest,
                   int32_t* sums) {
  const int steps = 32767 / (kInput * (largest > 0 ? largest : 1));
  for (int pixel = 0; pixel < kPixels; pixel += 2) {
    int32_t* out = sums + kPairRows * pixel;
    multiply_two(inputs, pixel, first, steps, out);
    if (second != nullptr) multiply_two(inputs, pixel, second, steps, out + kBlockRows);
  }
}

}  // namespace

const KernelSet kNeonKernels = {
    "neon", false, kPixels, unpack_neon<4>, sum_neon<4>, multiply_neon, store_rows,
    extend_range, quantize_run, dequantize_run, add_moments, normalize, decode_run_scalar,
    kFewWidening};

}  // namespace mpqdm
