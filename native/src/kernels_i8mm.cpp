// ARMv8.6 int8 matrix products: one instruction for 2 pixels x 2 rows x 8 inputs.
#include "code_slots.h"
#include "elementwise.h"
#include "few_dot.h"
#include "store.h"
#include "unpack_neon.h"

namespace mpqdm {
namespace {

constexpr int kPixels = 8;
static_assert(kPixels <= kMaxPixels);
constexpr int kPairs = kPixels / 2;
constexpr int kRun = 8;                         // inputs of a row that stand together
constexpr int kRunBytes = kBlockRows * kRun;    // of all rows

#define MPQDM_UNROLL _Pragma("GCC unroll 8")

struct Sums {
  int32x4_t of[kPairs][4];  // 2 pixels x 2 rows each
};

inline __attribute__((always_inline)) void add_run(const int8x16_t (&x)[kPairs], const int8_t* w,
                                                   Sums& sums) {
  MPQDM_UNROLL for (int rows = 0; rows < 4; ++rows) {
    const int8x16_t weights = vld1q_s8(w + 16 * rows);
    MPQDM_UNROLL for (int pair = 0; pair < kPairs; ++pair) {
      sums.of[pair][rows] = vmmlaq_s32(sums.of[pair][rows], x[pair], weights);
    }
  }
}

// Runs of 8 inputs; a segment's odd last group shares its run with the next segment's first.
class Reader {
 public:
  explicit Reader(const Inputs& inputs) : inputs_(inputs) {}

  int runs() const { return (inputs_.segments * inputs_.groups + 1) / 2; }

  // Inputs of both pixels of a pair; zeros behind the end.
  int8x16_t read(int pair, int run) const {
    return vcombine_s8(read_pixel(2 * pair, run), read_pixel(2 * pair + 1, run));
  }

 private:
  int32_t read_group(int pixel, int group) const {
    int32_t four = 0;
    if (group < inputs_.segments * inputs_.groups) {
      const auto segment = static_cast<size_t>(group / inputs_.groups);
      const auto at = static_cast<size_t>(kGroupDepth * (group % inputs_.groups));
      __builtin_memcpy(&four, inputs_.pixels[pixel] + segment * inputs_.segment_stride + at,
                       sizeof four);
    }
    return four;
  }

  int8x8_t read_pixel(int pixel, int run) const {
    const int32_t both[2] = {read_group(pixel, 2 * run), read_group(pixel, 2 * run + 1)};
    return vreinterpret_s8_s32(vld1_s32(both));
  }

  const Inputs& inputs_;
};

void multiply_even(const Inputs& inputs, const int8_t* w, Sums& sums) {
  const int depth = kGroupDepth * inputs.groups;
  for (int segment = 0; segment < inputs.segments; ++segment) {
    const size_t start = static_cast<size_t>(segment) * inputs.segment_stride;
    const uint8_t* from[kPixels];
    for (int p = 0; p < kPixels; ++p) from[p] = inputs.pixels[p] + start;
    for (int at = 0; at < depth; at += kRun, w += kRunBytes) {
      int8x16_t x[kPairs];
      MPQDM_UNROLL for (int pair = 0; pair < kPairs; ++pair) {
        x[pair] = vreinterpretq_s8_u8(
            vcombine_u8(vld1_u8(from[2 * pair] + at), vld1_u8(from[2 * pair + 1] + at)));
      }
      add_run(x, w, sums);
    }
  }
}

void multiply_odd(const Inputs& inputs, const int8_t* w, Sums& sums) {
  const Reader reader(inputs);
  for (int run = 0; run < reader.runs(); ++run, w += kRunBytes) {
    int8x16_t x[kPairs];
    for (int pair = 0; pair < kPairs; ++pair) x[pair] = reader.read(pair, run);
    add_run(x, w, sums);
  }
}

void multiply_block(const Inputs& inputs, const int8_t* w, int32_t* out) {
  Sums sums;
  MPQDM_UNROLL for (int pair = 0; pair < kPairs; ++pair) {
    MPQDM_UNROLL for (int rows = 0; rows < 4; ++rows) sums.of[pair][rows] = vdupq_n_s32(0);
  }
  if (inputs.groups % 2 == 0) {
    multiply_even(inputs, w, sums);
  } else {
    multiply_odd(inputs, w, sums);
  }
  for (int pair = 0; pair < kPairs; ++pair) {
    for (int rows = 0; rows < 4; ++rows) {
      vst1_s32(out + kPairRows * (2 * pair) + 2 * rows, vget_low_s32(sums.of[pair][rows]));
      vst1_s32(out + kPairRows * (2 * pair + 1) + 2 * rows, vget_high_s32(sums.of[pair][rows]));
    }
  }
}

void multiply_i8mm(const Inputs& inputs, const int8_t* first, const int8_t* second, int,
                   int32_t* sums) {
  multiply_block(inputs, first, sums);
  if (second != nullptr) multiply_block(inputs, second, sums + kBlockRows);
}

}  // namespace

const KernelSet kI8mmKernels = {
    "i8mm", false, kPixels, unpack_neon<kRun>, sum_neon<kRun>, multiply_i8mm, store_rows,
    extend_range, quantize_run, dequantize_run, add_moments, normalize, decode_run_scalar,
    kFewDot};

}  // namespace mpqdm
