// Multiplication by unpacked blocks, once for each instruction set, chosen at run time.
#pragma once

#include <cstddef>
#include <cstdint>

#include "mpqdm/blob.h"

namespace mpqdm {

struct CodeStream;

// Where the inputs of some pixels lie. A pixel's inputs are `segments` runs of `groups` groups of 4
// bytes; run s of pixel p begins at `pixels[p] + s * segment_stride`.
struct Inputs {
  const uint8_t* const* pixels;  // [KernelSet::pixels]; int8 codes, or codes + 128 (offset_inputs)
  size_t segment_stride;
  int segments;
  int groups;
};

// What becomes of the sums of a pair of blocks: the channels that they belong to, and their numbers.
struct PairRows {
  int count;                       // rows that stand for a channel, at most 16; they come first
  bool adjacent;                   // whether their channels follow each other
  uint32_t channel[2 * kBlockRows];
  int32_t weight_sum[2 * kBlockRows];
  float scale[2 * kBlockRows];
  float bias[2 * kBlockRows];
};

// Inputs of a few pixels, each in one run, up to the end of the last tile.
struct FewInputs {
  const uint8_t* inputs;       // as `FewKernels::prepare` wrote them, pixel p at `p * pitch`
  size_t pitch;
  int pixels;                  // 1 .. FewKernels::pixels
  int groups;                  // of 4 inputs that count; what lies behind them in the last tile does not
  const int32_t* zero_points;  // [pixels], moved as the inputs are
  const int32_t* input_sums;   // [pixels], of inputs less zero points

  // Prepared inputs of a pixel; behind the last one those of the first, whose sums nobody reads.
  const uint8_t* of(int pixel) const {
    return inputs + static_cast<size_t>(pixel < pixels ? pixel : 0) * pitch;
  }
};

// Functions for so few pixels that unpacking a block would take longer than multiplying by it: packed
// weights are read once, and unpacked in registers only.
struct FewKernels {
  int pixels;       // the most that `multiply` takes: up to here it is faster. 0: there are no such functions.
  int input_bytes;  // bytes of a prepared input
  // Brings a pixel's `count` inputs, those of whole tiles, into the order of `multiply`; their sum.
  int32_t (*prepare)(const uint8_t* inputs, size_t count, int32_t zero_point, uint8_t* prepared);
  // sums[p][r] = sum_k (inputs[p][k] - zero_points[p]) * weights[r][k], for one block (`second` is null)
  // or two. sums is [kMostFew][16] int32; what it holds behind the last pixel is undefined.
  void (*multiply)(const FewInputs& inputs, const Block& first, const Block* second, int32_t* sums);
};

constexpr int kMostFew = 16;  // at least every set's `FewKernels::pixels`

// Functions of one instruction set.
struct KernelSet {
  const char* name;
  // Whether inputs are uint8, code + 128, which x86 multiplies; else int8 as they are.
  bool offset_inputs;
  // Pixels that `multiply` computes at once.
  int pixels;
  // Unpacks all tiles of a block: `tiles` * 256 bytes. The order within 8 inputs is the kernel's own.
  void (*unpack)(const Block& block, int tiles, int8_t* weights);
  // sums[r] = sum_k weights[r][k] over the first `groups` groups of an unpacked block; [8].
  void (*sum_weights)(const int8_t* weights, int groups, int32_t* sums);
  // sums[p][r] = sum_k inputs[p][k] * weights[r][k], for 8 rows (one block) or 16 (two, the second at
  // `second`; null for one). `largest` bounds the absolute codes of both. sums is [pixels][16] int32.
  void (*multiply)(const Inputs& inputs, const int8_t* first, const int8_t* second, int largest,
                   int32_t* sums);
  // out[channel] = float(sum - zero_point * weight_sum) * (activation_scale * scale) + bias for the rows
  // of `count` pixels. Pixel p has sums[16 p ..], activation_scales[p], zero_points[p], out[stride p ..].
  void (*store)(const int32_t* sums, size_t count, const PairRows& rows,
                const float* activation_scales, const int32_t* zero_points, size_t stride,
                float* out);
  // Extends [low, high] to `count` numbers. False, and the range undefined, if one is NaN or infinite.
  bool (*extend_range)(const float* x, size_t count, float* low, float* high);
  // codes = round(clamp(x * inverse_scale, -128 - zero_point, 127 - zero_point)) + zero_point; of NaN
  // -128.
  void (*quantize)(const float* x, size_t count, float inverse_scale, float zero_point,
                   int8_t* codes);
  // x = float(code - zero_point) * scale.
  void (*dequantize)(const int8_t* codes, size_t count, float scale, int32_t zero_point, float* x);
  // Adds (x - shift) and its square to the sums of each of `channels`, over `pixels` of them.
  void (*add_moments)(const float* x, size_t pixels, size_t channels, const float* shift,
                      float* sums, float* squares);
  // out = x * scale + offset by channel, SiLU of it where asked for, times factor.
  void (*normalize)(const float* x, size_t pixels, size_t channels, const float* scale,
                    const float* offset, const float* factor, bool silu, float* out);
  // Decodes entropy-coded weights whose states take turns; `code_slots.h` says more.
  bool (*decode_run)(CodeStream& stream, size_t lanes, uint8_t* codes, size_t count);
  FewKernels few;
  // As `multiply`, for four blocks, the last of which may be the same: sums is [2][pixels][16], of the
  // first two and of the others. Null where registers have no room for it, or loads are no limit.
  void (*multiply_two)(const Inputs& inputs, const int8_t* const* blocks, int32_t* sums) = nullptr;
};

// The kernels of this binary that this CPU runs, best first; the last is `scalar`.
size_t kernel_sets(const KernelSet* const** sets);

// The first of them, or the one that the environment variable MPQDM_KERNELS names, if it is among them.
const KernelSet& best_kernels();

// By name; null if this binary or this CPU has none of that name.
const KernelSet* find_kernels(const char* name);

// Unpacks a block in the plain order [group][row 8][input 4]: the reference.
void unpack_scalar(const Block& block, int tiles, int8_t* weights);

}  // namespace mpqdm
